"""The operators of two tensors: torch.library custom ops with their gradients, and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.jagged.checks import check_dropout, check_matrix, check_operands, check_option, checks_values
from kernels.jagged.launch import is_traced, readable, require_triton
from kernels.jagged.operator import operator
from kernels.jagged.schedule import Schedule, offsets_of
from kernels.jagged.score_layout import row_tiles
from kernels.jagged_elementwise.dense import launch_dense_elementwise, launch_dense_elementwise_backward
from kernels.jagged_elementwise.pair import launch_pair

OPS = ("add", "mul")
ACTIVATIONS = (None, "relu", "silu", "gelu")
LENGTHS = ("equal", "shorter", "longer")
NEUTRAL = {"add": 0.0, "mul": 1.0}


def jagged_dense_elementwise(
    x: Tensor,
    dense: Tensor,
    schedule: Schedule,
    *,
    op: str = "add",
    activation: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`dropout(activation(x op dense[user]))`: every token meets the dense row of its user; gradients for both.

    Args:
        x: `(L, C)`, float32, float16 or bfloat16. Strides with a contiguous last dimension are read in place.
        dense: `(B, C)`, a row for every user; likewise.
        schedule: of the users' rows; its queries are x.
        op: "add" or "mul".
        activation: None, "relu", "silu", or "gelu", the exact one with the error function.
        dropout_p: probability, 0 <= p < 1, of dropping an element; those kept are divided by 1 - p.
        seed: `(1,)` int64 on the same device: the dropped elements follow from it (`dropout_mask`). None: drawn from
            torch's generator of the device.

    Returns:
        `(L, C)` in the dtype of x; computed in float32 whatever that is. The gradient of dense is a float32 sum over
        the user's rows, zero for users without rows. The same inputs give the same bits, gradients included.

    Raises:
        ValueError: shapes, dtypes, devices or options that don't fit.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.
    """
    check_operands({"x": x, "dense": dense, "offsets": schedule.queries[0]}, index_vectors=("offsets",))
    check_matrix("x", x, schedule.queries[1])
    if dense.shape != (schedule.num_users, x.shape[1]):
        raise ValueError(
            f"dense must have shape {(schedule.num_users, x.shape[1])}, a row for every user with the columns of x; "
            f"got {tuple(dense.shape)}"
        )
    check_option("op", op, OPS)
    check_option("activation", activation, ACTIVATIONS)
    check_dropout(dropout_p, seed, x.device)
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (1,), device=x.device)
    offsets, _, max_seqlen = schedule.queries
    require_triton(x.device)
    tiles = row_tiles(schedule)
    return _dense_op(x, dense, tiles, offsets, seed, max_seqlen, op, activation or "none", float(dropout_p))


