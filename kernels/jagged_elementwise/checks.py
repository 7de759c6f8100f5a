"""What is refused of operands."""

from __future__ import annotations

from torch import Tensor

from kernels.jagged.checks import check_rows
from kernels.jagged.launch import MAX_ROW_STRIDE
from kernels.jagged.schedule import Schedule


def check_matrix(name: str, x: Tensor, schedule: Schedule) -> None:
    """That x is `(L, C)`, with the rows of the schedule; ValueError."""
    if x.dim() != 2 or x.shape[1] > MAX_ROW_STRIDE:
        raise ValueError(f"{name} must have shape (L, C) with C up to {MAX_ROW_STRIDE}, got {tuple(x.shape)}")
    check_rows(name, x, schedule.queries[1])
