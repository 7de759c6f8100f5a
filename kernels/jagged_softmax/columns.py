# mypy: allow-untyped-defs, allow-incomplete-defs
"""Softmax over the tokens of a user, a column at a time: one program per user and block of columns.

Users that fit into a block are read once, others twice (by the forward without their last block). The blocks of
columns of a user are neighbours in the grid, so that whole rows are read at about the same time.

Names: see kernels/jagged/tiles.py; C columns, BL x BC a block of rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import LOG2_E, Launcher, next_power_of_2
from kernels.jagged.tile_lists import load_user
from kernels.jagged.tiles import finite_or_zero, inverse_or_zero, load_columns, row_and_columns, store_columns

LONG = 512  # rows; where users may be longer, blocks are taller and programs more


class Block(NamedTuple):
    """What a program has at once."""

    columns: int
    """At most: where there are fewer, a block has more rows instead."""

    elements: int
    num_warps: int
    stages: int = 1
    """Blocks on the chip at once where users have several; of the forward."""


FORWARD, LONG_FORWARD = Block(32, 1024, 1, stages=4), Block(16, 4096, 4, stages=3)
BACKWARD, LONG_BACKWARD = Block(64, 8192, 4), Block(16, 8192, 4)


@triton.jit  # pragma: no cover
def load_scaled(
    p_x, i_l, n, stride_x, i_c, scale_log2, C: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr, EVICTION: tl.constexpr
):
    """Rows in base 2, (BL, BC) float32; zero past row n."""
    return load_columns(p_x, i_l, n, stride_x, i_c, C, BL, BC, EVICTION).to(tl.float32) * scale_log2


@triton.jit(do_not_specialize=["total", "max_seqlen", "scale_log2"])  # pragma: no cover
def jagged_softmax_kernel(
    p_x,  # (L, C)
    p_y,  # (L, C), contiguous
    p_offsets,  # (B + 1,), of rows
    stride_x,
    total,
    max_seqlen,
    scale_log2,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BC columns of one user: full blocks of rows first; the last block is never read again."""
    i_b, i_c = row_and_columns(C, BC)
    start, n = load_user(p_offsets, i_b, total, max_seqlen)
    if n == 0:
        return
    p_x += start.to(tl.int64) * stride_x
    p_y += start.to(tl.int64) * C
    i_last = (n - 1) // BL * BL
    b_max = tl.full([BC], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BC], dtype=tl.float32)
    for i_l in tl.range(0, i_last, BL, num_stages=STAGES):
        b_x = load_scaled(p_x, i_l, i_last, stride_x, i_c, scale_log2, C, BL, BC, "evict_last")
        b_new_max = tl.maximum(b_max, tl.max(b_x, 0))
        b_shift = finite_or_zero(b_new_max)
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_x - b_shift[None, :]), 0)
        b_max = b_new_max
    b_x = load_scaled(p_x, i_last, n, stride_x, i_c, scale_log2, C, BL, BC, "evict_first")
    b_x = tl.where(i_last + tl.arange(0, BL)[:, None] < n, b_x, float("-inf"))
    b_shift = finite_or_zero(tl.maximum(b_max, tl.max(b_x, 0)))
    b_p = tl.exp2(b_x - b_shift[None, :])
    b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(b_p, 0)
    b_norm = inverse_or_zero(b_sum)
    store_columns(p_y, b_p * b_norm[None, :], i_last, n, C, i_c, C, BL, BC)
    for i_l in tl.range(0, i_last, BL, num_stages=STAGES):
        b_x = load_scaled(p_x, i_l, i_last, stride_x, i_c, scale_log2, C, BL, BC, "evict_first")
        store_columns(p_y, tl.exp2(b_x - b_shift[None, :]) * b_norm[None, :], i_l, i_last, C, i_c, C, BL, BC)


