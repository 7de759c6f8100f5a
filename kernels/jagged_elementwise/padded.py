# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels between jagged rows and a padded tensor; each computes the gradient of the other.

Names: see kernels/jagged/tiles.py; B users, N rows that each has in the padded tensor; BL x BC tiles of rows x columns.
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


@triton.jit(do_not_specialize=["N", "total", "max_seqlen", "fill"])  # pragma: no cover
def jagged_to_padded_kernel(
    p_x,  # (L, C)
    p_out,  # (B, N, C), contiguous
    p_offsets,  # (B + 1,)
    stride_x,
    N,
    total,
    max_seqlen,
    fill,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
):
    """BL of the N rows of one user, BC columns: every tile is there, because all of the result is written."""
    i_tile, i_c = row_and_columns(C, BC)
    i_b = i_tile // tl.cdiv(N, BL)
    i_l = i_tile % tl.cdiv(N, BL) * BL
    start, n = load_user(p_offsets, i_b, total, max_seqlen)
    b_x = load_columns(p_x + start.to(tl.int64) * stride_x, i_l, n, stride_x, i_c, C, BL, BC).to(tl.float32)
    b_x = tl.where((i_l + tl.arange(0, BL) < n)[:, None], b_x, fill)
    store_columns(p_out + i_b.to(tl.int64) * N * C, b_x, i_l, N, C, i_c, C, BL, BC)


@triton.jit(do_not_specialize=["N"])  # pragma: no cover
def padded_to_jagged_kernel(
    p_padded,  # (B, N, C)
    p_out,  # (L, C), contiguous
    p_tiles,  # (entries, 8), tiles of BL rows
    stride_b,
    stride_n,
    N,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
):
    """BL rows of one user, BC columns; zero from row N on."""
    i_entry, i_c = row_and_columns(C, BC)
    start, n, _, _, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_l = i_tile * BL
    p_user = p_padded + load_user_index(p_tiles, i_entry).to(tl.int64) * stride_b
    b_x = load_columns(p_user, i_l, tl.minimum(n, N), stride_n, i_c, C, BL, BC)
    store_columns(p_out + start * C, b_x, i_l, n, C, i_c, C, BL, BC)


launch_to_padded_kernel = Launcher(jagged_to_padded_kernel, "num_warps")
launch_to_jagged_kernel = Launcher(padded_to_jagged_kernel, "num_warps")


def launch_to_padded(x: Tensor, offsets: Tensor, max_seqlen: int, max_length: int, fill: float) -> Tensor:
    """`(B, max_length, C)` in x's dtype.

    Args:
        x: `(L, C)`, contiguous in the last dimension.
        offsets: `(B + 1,)`.
        max_seqlen: at least the longest user's rows.
        max_length, fill: as for `jagged_to_padded`.
    """
    (L, C), B = x.shape, offsets.shape[0] - 1
    out = torch.empty((B, max_length, C), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block = columns_per_tile(C)
    launch_to_padded_kernel(
        (B * -(-max_length // BLOCK) * -(-C // block),),
        (),
        (x, out, offsets),
        (x.stride(0),),
        (max_length, L, max_seqlen, fill),
        (C, BLOCK, block),
        (4,),
    )
    return out


def launch_to_jagged(padded: Tensor, tiles: Tensor, total: int) -> Tensor:
    """`(total, C)` in the dtype of `padded`.

    Args:
        padded: `(B, N, C)`, contiguous in the last dimension.
        tiles: `(entries, 8)`, tiles of BLOCK rows.
        total: rows of all users.
    """
    _, N, C = padded.shape
    out = torch.empty((total, C), dtype=padded.dtype, device=padded.device)
    if out.numel() == 0 or tiles.shape[0] == 0:
        return out
    block = columns_per_tile(C)
    launch_to_jagged_kernel(
        grid_of(tiles, -(-C // block)),
        (),
        (padded, out, tiles),
        padded.stride()[:2],
        (N,),
        (C, BLOCK, block),
        (4,),
    )
    return out
