"""How far a provider's result is from plain float32 attention, on a few users of the batch.

A benchmark has to know that it times attention and not something faster. The test suite judges kernels more
strictly (`tests/numerics.py`); here a wrong mask, unwritten memory or a lost tile has to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention.shapes import Batch, Inputs

RESULTS = ("out", "dq", "dk", "dv")

# The scores of one head are a matrix of this size squared, a few times over: about 1.5 GB.
LONGEST_REFERENCE = 8192

# What a row (one token, all heads) may err, root mean square relative to that of the exact row, in units of eps of the
# dtype. bfloat16 kernels stay below a half of it, and a tile of 64 keys lost from 8000 is above it.
ROW_LIMIT = 8.0
FLOAT32_LIMIT_FACTOR = 256  # float32 errors come from the order of long sums, not from rounding the result
# A row smaller than this fraction of the user's rows together counts as so large: some gradients are exactly zero.
LEAST_ROW_SIZE = 0.05


@dataclass(frozen=True)
class Errors:
    """Of the checked users together."""

    greatest: dict[str, float]
    """Greatest absolute error by result: `out`, and `dq`, `dk`, `dv` where there are gradients."""

    relative: float
    """The worst row's error relative to what is allowed: above 1 the result is wrong."""


def checked_users(batch: Batch) -> list[int]:
    """The longest user that fits, the median, the shortest, the first and the last, without repetitions.

    Users of one token are left out: their dq and dk are zero, which no relative error fits.
    """
    by_length = sorted(
        (user for user, length in enumerate(batch.lengths) if 1 < length <= LONGEST_REFERENCE),
        key=lambda user: batch.lengths[user],
    )
    if not by_length:
        return []
    chosen = [by_length[-1], by_length[len(by_length) // 2], by_length[0], min(by_length), max(by_length)]
    return list(dict.fromkeys(chosen))


def row_limit(dtype: torch.dtype) -> float:
    """The relative error of a row that rounding explains."""
    return ROW_LIMIT * torch.finfo(dtype).eps * (FLOAT32_LIMIT_FACTOR if dtype == torch.float32 else 1)


class Reference:
    """Float32 results of the checked users; made once per batch and shared by all providers."""

    def __init__(self, batch: Batch, inputs: Inputs) -> None:
        self.batch = batch
        self.results = {user: _reference_of(batch, inputs, user) for user in checked_users(batch)}

    def compare(self, results: Sequence[Tensor]) -> Errors:
        """The errors of `(out,)` or `(out, dq, dk, dv)`, each over all rows of the batch."""
        greatest = dict.fromkeys(RESULTS[: len(results)], 0.0)
        relative = 0.0
        limit = row_limit(self.batch.dtype)
        for user, exact_results in self.results.items():
            rows = slice(self.batch.bounds[user], self.batch.bounds[user + 1])
            for name, actual, exact in zip(RESULTS, results, exact_results, strict=False):
                difference = actual.detach()[rows].float() - exact
                if not bool(torch.isfinite(difference).all()):
                    return Errors({**greatest, name: float("inf")}, float("inf"))
                greatest[name] = max(greatest[name], float(difference.abs().max()))
                size = exact.square().mean().sqrt()
                row_size = exact.square().mean(dim=(1, 2)).sqrt().clamp_min(LEAST_ROW_SIZE * size)
                row_error = difference.square().mean(dim=(1, 2)).sqrt()
                relative = max(relative, float((row_error / row_size).max()) / limit)
        return Errors(greatest, relative)


def user_mask(length: int, targets: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """`(length, length)` bool: which query of a user sees which key."""
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)[None, :]
    history = length - targets
    among_history = j <= i if causal else torch.ones_like(i == j)
    if window is not None:
        among_history = among_history & ((i - j).abs() < window)
    return ((j < history) & (among_history | (i >= history))) | (i == j)


def _reference_of(batch: Batch, inputs: Inputs, user: int) -> list[Tensor]:
    """`out`, `dq`, `dk`, `dv` of one user, `(length, heads, D)` in float32, head by head to spare memory."""
    rows = slice(batch.bounds[user], batch.bounds[user + 1])
    q, k, v, dout = (x.detach()[rows].float() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    hidden = ~user_mask(batch.lengths[user], batch.targets[user], batch.shape.causal, batch.window, batch.device)
    queries_per_key_head = batch.shape.heads // batch.shape.kv_heads
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    with _exact_float32():
        for head in range(batch.shape.heads):
            kv_head = head // queries_per_key_head
            q_h, k_h, v_h = q[:, head], k[:, kv_head], v[:, kv_head]
            p = (q_h @ k_h.T * batch.scale).masked_fill_(hidden, float("-inf")).softmax(dim=-1)
            out[:, head] = p @ v_h
            dv[:, kv_head] += p.T @ dout[:, head]
            dp = dout[:, head] @ v_h.T
            ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * batch.scale
            dq[:, head] = ds @ k_h
            dk[:, kv_head] += ds.T @ q_h
    return [out, dq, dk, dv]


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Without TF32, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
