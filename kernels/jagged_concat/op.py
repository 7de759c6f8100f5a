"""The operators: torch.library custom ops, whose gradients are made of each other, and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.jagged.checks import check_operands, checks_values
from kernels.jagged.launch import is_traced, readable_in_place, require_triton
from kernels.jagged.operator import operator
from kernels.jagged.schedule import Schedule, offsets_of
from kernels.jagged.score_layout import row_tiles
from kernels.jagged_concat.rows import launch_move


def jagged_concat(x: Tensor, y: Tensor, x_schedule: Schedule, y_schedule: Schedule) -> Tensor:
    """Of every user its rows of x, then its rows of y, with gradients for both.

    Args:
        x: `(Lx, C)` or, of several heads, `(Lx, H, D)`; float32, float16 or bfloat16. Strides with a contiguous last
            dimension are read in place, if heads follow each other in a row.
        y: `(Ly, C)` or `(Ly, H, D)`; likewise.
        x_schedule, y_schedule: of the users' rows of x and of y, for the same users.

    Returns:
        `(Lx + Ly, C)` or `(Lx + Ly, H, D)` in the dtype of x; its offsets are the sums of those of x and y.

    Raises:
        ValueError: shapes, dtypes, devices or numbers of users that don't fit.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.
    """
    x_offsets, y_offsets = x_schedule.queries[0], y_schedule.queries[0]
    check_operands({"x": x, "y": y, "x's offsets": x_offsets, "y's offsets": y_offsets}, _OFFSETS)
    _check_rows("x", x, x_schedule.queries[1])
    _check_rows("y", y, y_schedule.queries[1])
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"x and y must differ in their rows only, got {tuple(x.shape)} and {tuple(y.shape)}")
    _check_users(x_schedule, y_schedule)
    require_triton(x.device)
    z = _concat_op(x.flatten(1), y.flatten(1), row_tiles(x_schedule), row_tiles(y_schedule), x_offsets, y_offsets)
    return z.view(z.shape[0], *x.shape[1:])


def jagged_split(z: Tensor, x_schedule: Schedule, y_schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Every user's first rows and its others, the inverse of `jagged_concat`; with its gradient.

    Args:
        z: `(Lx + Ly, C)` or `(Lx + Ly, H, D)`; as for `jagged_concat`.
        x_schedule, y_schedule: of the users' rows in the results.

    Returns:
        x, `(Lx, C)` or `(Lx, H, D)`, and y, `(Ly, C)` or `(Ly, H, D)`.

    Raises:
        As `jagged_concat`.
    """
    (x_offsets, x_total, _), (y_offsets, y_total, _) = x_schedule.queries, y_schedule.queries
    check_operands({"z": z, "x's offsets": x_offsets, "y's offsets": y_offsets}, _OFFSETS)
    _check_rows("z", z, x_total + y_total)
    _check_users(x_schedule, y_schedule)
    require_triton(z.device)
    tiles = row_tiles(x_schedule), row_tiles(y_schedule)
    x, y = _split_op(z.flatten(1), *tiles, x_offsets, y_offsets, x_total, y_total)
    return x.view(x_total, *z.shape[1:]), y.view(y_total, *z.shape[1:])


def jagged_last(x: Tensor, schedule: Schedule, n: int, total: int) -> tuple[Tensor, Tensor]:
    """The last min(n, length) rows of every user, with their gradient.

    Args:
        x: `(L, C)` or, of several heads, `(L, H, D)`; as for `jagged_concat`.
        schedule: of the users' rows; its queries are x.
        n: how many rows.
        total: rows of the result, all users together; a host integer, so that nothing waits for the GPU.

    Returns:
        The rows, `(total, C)` or `(total, H, D)`, and their offsets, `(B + 1,)` in the dtype of the schedule's.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that don't fit; and a wrong total where values are checked (a
            schedule made with `check_values`; on a CPU, or if KERNELS_CHECK_OFFSETS=1).
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.
    """
    x_offsets, x_total, max_seqlen = schedule.queries
    check_operands({"x": x, "offsets": x_offsets}, ("offsets",))
    _check_rows("x", x, x_total)
    if n < 0:
        raise ValueError(f"n must be at least 0 rows, got {n}")
    most = min(x_total, n * schedule.num_users)
    if not 0 <= total <= most:
        raise ValueError(f"total must lie between 0 and {most}, the last {n} rows of every user at most; got {total}")
    require_triton(x.device)
    x_tiles = row_tiles(schedule)
    offsets = offsets_of(x_offsets.diff().clamp(max=n), x_offsets.dtype)
    check_values = schedule.check_values
    if check_values and checks_values(x.device) and not is_traced(x, offsets) and int(offsets[-1]) != total:
        raise ValueError(f"the last {n} rows of every user are {int(offsets[-1])}, not total={total}")
    tiles = row_tiles(Schedule(offsets, total, min(n, max_seqlen), check_values=check_values))
    out = _last_op(x.flatten(1), tiles, x_tiles, offsets, x_offsets, n, total)
    return out.view(total, *x.shape[1:]), offsets


