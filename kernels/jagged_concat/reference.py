"""What the kernels have to compute, in plain PyTorch, a user at a time. Slow, and easy to believe.

Arguments and results as of the functions in op.py, offsets in place of schedules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jagged_matmul.reference import of_users


def reference_jagged_concat(x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor) -> Tensor:
    """Of every user its rows of x, then its rows of y."""
    pairs = zip(of_users(x, x_offsets), of_users(y, y_offsets), strict=True)
    return torch.cat([x[:0], *[part for pair in pairs for part in pair]])


def reference_jagged_split(z: Tensor, x_offsets: Tensor, y_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Its inverse."""
    ends = torch.stack([x_offsets[1:] + y_offsets[:-1], x_offsets[1:] + y_offsets[1:]], dim=1).flatten()
    parts = of_users(z, torch.cat([ends.new_zeros(1), ends]))
    return torch.cat([z[:0], *parts[::2]]), torch.cat([z[:0], *parts[1::2]])


def reference_jagged_last(x: Tensor, offsets: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The last n rows of every user, all of them if it has no more, and their offsets."""
    parts = [rows[max(len(rows) - n, 0) :] for rows in of_users(x, offsets)]
    lengths = torch.tensor([0, *map(len, parts)], dtype=offsets.dtype, device=offsets.device)
    return torch.cat([x[:0], *parts]), lengths.cumsum(0, dtype=offsets.dtype)
