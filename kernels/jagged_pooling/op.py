"""The operator: torch.library custom ops for forward and backward, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.jagged.checks import check_matrix, check_operands, check_option
from kernels.jagged.launch import readable, require_triton
from kernels.jagged.operator import operator
from kernels.jagged.schedule import Schedule
from kernels.jagged.score_layout import row_tiles
from kernels.jagged_pooling.pool import launch_pool, launch_pool_backward

MODES = ("sum", "mean", "max")


def jagged_pool(x: Tensor, schedule: Schedule, mode: str = "sum") -> Tensor:
    """Sum, mean or maximum of every user's rows, with its gradient.

    Args:
        x: `(L, C)`, float32, float16 or bfloat16. Strides with a contiguous last dimension are read in place.
        schedule: of the users' rows; its queries are x.
        mode: "sum", "mean" or "max". The gradient of a maximum goes to the first row that has it.

    Returns:
        `(B, C)` in the dtype of x; sums are float32 whatever that is. Zero for users without rows. The same inputs give
        the same bits, gradients included.

    Raises:
        ValueError: shapes, dtypes, devices or a mode that don't fit.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.
    """
    offsets, total, max_seqlen = schedule.queries
    check_operands({"x": x, "offsets": offsets}, index_vectors=("offsets",))
    check_matrix("x", x, total)
    check_option("mode", mode, MODES)
    require_triton(x.device)
    tiles = row_tiles(schedule)
    out, _ = _pool_op(x, tiles, offsets, max_seqlen, mode)
    return out


@operator("jagged_pool")
def _pool_op(x: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, mode: str) -> tuple[Tensor, Tensor]:
    out, first = launch_pool(readable(x), offsets.contiguous(), max_seqlen, mode)
    return out.to(x.dtype), first


@_pool_op.register_fake
def _pool_fake(x: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, mode: str) -> tuple[Tensor, Tensor]:
    num_users, C = offsets.shape[0] - 1, x.shape[1]
    return x.new_empty((num_users, C)), x.new_empty((num_users if mode == "max" else 0, C), dtype=torch.int32)


@operator("jagged_pool_backward")
def _pool_backward_op(dout: Tensor, first: Tensor, tiles: Tensor, total: int, mode: str) -> Tensor:
    return launch_pool_backward(readable(dout), first, tiles, total, mode).to(dout.dtype)


@_pool_backward_op.register_fake
def _pool_backward_fake(dout: Tensor, first: Tensor, tiles: Tensor, total: int, mode: str) -> Tensor:
    return dout.new_empty((total, dout.shape[1]))


def _save_pool(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, tiles, _offsets, _max_seqlen, ctx.mode = inputs
    ctx.total = x.shape[0]
    ctx.save_for_backward(output[1], tiles)


def _pool_backward(ctx: Any, dout: Tensor, _dfirst: Tensor | None) -> tuple[Tensor | None, ...]:
    return _pool_backward_op(dout, *ctx.saved_tensors, ctx.total, ctx.mode), *[None] * 4


_pool_op.register_autograd(_pool_backward, setup_context=_save_pool)