_OFFSETS = ("x's offsets", "y's offsets")


def _check_rows(name: str, x: Tensor, rows: int) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"{name} must have shape (L, C) or (L, H, D), got {tuple(x.shape)}")
    if x.shape[0] != rows:
        raise ValueError(f"{name} has {x.shape[0]} rows, the schedules say {rows}: they must be equal")


def _check_users(x_schedule: Schedule, y_schedule: Schedule) -> None:
    if x_schedule.num_users != y_schedule.num_users:
        raise ValueError(
            f"x and y must have the same users; their schedules have {x_schedule.num_users} and {y_schedule.num_users}"
        )


def _readable(x: Tensor) -> Tensor:
    """As the kernel can read it."""
    return x if readable_in_place(x) else x.contiguous()


# Concatenation and its inverse


@operator("jagged_concat")
def _concat_op(x: Tensor, y: Tensor, x_tiles: Tensor, y_tiles: Tensor, x_offsets: Tensor, y_offsets: Tensor) -> Tensor:
    z = torch.empty((x.shape[0] + y.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    launch_move(_readable(x), z, x_tiles, y_offsets.contiguous(), pull=False)
    launch_move(_readable(y), z, y_tiles, x_offsets.contiguous()[1:], pull=False)
    return z


@_concat_op.register_fake
def _concat_fake(x: Tensor, y: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0] + y.shape[0], x.shape[1]))


@operator("jagged_split")
def _split_op(
    z: Tensor, x_tiles: Tensor, y_tiles: Tensor, x_offsets: Tensor, y_offsets: Tensor, x_total: int, y_total: int
) -> tuple[Tensor, Tensor]:
    z = _readable(z)
    x, y = (torch.empty((rows, z.shape[1]), dtype=z.dtype, device=z.device) for rows in (x_total, y_total))
    launch_move(z, x, x_tiles, y_offsets.contiguous(), pull=True)
    launch_move(z, y, y_tiles, x_offsets.contiguous()[1:], pull=True)
    return x, y


@_split_op.register_fake
def _split_fake(
    z: Tensor, x_tiles: Tensor, y_tiles: Tensor, x_offsets: Tensor, y_offsets: Tensor, x_total: int, y_total: int
) -> tuple[Tensor, Tensor]:
    return z.new_empty((x_total, z.shape[1])), z.new_empty((y_total, z.shape[1]))


def _save_concat(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, y, *where = inputs
    ctx.totals = x.shape[0], y.shape[0]
    ctx.save_for_backward(*where)


def _concat_backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    return *_split_op(dz, *ctx.saved_tensors, *ctx.totals), *[None] * 4


def _save_split(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:5])


def _split_backward(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _concat_op(dx, dy, *ctx.saved_tensors), *[None] * 6


_concat_op.register_autograd(_concat_backward, setup_context=_save_concat)
_split_op.register_autograd(_split_backward, setup_context=_save_split)


# The last rows, and their gradient


@operator("jagged_last")
def _last_op(
    x: Tensor, tiles: Tensor, x_tiles: Tensor, offsets: Tensor, x_offsets: Tensor, n: int, total: int
) -> Tensor:
    out = torch.empty((total, x.shape[1]), dtype=x.dtype, device=x.device)
    own, other = offsets.contiguous()[1:], x_offsets.contiguous()[1:]
    launch_move(_readable(x), out, tiles, other, minus=own, pull=True)
    return out


@_last_op.register_fake
def _last_fake(
    x: Tensor, tiles: Tensor, x_tiles: Tensor, offsets: Tensor, x_offsets: Tensor, n: int, total: int
) -> Tensor:
    return x.new_empty((total, x.shape[1]))


@operator("jagged_last_backward")
def _last_backward_op(
    dout: Tensor, tiles: Tensor, x_tiles: Tensor, offsets: Tensor, x_offsets: Tensor, n: int, x_total: int
) -> Tensor:
    dx = torch.empty((x_total, dout.shape[1]), dtype=dout.dtype, device=dout.device)
    own, other = x_offsets.contiguous()[1:], offsets.contiguous()[1:]
    launch_move(_readable(dout), dx, x_tiles, other, minus=own, pull=True, last=n)
    return dx


@_last_backward_op.register_fake
def _last_backward_fake(
    dout: Tensor, tiles: Tensor, x_tiles: Tensor, offsets: Tensor, x_offsets: Tensor, n: int, x_total: int
) -> Tensor:
    return dout.new_empty((x_total, dout.shape[1]))


def _save_last(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *where, ctx.n, _total = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(*where)


def _last_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _last_backward_op(dout, *ctx.saved_tensors, ctx.n, ctx.num_rows), *[None] * 6


def _last_backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    return _last_op(ddx, *ctx.saved_tensors, ctx.n, ctx.num_rows), *[None] * 6


_last_op.register_autograd(_last_backward, setup_context=_save_last)
_last_backward_op.register_autograd(_last_backward_backward, setup_context=_save_last)