def jagged_jagged_elementwise(
    x: Tensor,
    y: Tensor,
    x_schedule: Schedule,
    y_schedule: Schedule,
    *,
    op: str = "add",
    lengths: str = "equal",
    total: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Of every user `x_b op y_b`, row i with row i, with gradients for both.

    What happens where a user's lengths differ, here x of 2 rows and y of 3:

        "shorter"       "longer"
        x0 op y0        x0 op y0
        x1 op y1        x1 op y1
                        y2              the missing row counts as 0 in a sum, as 1 in a product

    Args:
        x: `(Lx, C)`, float32, float16 or bfloat16. Strides with a contiguous last dimension are read in place.
        y: `(Ly, C)`; likewise.
        x_schedule, y_schedule: of the users' rows of x and of y, for the same users.
        op: "add" or "mul".
        lengths: "equal": every user has as many rows of x as of y, and the result is a plain torch expression, no
            kernel; "shorter" and "longer": as above.
        total: rows of the result, all users together; a host integer, so that nothing waits for the GPU. Needed unless
            the lengths are equal.
        max_seqlen: at least the longest user of the result; None: what the schedules say.

    Returns:
        The values, `(total, C)` in the dtype of x, computed in float32 unless the lengths are equal; and their offsets,
        `(B + 1,)` in the dtype of x's offsets.

    Raises:
        ValueError: shapes, dtypes, devices or options that don't fit; and, where values are checked (a schedule made
            with `check_values`; on a CPU, or if KERNELS_CHECK_OFFSETS=1), lengths that are not equal, or a total or
            max_seqlen that is wrong. With "equal" they are not checked while torch.compile or torch.export records.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting; not with "equal".
    """
    (x_offsets, x_total, x_max_seqlen), (y_offsets, y_total, y_max_seqlen) = x_schedule.queries, y_schedule.queries
    check_operands(
        {"x": x, "y": y, "x's offsets": x_offsets, "y's offsets": y_offsets},
        index_vectors=("x's offsets", "y's offsets"),
    )
    check_matrix("x", x, x_schedule.queries[1])
    check_matrix("y", y, y_schedule.queries[1])
    if x.shape[1] != y.shape[1] or x_schedule.num_users != y_schedule.num_users:
        raise ValueError(
            f"x and y must have the same columns and users; got {x.shape[1]} and {y.shape[1]} columns, "
            f"{x_schedule.num_users} and {y_schedule.num_users} users"
        )
    check_option("op", op, OPS)
    check_option("lengths", lengths, LENGTHS)
    check_values = x_schedule.check_values or y_schedule.check_values
    if lengths == "equal":
        if x_total != y_total or total not in (None, x_total):
            raise ValueError(
                f'with lengths="equal" x, y and the result must have equally many rows; got {x_total}, {y_total} and '
                f"total={total}"
            )
        if check_values and checks_values(x.device) and not is_traced(x, y, x_offsets, y_offsets):
            _check_equal(x_offsets, y_offsets)
        return (x + y if op == "add" else x * y), x_offsets
    if total is None:
        raise ValueError(f'lengths="{lengths}" needs total, the rows of the result')
    low, high = (0, min(x_total, y_total)) if lengths == "shorter" else (max(x_total, y_total), x_total + y_total)
    if not low <= total <= high:
        raise ValueError(
            f'with lengths="{lengths}" total must lie between {low} and {high}, as x has {x_total} rows and y has '
            f"{y_total}; got {total}"
        )
    if max_seqlen is None:
        max_seqlen = (min if lengths == "shorter" else max)(x_max_seqlen, y_max_seqlen)
    require_triton(x.device)
    x_tiles, y_tiles = row_tiles(x_schedule), row_tiles(y_schedule)
    choose = torch.minimum if lengths == "shorter" else torch.maximum
    offsets = offsets_of(choose(x_offsets.diff(), y_offsets.diff()), x_offsets.dtype)
    if check_values and checks_values(x.device) and not is_traced(x, y, offsets) and int(offsets[-1]) != total:
        raise ValueError(f'lengths="{lengths}" makes {int(offsets[-1])} rows, not total={total}')
    tiles = row_tiles(Schedule(offsets, total, max_seqlen, check_values=check_values))
    values = _pair_op(
        x, y, tiles, x_tiles, y_tiles, offsets, x_offsets, y_offsets, total, max_seqlen, x_max_seqlen, y_max_seqlen,
        NEUTRAL[op], NEUTRAL[op], op,
    )  # fmt: skip
    return values, offsets


def _check_equal(x_offsets: Tensor, y_offsets: Tensor) -> None:
    x_lengths, y_lengths = x_offsets.diff().tolist(), y_offsets.diff().tolist()
    for user, (n, m) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        if n != m:
            raise ValueError(
                f'user {user} has {n} rows of x and {m} of y, with lengths="equal" they must agree; or pass "shorter" '
                'or "longer"'
            )


# Jagged with dense


@operator("jagged_dense_elementwise")
def _dense_op(
    x: Tensor,
    dense: Tensor,
    tiles: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    op: str,
    activation: str,
    dropout_p: float,
) -> Tensor:
    return launch_dense_elementwise(readable(x), readable(dense), tiles, seed, op, activation, dropout_p).to(x.dtype)


@_dense_op.register_fake
def _dense_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@operator("jagged_dense_elementwise_backward")
def _dense_backward_op(
    dout: Tensor,
    x: Tensor | None,
    dense: Tensor | None,
    tiles: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    op: str,
    activation: str,
    dropout_p: float,
    needs_dx: bool,
    needs_ddense: bool,
) -> tuple[Tensor, Tensor]:
    dx, ddense = launch_dense_elementwise_backward(
        readable(dout), None if x is None else readable(x), None if dense is None else readable(dense), tiles,
        offsets.contiguous(), seed, max_seqlen, op, activation, dropout_p, needs_dx, needs_ddense,
    )  # fmt: skip
    return dx.to(dout.dtype), ddense.to(dout.dtype)


@_dense_backward_op.register_fake
def _dense_backward_fake(
    dout: Tensor, x: Tensor | None, dense: Tensor | None, tiles: Tensor, offsets: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    needs_dx, needs_ddense = options[-2:]
    C, num_users = dout.shape[1], offsets.shape[0] - 1
    return dout.new_empty((dout.shape[0] if needs_dx else 0, C)), dout.new_empty((num_users if needs_ddense else 0, C))


def _save_dense(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, dense, tiles, offsets, seed, *ctx.options = inputs
    _, op, activation, _ = ctx.options
    if op == "add" and activation == "none":
        x = dense = None  # the gradients of a sum don't depend on it
    ctx.save_for_backward(x, dense, tiles, offsets, seed)


def _dense_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    _, op, activation, dropout_p = ctx.options
    needs_dx, needs_ddense = ctx.needs_input_grad[:2]
    is_sum = op == "add" and activation == "none" and dropout_p == 0.0
    dx, ddense = dout, None
    if needs_ddense or not is_sum:
        kernel_needs_dx = needs_dx and not is_sum  # there dx is dout
        made, ddense = _dense_backward_op(dout, *ctx.saved_tensors, *ctx.options, kernel_needs_dx, needs_ddense)
        dx = made if kernel_needs_dx else dout
    return dx if needs_dx else None, ddense if needs_ddense else None, *[None] * 7


_dense_op.register_autograd(_dense_backward, setup_context=_save_dense)


# Jagged with jagged


@operator("jagged_pair")
def _pair_op(
    x: Tensor,
    y: Tensor,
    tiles: Tensor,
    x_tiles: Tensor,
    y_tiles: Tensor,
    offsets: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    total: int,
    max_seqlen: int,
    x_max_seqlen: int,
    y_max_seqlen: int,
    x_missing: float,
    y_missing: float,
    op: str,
) -> Tensor:
    return launch_pair(
        readable(x), readable(y), tiles, x_offsets.contiguous(), y_offsets.contiguous(), total,
        (x_max_seqlen, y_max_seqlen), (x_missing, y_missing), op,
    ).to(x.dtype)  # fmt: skip


@_pair_op.register_fake
def _pair_fake(
    x: Tensor,
    y: Tensor,
    tiles: Tensor,
    x_tiles: Tensor,
    y_tiles: Tensor,
    offsets: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    total: int,
    *_: object,
) -> Tensor:
    return x.new_empty((total, x.shape[1]))


def _save_pair(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, y, *where = inputs[:8]
    ctx.num_rows = x.shape[0], y.shape[0]
    _, ctx.max_seqlen, ctx.x_max_seqlen, ctx.y_max_seqlen, ctx.x_missing, ctx.y_missing, ctx.op = inputs[8:]
    if ctx.op != "mul":
        x = y = None  # the gradients of a sum don't depend on it
    ctx.save_for_backward(x, y, *where)


def _pair_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, y, tiles, x_tiles, y_tiles, offsets, x_offsets, y_offsets = ctx.saved_tensors
    dx = dy = None
    op = "mul" if ctx.op == "mul" else "first"  # a sum hands on dout
    if ctx.needs_input_grad[0]:
        dx = _pair_op(
            dout, dout if y is None else y, x_tiles, tiles, y_tiles, x_offsets, offsets, y_offsets, ctx.num_rows[0],
            ctx.x_max_seqlen, ctx.max_seqlen, ctx.y_max_seqlen, 0.0, ctx.y_missing, op,
        )  # fmt: skip
    if ctx.needs_input_grad[1] and ctx.op != "first":
        dy = _pair_op(
            dout, dout if x is None else x, y_tiles, tiles, x_tiles, y_offsets, offsets, x_offsets, ctx.num_rows[1],
            ctx.y_max_seqlen, ctx.max_seqlen, ctx.x_max_seqlen, 0.0, ctx.x_missing, op,
        )  # fmt: skip
    return dx, dy, *[None] * 13


_pair_op.register_autograd(_pair_backward, setup_context=_save_pair)
