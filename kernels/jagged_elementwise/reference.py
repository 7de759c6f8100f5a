"""What the kernels have to compute, in plain PyTorch. Slow, and easy to believe.

Arguments and results as of the functions in op.py, offsets in place of schedules; computed in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.jagged_matmul.reference import of_users

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}
NEUTRAL = {"add": 0.0, "mul": 1.0}


def combine(a: Tensor, b: Tensor, op: str) -> Tensor:
    """`a + b` or `a * b`."""
    return a + b if op == "add" else a * b


def reference_jagged_dense_elementwise(
    x: Tensor,
    dense: Tensor,
    offsets: Tensor,
    *,
    op: str = "add",
    activation: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`dropout(activation(x op dense[user]))`."""
    rows = dense.repeat_interleave(offsets.diff().long(), dim=0)
    out = ACTIVATIONS[activation](combine(x, rows, op))
    if dropout_p > 0.0:
        assert seed is not None
        out = out * dropout_mask(seed, x.shape[0], x.shape[1], dropout_p) / (1.0 - dropout_p)
    return out


def reference_jagged_jagged_elementwise(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, *, op: str = "add", lengths: str = "equal"
) -> Tensor:
    """Of every user `x_b op y_b`, the longer one cut off or the shorter one continued by neutral rows."""
    parts = []
    for own, other in zip(of_users(x, x_offsets), of_users(y, y_offsets), strict=True):
        if lengths == "equal":
            assert own.shape == other.shape
        n = min(len(own), len(other)) if lengths == "shorter" else max(len(own), len(other))
        own, other = (torch.cat([part, part.new_full((n, part.shape[1]), NEUTRAL[op])])[:n] for part in (own, other))
        parts.append(combine(own, other, op))
    return torch.cat([x[:0], *parts])


def reference_jagged_to_padded(x: Tensor, offsets: Tensor, max_length: int, fill: float = 0.0) -> Tensor:
    """The first max_length rows of every user, and `fill` where it has fewer."""
    padded = [
        torch.cat([rows[:max_length], rows.new_full((max(max_length - len(rows), 0), x.shape[1]), fill)])
        for rows in of_users(x, offsets)
    ]
    return torch.stack(padded) if padded else x[:, None].expand(0, max_length, x.shape[1])


def reference_padded_to_jagged(padded: Tensor, offsets: Tensor) -> Tensor:
    """As many rows of every user as it has; zero past the end of `padded`."""
    parts = []
    for rows, n in zip(padded, offsets.diff().tolist(), strict=True):
        parts.append(torch.cat([rows[:n], rows.new_zeros(max(n - len(rows), 0), padded.shape[2])]))
    return torch.cat([padded[:0].flatten(0, 1), *parts])


def dropout_mask(seed: Tensor, num_rows: int, num_columns: int, dropout_p: float) -> Tensor:
    """Which elements dropout keeps: bool, `(num_rows, num_columns)`.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) makes four words of a counter and
    the key `seed`: they serve four neighbours in a row. A row has q = ceil(num_columns / 4) counters; that of element
    (i, j) is (low, high, 0, 0) with the 32-bit halves of the number i q + j // 4, its word is j % 4, and it is kept if
    this word is at least dropout_p · 2^32. If 4 divides num_columns, the number is the flat index divided by 4.

    Args:
        seed: `(1,)` int64.
        num_rows, num_columns: of the matrix.
        dropout_p: probability of dropping an element.
    """
    low = 0xFFFFFFFF
    counters_per_row = -(-num_columns // 4)
    counter = torch.arange(num_rows * counters_per_row, device=seed.device)
    c0, c1 = counter & low, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & low, (seed >> 32) & low

    def high(a: int, b: Tensor) -> Tensor:  # of the 64-bit product
        return ((a * b) >> 32) & low

    for _ in range(10):
        c0, c1, c2, c3 = (
            high(0xCD9E8D57, c2) ^ c1 ^ k0,
            (0xCD9E8D57 * c2) & low,
            high(0xD2511F53, c0) ^ c3 ^ k1,
            (0xD2511F53 * c0) & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack([c0, c1, c2, c3], dim=1).view(num_rows, 4 * counters_per_row)
    return words[:, :num_columns] >= int(dropout_p * 2**32)
