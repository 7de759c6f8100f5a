# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernel of two jagged operands whose users differ in length: rows that one of them lacks count as a given value.

It computes its own gradients too: with a result of n rows, dx[i] = dout[i] for an addition and dout[i] y[i] for a
product, where dout counts as zero from row n on and y as in the forward.

Names: see kernels/jagged/tiles.py; BL x BC tiles of rows x columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import Launcher, grid_of
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
from kernels.jagged_elementwise.dense import combine


@triton.jit  # pragma: no cover
def load_side(
    p_x, p_offsets, i_user, total, max_seqlen, i_l, stride, i_c, missing, C: tl.constexpr, BL: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Rows i_l ... of a user of one operand, `missing` where it has no more: (BL, BC) float32."""
    start, n = load_user(p_offsets, i_user, total, max_seqlen)
    b_x = load_columns(p_x + start.to(tl.int64) * stride, i_l, n, stride, i_c, C, BL, BC).to(tl.float32)
    return tl.where((i_l + tl.arange(0, BL) < n)[:, None], b_x, missing)


# Totals and lengths differ in every batch: a kernel specialised on them would be compiled over and over.
@triton.jit(
    do_not_specialize=["x_total", "x_max_seqlen", "y_total", "y_max_seqlen", "x_missing", "y_missing"]
)  # pragma: no cover
def jagged_pair_kernel(
    p_x,  # (x_total, C)
    p_y,  # (y_total, C), not read with OP "first"
    p_out,  # (rows of the result, C), contiguous
    p_tiles,  # (entries, 8), tiles of BL rows of the result
    p_x_offsets,  # (B + 1,)
    p_y_offsets,  # (B + 1,)
    stride_x,
    stride_y,
    x_total,
    x_max_seqlen,
    y_total,
    y_max_seqlen,
    x_missing,
    y_missing,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    OP: tl.constexpr,
):
    """BL rows of the result of one user, BC columns."""
    i_entry, i_c = row_and_columns(C, BC)
    start, n, _, _, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_l = i_tile * BL
    i_user = load_user_index(p_tiles, i_entry)
    b_out = load_side(p_x, p_x_offsets, i_user, x_total, x_max_seqlen, i_l, stride_x, i_c, x_missing, C, BL, BC)
    if OP != "first":
        b_y = load_side(p_y, p_y_offsets, i_user, y_total, y_max_seqlen, i_l, stride_y, i_c, y_missing, C, BL, BC)
        b_out = combine(b_out, b_y, OP)
    store_columns(p_out + start * C, b_out, i_l, n, C, i_c, C, BL, BC)


launch_pair_kernel = Launcher(jagged_pair_kernel, "num_warps")


def launch_pair(
    x: Tensor,
    y: Tensor,
    tiles: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    num_rows: int,
    max_seqlens: tuple[int, int],
    missing: tuple[float, float],
    op: str,
) -> Tensor:
    """`(num_rows, C)` in x's dtype: of every user `x op y`.

    Args:
        x, y: `(rows, C)`, contiguous in the last dimension.
        tiles: `(entries, 8)`, tiles of BLOCK rows of the result.
        x_offsets, y_offsets: `(B + 1,)`.
        num_rows: of the result.
        max_seqlens: of x and of y.
        missing: what a row that x, or y, doesn't have counts as.
        op: "add", "mul", or "first" for x alone.
    """
    C = x.shape[1]
    out = torch.empty((num_rows, C), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or tiles.shape[0] == 0:
        return out
    block = columns_per_tile(C)
    launch_pair_kernel(
        grid_of(tiles, -(-C // block)),
        (),
        (x, y, out, tiles, x_offsets, y_offsets),
        (x.stride(0), y.stride(0)),
        (x.shape[0], max_seqlens[0], y.shape[0], max_seqlens[1], *missing),
        (C, BLOCK, block, op),
        (4,),
    )
    return out
