"""What the kernels have to compute, in plain PyTorch, a user at a time. Slow, and easy to believe."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_jagged_pool(x: Tensor, offsets: Tensor, mode: str = "sum") -> Tensor:
    """As `jagged_pool`, offsets in place of the schedule; computed in the dtype of x."""
    lengths = offsets.diff().tolist()
    if not lengths:
        return x
    return torch.stack([_pool(rows, mode) for rows in x.split(lengths)])


def _pool(rows: Tensor, mode: str) -> Tensor:
    if mode == "max" and len(rows) > 0:
        first = (rows == rows.amax(dim=0)).int().argmax(dim=0)  # argmax takes the first of equals
        return rows.gather(0, first[None])[0]
    return rows.mean(dim=0) if mode == "mean" and len(rows) > 0 else rows.sum(dim=0)
