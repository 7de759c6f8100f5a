"""Between jagged and padded: torch.library custom ops, each the gradient of the other, and the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.jagged.checks import check_matrix, check_operands
from kernels.jagged.launch import MAX_ROW_STRIDE, readable, require_triton
from kernels.jagged.operator import operator
from kernels.jagged.schedule import Schedule
from kernels.jagged.score_layout import row_tiles
from kernels.jagged_elementwise.padded import launch_to_jagged, launch_to_padded


def jagged_to_padded(x: Tensor, schedule: Schedule, max_length: int | None = None, fill: float = 0.0) -> Tensor:
    """The rows of every user, filled up to one length; with its gradient.

    Args:
        x: `(L, C)`, float32, float16 or bfloat16. Strides with a contiguous last dimension are read in place.
        schedule: of the users' rows; its queries are x.
        max_length: N, rows of every user in the result; longer users lose the rows from N on. None: the schedule's
            max_seqlen.
        fill: value of the rows that a user doesn't have.

    Returns:
        `(B, N, C)` in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that don't fit.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.

    The same as `torch.ops.fbgemm.jagged_to_padded_dense`.
    """
    check_operands({"x": x, "offsets": schedule.queries[0]}, index_vectors=("offsets",))
    check_matrix("x", x, schedule.queries[1])
    offsets, _, max_seqlen = schedule.queries
    max_length = max_seqlen if max_length is None else max_length
    if max_length < 0:
        raise ValueError(f"max_length must be at least 0 rows, got {max_length}")
    require_triton(x.device)
    tiles = row_tiles(schedule)
    return _to_padded_op(x, tiles, offsets, max_seqlen, max_length, float(fill))


def padded_to_jagged(x: Tensor, schedule: Schedule) -> Tensor:
    """As many rows of every user as it has, one user after another; with its gradient.

    Args:
        x: `(B, N, C)`, float32, float16 or bfloat16. Strides with a contiguous last dimension are read in place.
        schedule: of the users' rows in the result.

    Returns:
        `(L, C)` in the dtype of x, L the schedule's total. A user with more than N rows has zero from row N on.

    Raises:
        As `jagged_to_padded`.

    The same as `torch.ops.fbgemm.dense_to_jagged`, for one jagged dimension.
    """
    offsets, total, max_seqlen = schedule.queries
    check_operands({"x": x, "offsets": offsets}, index_vectors=("offsets",))
    if x.dim() != 3 or x.shape[0] != schedule.num_users or x.shape[2] > MAX_ROW_STRIDE:
        raise ValueError(
            f"x must have shape ({schedule.num_users}, N, C), {schedule.num_users} users and C up to {MAX_ROW_STRIDE}; "
            f"got {tuple(x.shape)}"
        )
    require_triton(x.device)
    tiles = row_tiles(schedule)
    return _to_jagged_op(x, tiles, offsets, max_seqlen, total)


@operator("jagged_to_padded")
def _to_padded_op(x: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, max_length: int, fill: float) -> Tensor:
    return launch_to_padded(readable(x), offsets.contiguous(), max_seqlen, max_length, fill).to(x.dtype)


@_to_padded_op.register_fake
def _to_padded_fake(x: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, max_length: int, *_: object) -> Tensor:
    return x.new_empty((offsets.shape[0] - 1, max_length, x.shape[1]))


@operator("padded_to_jagged")
def _to_jagged_op(padded: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, total: int) -> Tensor:
    in_place = padded.stride(2) == 1 and padded.stride(1) <= MAX_ROW_STRIDE
    return launch_to_jagged(padded if in_place else padded.contiguous(), tiles, total)


@_to_jagged_op.register_fake
def _to_jagged_fake(padded: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, total: int) -> Tensor:
    return padded.new_empty((total, padded.shape[2]))


def _save_to_padded(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, tiles, offsets, ctx.max_seqlen, _max_length, _fill = inputs
    ctx.total = x.shape[0]
    ctx.save_for_backward(tiles, offsets)


def _to_padded_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _to_jagged_op(dout, *ctx.saved_tensors, ctx.max_seqlen, ctx.total), *[None] * 5


def _save_to_jagged(ctx: Any, inputs: tuple, output: Tensor) -> None:
    padded, tiles, offsets, ctx.max_seqlen, _total = inputs
    ctx.max_length = padded.shape[1]
    ctx.save_for_backward(tiles, offsets)


def _to_jagged_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _to_padded_op(dout, *ctx.saved_tensors, ctx.max_seqlen, ctx.max_length, 0.0), *[None] * 4


_to_padded_op.register_autograd(_to_padded_backward, setup_context=_save_to_padded)
_to_jagged_op.register_autograd(_to_jagged_backward, setup_context=_save_to_jagged)
