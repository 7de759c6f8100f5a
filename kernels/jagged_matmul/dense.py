# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of a jagged and a dense operand or result: rows of a user x its matrix, and a user's rows x its rows.

Names: see kernels/jagged/tiles.py; K columns of x, M x N a user's matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import INTERPRETED, Launcher, grid_of, next_power_of_2
from kernels.jagged.partial_sums import launch_partial_sums, new_partial_sums, slot_of
from kernels.jagged.score_layout import BLOCK
from kernels.jagged.tile_lists import load_user
from kernels.jagged.tiles import load_columns, load_entry, load_user_index, store_columns

MIN_WIDTH, MAX_WIDTH = 16, 64  # columns of a tile
DENSE_WARPS, JAGGED_WARPS = 2, 4
PART_ROWS = 32 if INTERPRETED else 512  # of a user that several programs share
SHARE_ABOVE = 4 * PART_ROWS  # rows; where users may be longer, they are
LONG = 48 if INTERPRETED else 512  # rows; where users may be longer, a program has more rows on the chip at once
LONG_ROWS = 64 if INTERPRETED else 128
MAX_LONG_BYTES = 256  # of a row of x and one of y: three tiles of them fit into the 99 KB of the smallest GPUs


@triton.jit  # pragma: no cover
def jagged_dense_bmm_kernel(
    p_x,  # (L, H, K)
    p_w,  # (B, H, K, N)
    p_out,  # (L, H, N), contiguous
    p_tiles,  # (entries, 8), tiles of BL rows
    stride_xl,
    stride_xh,
    stride_wb,
    stride_wh,
    stride_wk,
    stride_wn,
    H: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BL rows of one user and head, BN columns."""
    pid = tl.program_id(0)
    i_h = (pid % H).to(tl.int64)
    i_entry = pid // H
    start, n, _, _, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_l = i_tile * BL
    i_n = tl.program_id(1) * BN
    p_x += start * stride_xl + i_h * stride_xh
    p_w += load_user_index(p_tiles, i_entry).to(tl.int64) * stride_wb + i_h * stride_wh
    o_k, o_n = tl.arange(0, BK)[:, None], i_n + tl.arange(0, BN)[None, :]
    b_acc = tl.zeros([BL, BN], dtype=tl.float32)
    for i_k in range(0, K, BK):
        b_x = load_columns(p_x, i_l, n, stride_xl, i_k, K, BL, BK)
        p_part = p_w + (i_k + o_k).to(tl.int64) * stride_wk + o_n.to(tl.int64) * stride_wn
        b_w = tl.load(p_part, mask=(i_k + o_k < K) & (o_n < N), other=0.0)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    store_columns(p_out + (start * H + i_h) * N, b_acc, i_l, n, H * N, i_n, N, BL, BN)


@triton.jit  # pragma: no cover
def product_of_rows(
    p_x, p_y, i_first, end, stride_xl, stride_yl, i_m, i_n, M: tl.constexpr, N: tl.constexpr, BL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x^T y of rows i_first ... end of a user and head, (BM, BN) float32."""
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for i_l in range(i_first, end, BL):
        b_x = load_columns(p_x, i_l, end, stride_xl, i_m, M, BL, BM)
        b_y = load_columns(p_y, i_l, end, stride_yl, i_n, N, BL, BN)
        b_acc = tl.dot(tl.trans(b_x), b_y, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit  # pragma: no cover
def store_matrix(p_matrix, b_acc, i_m, i_n, M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Write (BM, BN) of a matrix, as far as it goes."""
    o_m, o_n = i_m + tl.arange(0, BM)[:, None], i_n + tl.arange(0, BN)[None, :]
    tl.store(p_matrix + (o_m * N + o_n), b_acc.to(p_matrix.dtype.element_ty), mask=(o_m < M) & (o_n < N))


@triton.jit(do_not_specialize=["total", "max_seqlen"])  # pragma: no cover
def jagged_jagged_bmm_kernel(
    p_x,  # (L, H, M)
    p_y,  # (L, H, N)
    p_out,  # (B, H, M, N), contiguous
    p_offsets,  # (B + 1,), of rows
    stride_xl,
    stride_xh,
    stride_yl,
    stride_yh,
    total,
    max_seqlen,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM x BN of the matrix of one user and head, over all of the user's rows."""
    pid = tl.program_id(0)
    i_h = (pid % H).to(tl.int64)
    i_b = pid // H
    i_m = tl.program_id(1) // tl.cdiv(N, BN) * BM
    i_n = tl.program_id(1) % tl.cdiv(N, BN) * BN
    start, n = load_user(p_offsets, i_b, total, max_seqlen)
    p_x += start.to(tl.int64) * stride_xl + i_h * stride_xh
    p_y += start.to(tl.int64) * stride_yl + i_h * stride_yh
    b_acc = product_of_rows(p_x, p_y, 0, n, stride_xl, stride_yl, i_m, i_n, M, N, BL, BM, BN, PRECISION)
    store_matrix(p_out + (i_b.to(tl.int64) * H + i_h) * M * N, b_acc, i_m, i_n, M, N, BM, BN)


@triton.jit  # pragma: no cover
def jagged_jagged_bmm_parts_kernel(
    p_x,  # (L, H, M)
    p_y,  # (L, H, N)
    p_parts,  # (slots, H, M, N) float32
    p_tiles,  # (entries, 8), tiles of BL rows
    stride_xl,
    stride_xh,
    stride_yl,
    stride_yh,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BL: tl.constexpr,
    ROWS: tl.constexpr,  # of a part
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM x BN of the matrix of one user and head, over ROWS of the user's rows, by the program of their first tile."""
    pid = tl.program_id(0)
    i_h = (pid % H).to(tl.int64)
    i_entry = pid // H
    start, n, _, _, i_tile, _ = load_entry(p_tiles, i_entry)
    if (n == 0) | (i_tile % (ROWS // BL) != 0):
        return
    i_m = tl.program_id(1) // tl.cdiv(N, BN) * BM
    i_n = tl.program_id(1) % tl.cdiv(N, BN) * BN
    p_x += start * stride_xl + i_h * stride_xh
    p_y += start * stride_yl + i_h * stride_yh
    i_first = i_tile * BL
    end = tl.minimum(i_first + ROWS, n)
    b_acc = product_of_rows(p_x, p_y, i_first, end, stride_xl, stride_yl, i_m, i_n, M, N, BL, BM, BN, PRECISION)
    i_slot = slot_of(start, load_user_index(p_tiles, i_entry), i_first // ROWS, ROWS)
    store_matrix(p_parts + (i_slot * H + i_h) * M * N, b_acc, i_m, i_n, M, N, BM, BN)


launch_dense_kernel = Launcher(jagged_dense_bmm_kernel, "num_warps")
launch_jagged_kernel = Launcher(jagged_jagged_bmm_kernel, "num_warps")
launch_parts_kernel = Launcher(jagged_jagged_bmm_parts_kernel, "num_warps")


def _block_of(width: int) -> int:
    return min(max(next_power_of_2(width), MIN_WIDTH), MAX_WIDTH)


def launch_dense_bmm(x: Tensor, w: Tensor, tiles: Tensor, precision: str) -> Tensor:
    """`(L, H, N)` in x's dtype: of every user `x w`.

    Args:
        x: `(L, H, K)`, contiguous in the last dimension.
        w: `(B, H, K, N)`, any strides.
        tiles: `(entries, 8)`, tiles of BLOCK rows.
        precision: as for `jagged_dense_bmm`.
    """
    L, H, K = x.shape
    N = w.shape[3]
    out = x.new_empty((L, H, N))
    if out.numel() == 0 or tiles.shape[0] == 0:
        return out
    block = _block_of(N)
    launch_dense_kernel(
        (*grid_of(tiles, H), -(-N // block)),
        (),
        (x, w, out, tiles),
        (*x.stride()[:2], *w.stride()),
        (),
        (H, K, N, BLOCK, _block_of(K), block, precision),
        (DENSE_WARPS,),
    )
    return out


def launch_jagged_bmm(x: Tensor, y: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, precision: str) -> Tensor:
    """`(B, H, M, N)` in x's dtype: of every user `x^T y`.

    A program per user; or, where users may be longer than SHARE_ABOVE, one per part of a user.

    Args:
        x, y: `(L, H, M)`, `(L, H, N)`, contiguous in the last dimension.
        tiles: `(entries, 8)`, tiles of BLOCK rows.
        offsets: `(B + 1,)`.
        max_seqlen: at least the longest user's rows.
        precision: as for `jagged_jagged_bmm`.
    """
    L, H, M = x.shape
    N, B = y.shape[2], offsets.shape[0] - 1
    out = torch.empty((B, H, M, N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_m, block_n = _block_of(M), _block_of(N)
    if max_seqlen > SHARE_ABOVE and L > 0 and tiles.shape[0] > 0:
        parts = new_partial_sums(L, B, PART_ROWS, H * M * N, x.device)
        launch_parts_kernel(
            (*grid_of(tiles, H), -(-M // block_m) * -(-N // block_n)),
            (),
            (x, y, parts, tiles),
            (*x.stride()[:2], *y.stride()[:2]),
            (),
            (H, M, N, BLOCK, PART_ROWS, block_m, block_n, precision),
            (JAGGED_WARPS,),
        )
        launch_partial_sums(parts, out.view(B, -1), offsets, L, max_seqlen, PART_ROWS)
        return out
    has_long_tiles = max_seqlen > LONG and (block_m + block_n) * x.element_size() <= MAX_LONG_BYTES
    launch_jagged_kernel(
        (B * H, -(-M // block_m) * -(-N // block_n)),
        (),
        (x, y, out, offsets),
        (*x.stride()[:2], *y.stride()[:2]),
        (L, max_seqlen),
        (H, M, N, LONG_ROWS if has_long_tiles else BLOCK, block_m, block_n, precision),
        (JAGGED_WARPS,),
    )
    return out