@triton.jit  # pragma: no cover
def gradient_at_once(p_y, p_dy, p_dx, n, stride_dy, i_c, scale, C: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr):
    """BC columns of a user of up to BL rows."""
    b_y = load_columns(p_y, 0, n, C, i_c, C, BL, BC).to(tl.float32)
    b_dy = load_columns(p_dy, 0, n, stride_dy, i_c, C, BL, BC).to(tl.float32)
    b_delta = tl.sum(b_y * b_dy, 0)
    store_columns(p_dx, b_y * (b_dy - b_delta[None, :]) * scale, 0, n, C, i_c, C, BL, BC)


@triton.jit(do_not_specialize=["total", "max_seqlen", "scale"])  # pragma: no cover
def jagged_softmax_backward_kernel(
    p_y,  # (L, C), contiguous
    p_dy,  # (L, C)
    p_dx,  # (L, C), contiguous
    p_offsets,  # (B + 1,), of rows
    stride_dy,
    total,
    max_seqlen,
    scale,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
):
    """dx = scale y (dy - sum of y dy over the user's rows), of BC columns of one user."""
    i_b, i_c = row_and_columns(C, BC)
    start, n = load_user(p_offsets, i_b, total, max_seqlen)
    p_y += start.to(tl.int64) * C
    p_dy += start.to(tl.int64) * stride_dy
    p_dx += start.to(tl.int64) * C
    if n <= BL:
        gradient_at_once(p_y, p_dy, p_dx, n, stride_dy, i_c, scale, C, BL, BC)
    else:
        b_delta = tl.zeros([BC], dtype=tl.float32)
        for i_l in range(0, n, BL):
            b_y = load_columns(p_y, i_l, n, C, i_c, C, BL, BC).to(tl.float32)
            b_delta += tl.sum(b_y * load_columns(p_dy, i_l, n, stride_dy, i_c, C, BL, BC).to(tl.float32), 0)
        for i_l in range(0, n, BL):
            b_y = load_columns(p_y, i_l, n, C, i_c, C, BL, BC).to(tl.float32)
            b_dy = load_columns(p_dy, i_l, n, stride_dy, i_c, C, BL, BC).to(tl.float32)
            store_columns(p_dx, b_y * (b_dy - b_delta[None, :]) * scale, i_l, n, C, i_c, C, BL, BC)


launch_kernel = Launcher(jagged_softmax_kernel, "num_warps")
launch_backward_kernel = Launcher(jagged_softmax_backward_kernel, "num_warps")


def _shape(offsets: Tensor, width: int, max_seqlen: int, block: Block) -> tuple[tuple[int], int, int]:
    """Grid, rows and columns of a block."""
    columns = min(next_power_of_2(width), block.columns)
    rows = min(max(next_power_of_2(max(max_seqlen, 1)), 16), block.elements // columns)
    return ((offsets.shape[0] - 1) * -(-width // columns),), rows, columns


def launch_softmax(x: Tensor, offsets: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """`(L, C)`, softmax of `scale x` over every user's rows; x contiguous in the last dimension."""
    L, C = x.shape
    y = torch.empty((L, C), dtype=x.dtype, device=x.device)
    block = FORWARD if max_seqlen <= LONG else LONG_FORWARD
    grid, *shape = _shape(offsets, C, max_seqlen, block)
    if y.numel() == 0 or grid[0] == 0:
        return y
    launch_kernel(
        grid,
        (),
        (x, y, offsets),
        (x.stride(0),),
        (L, max_seqlen, scale * LOG2_E),
        (C, *shape, block.stages),
        (block.num_warps,),
    )
    return y


def launch_softmax_backward(y: Tensor, dy: Tensor, offsets: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """Gradient of x `(L, C)` from that of y; y contiguous, dy contiguous in the last dimension."""
    L, C = y.shape
    dx = torch.empty_like(y)
    block = BACKWARD if max_seqlen <= LONG else LONG_BACKWARD
    grid, *shape = _shape(offsets, C, max_seqlen, block)
    if y.numel() == 0 or grid[0] == 0:
        return dx
    launch_backward_kernel(
        grid,
        (),
        (y, dy, dx, offsets),
        (dy.stride(0),),
        (L, max_seqlen, scale),
        (C, *shape),
        (block.num_warps,),
    )
    return dx
