"""What is refused of operands and options."""

from __future__ import annotations

from torch import Tensor

from kernels.jagged.launch import MAX_ROW_STRIDE
from kernels.jagged.schedule import Schedule


def check_rows(name: str, x: Tensor, schedule: Schedule) -> None:
    """That x is `(L, C)`, with the rows of the schedule; ValueError."""
    rows = schedule.queries[1]
    if x.dim() != 2 or x.shape[1] > MAX_ROW_STRIDE:
        raise ValueError(f"{name} must have shape (L, C) with C up to {MAX_ROW_STRIDE}, got {tuple(x.shape)}")
    if x.shape[0] != rows:
        raise ValueError(f"{name} has {x.shape[0]} rows, the schedule says {rows}: they must be equal")


def check_option(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    """ValueError that says what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
