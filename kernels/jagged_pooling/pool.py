# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels that pool a user's rows to one, and that spread the gradient of this one over the rows.

Names: see kernels/jagged/tiles.py; B users, BL x BC tiles of rows x columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import INTERPRETED, MAX_INT32, Launcher, grid_of
from kernels.jagged.score_layout import BLOCK
from kernels.jagged.tile_lists import load_user
from kernels.jagged.tiles import (
    columns_per_tile,
    load_columns,
    load_entry,
    load_user_index,
    row_and_columns,
    store_columns,
)

NO_ROW = tl.constexpr(MAX_INT32)


@triton.jit  # pragma: no cover
def first_greatest(p_user, n, stride, i_c, C: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr):
    """Of BC columns of a user the greatest value and the first row that has it, both (BC,); a NaN counts as greatest.

    Lane i of BL goes over rows i, i + BL, ...; the lanes are compared at the end. Without rows: -inf and no row.
    """
    o_l = tl.arange(0, BL)[:, None]
    b_value = tl.full([BL, BC], float("-inf"), tl.float32)
    b_row = tl.zeros([BL, BC], dtype=tl.int32) + tl.where(o_l < n, o_l, NO_ROW)  # that of a lane of -inf
    for i_l in range(0, n, BL):
        b_x = load_columns(p_user, i_l, n, stride, i_c, C, BL, BC).to(tl.float32)
        is_greater = ((b_x > b_value) | ((b_x != b_x) & (b_value == b_value))) & (i_l + o_l < n)
        b_value = tl.where(is_greater, b_x, b_value)
        b_row = tl.where(is_greater, i_l + o_l, b_row)
    b_is_nan = b_value != b_value
    greatest = tl.max(tl.where(b_is_nan, float("-inf"), b_value), 0)
    has_nan = tl.max(b_is_nan.to(tl.int32), 0) > 0
    is_greatest = tl.where(has_nan[None, :], b_is_nan, b_value == greatest[None, :])
    first = tl.min(tl.where(is_greatest, b_row, NO_ROW), 0)
    return tl.where(has_nan, float("nan"), greatest), first


@triton.jit(do_not_specialize=["total", "max_seqlen"])  # pragma: no cover
def jagged_pool_kernel(
    p_x,  # (L, C)
    p_out,  # (B, C), contiguous
    p_first,  # (B, C) int32, contiguous; rows that the maximum is taken from, written with MODE "max"
    p_offsets,  # (B + 1,)
    stride_x,
    total,
    max_seqlen,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    MODE: tl.constexpr,
):
    """All rows of one user, BC columns."""
    i_b, i_c = row_and_columns(C, BC)
    start, n = load_user(p_offsets, i_b, total, max_seqlen)
    p_user = p_x + start.to(tl.int64) * stride_x
    o_c = i_c + tl.arange(0, BC)
    o_out = i_b.to(tl.int64) * C + o_c
    if MODE == "max":
        b_out, b_first = first_greatest(p_user, n, stride_x, i_c, C, BL, BC)
        b_out = tl.where(n > 0, b_out, 0.0)
        tl.store(p_first + o_out, b_first, mask=o_c < C)
    else:
        b_acc = tl.zeros([BL, BC], dtype=tl.float32)
        for i_l in range(0, n, BL):
            b_acc += load_columns(p_user, i_l, n, stride_x, i_c, C, BL, BC).to(tl.float32)
        b_out = tl.sum(b_acc, 0)
        if MODE == "mean":
            b_out = b_out / tl.maximum(n, 1).to(tl.float32)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=o_c < C)


@triton.jit  # pragma: no cover
def jagged_pool_backward_kernel(
    p_dout,  # (B, C)
    p_first,  # (B, C) int32, contiguous; read with MODE "max"
    p_dx,  # (L, C), contiguous
    p_tiles,  # (entries, 8), tiles of BL rows
    stride_dout,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    MODE: tl.constexpr,
):
    """BL rows of one user, BC columns."""
    i_entry, i_c = row_and_columns(C, BC)
    start, n, _, _, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_l = i_tile * BL
    i_user = load_user_index(p_tiles, i_entry)
    b_dout = load_columns(p_dout, i_user, i_user + 1, stride_dout, i_c, C, 1, BC).to(tl.float32)
    if MODE == "mean":
        b_dout = b_dout / n.to(tl.float32)
    o_l = i_l + tl.arange(0, BL)[:, None]
    if MODE == "max":
        b_first = load_columns(p_first, i_user, i_user + 1, C, i_c, C, 1, BC)
        b_dx = tl.where(o_l == b_first, b_dout, 0.0)
    else:
        b_dx = tl.where(o_l < n, b_dout, 0.0)
    store_columns(p_dx + start * C, b_dx, i_l, n, C, i_c, C, BL, BC)


class Block(NamedTuple):
    """What a program has at once."""

    rows: int
    columns: int
    """At most."""

    num_warps: int


LONG = 48 if INTERPRETED else 512  # rows; where users may be longer, programs are more and larger
POOL, LONG_POOL = Block(16 if INTERPRETED else 64, 64, 2), Block(32 if INTERPRETED else 256, 16, 8)

launch_pool_kernel = Launcher(jagged_pool_kernel, "num_warps")
launch_backward_kernel = Launcher(jagged_pool_backward_kernel, "num_warps")


def launch_pool(x: Tensor, offsets: Tensor, max_seqlen: int, mode: str) -> tuple[Tensor, Tensor]:
    """`(B, C)` in x's dtype; and for "max" the row within the user that it comes from, `(B, C)` int32, else `(0, C)`.

    Args:
        x: `(L, C)`, contiguous in the last dimension.
        offsets: `(B + 1,)`.
        max_seqlen: at least the longest user's rows.
        mode: as for `jagged_pool`.
    """
    (L, C), B = x.shape, offsets.shape[0] - 1
    out = torch.empty((B, C), dtype=x.dtype, device=x.device)
    first = torch.empty((B if mode == "max" else 0, C), dtype=torch.int32, device=x.device)
    if out.numel() == 0:
        return out, first
    block = POOL if max_seqlen <= LONG else LONG_POOL
    columns = columns_per_tile(C, block.columns)
    launch_pool_kernel(
        (B * -(-C // columns),),
        (),
        (x, out, first, offsets),
        (x.stride(0),),
        (L, max_seqlen),
        (C, block.rows, columns, mode),
        (block.num_warps,),
    )
    return out, first


def launch_pool_backward(dout: Tensor, first: Tensor, tiles: Tensor, total: int, mode: str) -> Tensor:
    """dx, `(total, C)` in dout's dtype.

    Args:
        dout: `(B, C)`, contiguous in the last dimension.
        first: as the forward gave it.
        tiles: `(entries, 8)`, tiles of BLOCK rows.
        total: rows of all users.
        mode: as for `jagged_pool`.
    """
    C = dout.shape[1]
    dx = torch.empty((total, C), dtype=dout.dtype, device=dout.device)
    if dx.numel() == 0 or tiles.shape[0] == 0:
        return dx
    block = columns_per_tile(C)
    launch_backward_kernel(
        grid_of(tiles, -(-C // block)),
        (),
        (dout, first, dx, tiles),
        (dout.stride(0),),
        (),
        (C, BLOCK, block, mode),
        (4,),
    )
    return dx
