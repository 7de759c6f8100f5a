# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels that write or read jagged scores: queries x keys, and scores x values. One program per tile and head.

Names: see kernels/jagged/tiles.py; T scores of all users together, placed as kernels/jagged/score_layout.py says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import Launcher, grid_of, next_power_of_2
from kernels.jagged.score_layout import BLOCK
from kernels.jagged.tiles import (
    first_score,
    load_entry,
    load_scores,
    load_tile,
    load_user_index,
    store_scores,
    store_tile,
)

MIN_WIDTH = 16  # of what a tensor core multiplies


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@triton.jit(do_not_specialize=["T", "scale"])  # pragma: no cover
def jagged_scores_kernel(
    p_q,  # (L, H, D)
    p_k,  # (keys, H, D)
    p_s,  # (H, T), contiguous
    p_tiles,  # (entries, 8), tiles of BM queries
    p_offsets,  # (B + 1,), of scores
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    T,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of BM queries of one user and head with all of its keys."""
    pid = tl.program_id(0)
    i_h = pid % H
    i_entry = pid // H
    q_start, n, k_start, num_keys, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_m = i_tile * BM
    s_start, is_inside = first_score(p_offsets, load_user_index(p_tiles, i_entry), n, num_keys, i_h, T)
    if not is_inside:
        return
    p_q += q_start * stride_ql + i_h.to(tl.int64) * stride_qh
    p_k += k_start * stride_kl + i_h.to(tl.int64) * stride_kh
    p_s += s_start
    b_q = load_tile(p_q, i_m, n, stride_ql, D, BM, BD, True)
    for i_n in range(0, num_keys, BN):
        b_k = load_tile(p_k, i_n, num_keys, stride_kl, D, BN, BD, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        store_scores(p_s, b_s, i_m, i_n, n, num_keys, BM, BN)


@triton.jit(do_not_specialize=["T", "scale"])  # pragma: no cover
def jagged_weighted_sum_kernel(
    p_s,  # (H, T), contiguous
    p_x,  # (rows of the other side, H, D)
    p_out,  # (rows of this side, H, D), contiguous
    p_tiles,  # (entries, 8), tiles of BO rows of this side: queries, or keys if TRANSPOSED
    p_offsets,  # (B + 1,), of scores
    stride_xl,
    stride_xh,
    T,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BO: tl.constexpr,
    BX: tl.constexpr,
    BD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of scores times x, or columns of scores times x: BO rows of one user and head, over all rows of x."""
    pid = tl.program_id(0)
    i_h = pid % H
    i_entry = pid // H
    start, n, x_start, num_x, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_o = i_tile * BO
    num_queries, num_keys = n, num_x
    if TRANSPOSED:
        num_queries, num_keys = num_x, n
    s_start, is_inside = first_score(p_offsets, load_user_index(p_tiles, i_entry), num_queries, num_keys, i_h, T)
    num_x = tl.where(is_inside, num_x, 0)
    p_s += s_start
    p_x += x_start * stride_xl + i_h.to(tl.int64) * stride_xh
    b_acc = tl.zeros([BO, BD], dtype=tl.float32)
    for i_x in range(0, num_x, BX):
        b_x = load_tile(p_x, i_x, num_x, stride_xl, D, BX, BD, True)
        if TRANSPOSED:
            b_s = tl.trans(load_scores(p_s, i_x, i_o, num_x, n, n, BX, BO))
        else:
            b_s = load_scores(p_s, i_o, i_x, n, num_x, num_x, BO, BX)
            b_s = tl.where(i_x + tl.arange(0, BX)[None, :] < num_x, b_s, 0.0)  # whatever lies behind a row
        b_acc = tl.dot(b_s, b_x, b_acc, input_precision=PRECISION)
    store_tile(p_out + (start * H + i_h) * D, b_acc * scale, i_o, n, H * D, D, BO, BD)


launch_scores_kernel = Launcher(jagged_scores_kernel, "num_warps", "num_stages")
launch_weighted_sum_kernel = Launcher(jagged_weighted_sum_kernel, "num_warps", "num_stages")


def _stream_of(x: Tensor) -> tuple[int, int, int]:
    """Columns of a tile of x, rows of those that stream by, and how many of them are on the chip at once.

    By their bytes, so that all fit into the 99 KB that a program has on the smallest GPUs.
    """
    columns = max(next_power_of_2(x.shape[2]), MIN_WIDTH)
    num_bytes = columns * x.element_size()
    if num_bytes <= 128:
        return columns, BLOCK, 3
    if num_bytes <= 256:
        return columns, BLOCK, 2
    return columns, BLOCK if num_bytes <= 512 else 16, 1


def launch_scores(
    q: Tensor, k: Tensor, query_tiles: Tensor, score_offsets: Tensor, total: int, scale: float, precision: str
) -> Tensor:
    """`(H, total)` in q's dtype: `scale q k^T` of every user.

    Args:
        q, k: `(L, H, D)`, `(keys, H, D)`, contiguous in the last dimension.
        query_tiles: `(entries, 8)`, tiles of BLOCK queries.
        score_offsets: `(B + 1,)` int64.
        total: scores of all users.
        scale, precision: as for `jagged_scores`.
    """
    _, H, D = q.shape
    scores = q.new_empty((H, total))
    if total == 0 or query_tiles.shape[0] == 0:
        return scores
    columns, rows, stages = _stream_of(k)
    launch_scores_kernel(
        grid_of(query_tiles, H),
        (),
        (q, k, scores, query_tiles, score_offsets),
        (*q.stride()[:2], *k.stride()[:2]),
        (total, scale),
        (H, D, BLOCK, rows, columns, precision),
        (4, stages),
    )
    return scores


def launch_weighted_sum(
    weights: Tensor,
    x: Tensor,
    tiles: Tensor,
    score_offsets: Tensor,
    num_rows: int,
    scale: float,
    transposed: bool,
    precision: str,
) -> Tensor:
    """`(num_rows, H, D)` in x's dtype: `scale p x` of every user, or `scale p^T x` if `transposed`.

    Args:
        weights: `(H, T)`, contiguous.
        x: `(rows of the other side, H, D)`, contiguous in the last dimension.
        tiles: `(entries, 8)`, tiles of BLOCK queries, or keys if `transposed`.
        score_offsets: `(B + 1,)` int64.
        num_rows: rows of the result: queries, or keys if `transposed`.
        scale, precision: as for `jagged_scores`.
    """
    _, H, D = x.shape
    out = torch.empty((num_rows, H, D), dtype=x.dtype, device=x.device)
    if num_rows == 0 or tiles.shape[0] == 0:
        return out
    columns, rows, stages = _stream_of(x)
    launch_weighted_sum_kernel(
        grid_of(tiles, H),
        (),
        (weights, x, out, tiles, score_offsets),
        x.stride()[:2],
        (weights.shape[1], scale),
        (H, D, BLOCK, rows, columns, transposed, precision),
        (4, stages),
    )
    return out
