"""Inputs for tests of jagged attention, and the comparison of a kernel with the reference by the tolerance policy."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.jagged_flash_attention import jagged_flash_attention, reference_attention
from tests.numerics import FORWARD_FACTOR, GRADIENT_FACTOR, assert_matches_reference

# Tiles are 16 and 32 rows in the interpreter, up to 128 on a GPU, where lengths are multiplied (`on_device`).
LENGTHS: dict[str, list[int]] = {
    "one_token": [1],
    "one_user": [40],
    "only_single_tokens": [1, 1, 1, 1, 1],
    "empty_users_around": [0, 0, 5, 0, 37, 0],
    "at_tile_edges": [15, 16, 17, 31, 32, 33],
    "one_long_many_short": [3, 2, 60, 1],
    "only_empty_users": [0, 0, 0],
    "no_users": [],
}
MIXED = [0, 1, 66, 5, 0, 16]  # a window of 47 ends one row off the edges of the tiles of 66
CANDIDATES = [3, 0, 1000, 1, 20]  # dealt out to users in turn, at most their length: some are all candidates
LAYOUTS = ["packed_projection", "heads_first", "every_second_row", "not_contiguous"]


@dataclass(frozen=True)
class Case:
    """One call: the sequences, the mask, the tensors' shape and how they lie in memory."""

    lengths: list[int]
    key_lengths: list[int] | None = None
    """Of cross attention; None: self attention."""

    num_heads: int = 2
    group: int = 1
    """Query heads per key head."""

    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    offsets_dtype: torch.dtype = torch.int64
    causal: bool = True
    window: int | None = None
    has_candidates: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    score_slope: float = 0.0
    """Added to the scores of a user's first key ... last key: 0 ... that. Else scores are standard normal."""

    slack: int = 0  # max_seqlen above the longest length
    layout: str = "contiguous"
    seed: int = 0

    def on_device(self, device: torch.device) -> Case:
        """Longer on a GPU, to fill its larger tiles: lengths of 2 and more times 7, the window too."""
        if device.type == "cpu":
            return self
        key_lengths = None if self.key_lengths is None else [_longer(n) for n in self.key_lengths]
        window = self.window if self.window in (None, 1) else 7 * self.window
        return replace(self, lengths=[_longer(n) for n in self.lengths], key_lengths=key_lengths, window=window)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0) + self.slack

    def make_offsets(self, device: torch.device, lengths: list[int] | None = None) -> Tensor:
        values = torch.tensor([0, *(self.lengths if lengths is None else lengths)], dtype=self.offsets_dtype)
        return values.cumsum(0, dtype=self.offsets_dtype).to(device)

    def make_qkvg(self, device: torch.device) -> list[Tensor]:
        """q, k, v and the gradient of the output, standard normal."""
        generator = torch.Generator().manual_seed(self.seed)
        total = sum(self.lengths)
        total_keys = total if self.key_lengths is None else sum(self.key_lengths)
        q_shape = (total, self.num_heads, self.head_dim)
        k_shape = (total_keys, self.num_heads // self.group, self.head_dim)
        shapes = (q_shape, k_shape, k_shape, q_shape)
        q, k, v, dout = (torch.randn(x, generator=generator) for x in shapes)
        if self.score_slope:
            q[..., 0] = self.head_dim**0.5
            steps = [torch.arange(n) / max(n - 1, 1) for n in self.key_lengths or self.lengths]
            k[..., 0] = self.score_slope * torch.cat(steps)[:, None]
        return [relay(x.to(device, self.dtype), self.layout) for x in (q, k, v, dout)]

    def options(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the operator and of the reference."""
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "scale": self.scale}
        if self.has_candidates:
            dealt = [min(n, CANDIDATES[i % len(CANDIDATES)]) for i, n in enumerate(self.lengths)]
            options["num_targets"] = torch.tensor(dealt, dtype=self.offsets_dtype, device=device)
        if self.key_lengths is not None:
            options["key_offsets"] = self.make_offsets(device, self.key_lengths)
            options["max_key_seqlen"] = max(self.key_lengths, default=0) + self.slack
            options["causal"] = False
        if self.dropout_p > 0.0:
            options["dropout_p"] = self.dropout_p
            options["seed"] = torch.tensor([2**61 + self.seed], device=device)
        return options


def _longer(length: int) -> int:
    return 7 * length if length > 1 else length


def relay(x: Tensor, layout: str) -> Tensor:
    """The same `(L, H, D)` values with other strides; what lies between them is NaN."""
    L, H, D = x.shape
    if layout == "packed_projection":
        packed = x.new_full((L, 3, H, D), float("nan"))
        packed[:, 1] = x
        return packed[:, 1]
    if layout == "heads_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every_second_row":
        spread = x.new_full((2 * L, H, D), float("nan"))
        spread[1::2] = x
        return spread[1::2]
    if layout == "not_contiguous":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    assert layout == "contiguous", layout
    return x


def with_gradients(function: Any, qkv: list[Tensor], dout: Tensor, *args: Any, **options: Any) -> dict[str, Tensor]:
    """`function`'s output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = function(*leaves, *args, **options)
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def run(function: Any, case: Case, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """`with_gradients` of a case, its inputs computed with in another dtype if one is given."""
    *qkv, dout = (x.to(dtype or case.dtype) for x in case.make_qkvg(device))
    return with_gradients(function, qkv, dout, case.make_offsets(device), case.max_seqlen, **case.options(device))


def assert_kernel_matches_reference(case: Case, device: torch.device) -> None:
    """Forward and gradients of the kernel against float64, within the policy's multiple of PyTorch's own error."""
    assert_follows_reference(run(jagged_flash_attention, case, device), case, device)


def assert_follows_reference(actual: dict[str, Tensor], case: Case, device: torch.device) -> None:
    """The same for results that are there already: out, dq, dk and dv in the dtype of the case."""
    baseline = run(reference_attention, case, device)
    exact = run(reference_attention, case, device, torch.float64)
    if case.dropout_p > 0.0 or case.dtype == torch.float32:
        for name, allowed in rounding_of_delta(case, exact["out"], device).items():
            error = actual[name].double() - exact[name]
            left = error.sign() * (error.abs() - allowed).clamp(min=0.0)
            actual = {**actual, name: (exact[name] + left).to(case.dtype)}
    key_lengths = case.lengths if case.key_lengths is None else case.key_lengths
    # dq and dk are multiplied by the scale at the end: above the usual one, what cancellation leaves grows with it.
    scale = 1.0 if case.scale is None else max(1.0, abs(case.scale) * case.head_dim**0.5)
    for name in actual:
        assert_matches_reference(
            actual[name],
            baseline[name],
            exact[name],
            factor=FORWARD_FACTOR if name == "out" else GRADIENT_FACTOR,
            name=f"{name} of {case}",
            lengths=key_lengths if name in ("dk", "dv") else case.lengths,
            magnitude=(scale if name in ("dq", "dk") else 1.0) / (1.0 - case.dropout_p),
        )


def rounding_of_delta(case: Case, out: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What dq and dk may err because delta, the sum of out · dout over the head dim, is not the sum of p · dp.

    Every flash attention has this error; plain PyTorch, which keeps the probabilities, has not. It matters for queries
    that see one key. Their exact dq is zero, and so is what they give to dk, but under dropout out is v / (1 - p),
    which has to be rounded; and in float32 the two sums differ in their last bits, which adds up where hundreds of
    queries see the same key.
    """
    q, k, _, dout = (x.double() for x in case.make_qkvg(device))
    options = case.options(device) | {"dropout_p": 0.0}
    scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    # Rounding errors are independent, at most eps / 2 of a value: eps times the root of squares is 3.5 deviations.
    delta = torch.finfo(case.dtype).eps * (out * dout).square().sum(-1, keepdim=True).sqrt() * scale
    size = k.abs().requires_grad_()
    dq = reference_attention(q, k, size, case.make_offsets(device), case.max_seqlen, **options)
    (dk,) = torch.autograd.grad(dq, size, delta * q.abs())
    return {"dq": delta * dq.detach(), "dk": dk}


HEAD_DIMS = [16, 24, 32, 40, 48, 64, 64, 72, 80, 96, 128, 128, 144, 200, 256]
WINDOWS = [1, 7, 63, 64, 65, 127, 128, 129]


def random_cases(seed: int, number: int, longest_lengths: list[int], most_users: int) -> list[Case]:
    """Everything at once: lengths, dtype, heads, head dim, mask, dropout, strides, grouped queries, cross attention.

    The cases of one seed share what a kernel is compiled for, because compiling takes longer than running; they differ
    in users, lengths, candidates, window, scale, dropout probability, strides and the kind of index.

    Args:
        seed: which configuration.
        number: of cases.
        longest_lengths: each case takes one of these for its longest user, in tokens.
        most_users: in one case.
    """
    rng = random.Random(seed)
    is_cross = rng.random() < 0.2
    has_window, has_dropout = not is_cross and rng.random() < 0.4, rng.random() < 0.4
    group = rng.choice([1, 1, 2, 3])
    shared = Case(
        lengths=[],
        num_heads=group * rng.randint(1, 2),
        group=group,
        head_dim=rng.choice(HEAD_DIMS),
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        causal=not is_cross and rng.random() < 0.7,
        has_candidates=not is_cross and rng.random() < 0.5,
    )
    cases = []
    for i in range(number):
        longest = rng.choice(longest_lengths)
        num_users = rng.randint(1, most_users)

        def draw(longest: int = longest, num_users: int = num_users) -> list[int]:
            return [rng.choice([0, 1, longest, rng.randint(0, longest)]) for _ in range(num_users)]

        case = replace(
            shared,
            lengths=draw(),
            key_lengths=draw() if is_cross else None,
            offsets_dtype=rng.choice([torch.int32, torch.int64]),
            window=rng.choice([*WINDOWS, rng.randint(1, longest + 1)]) if has_window else None,
            scale=rng.choice([None, None, 0.1, 0.5, -0.2]),
            dropout_p=rng.choice([0.1, 0.5, 0.9]) if has_dropout else 0.0,
            slack=rng.choice([0, 1, 300]),
            layout=rng.choice(["contiguous", *LAYOUTS]),
            seed=1000 * seed + i,
        )
        cases.append(case)
    return cases
