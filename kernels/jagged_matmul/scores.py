# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels that write or read jagged scores: queries x keys, and scores x values.

Names: see kernels/jagged/tiles.py; T scores of all users together, placed as kernels/jagged/score_layout.py says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import INTERPRETED, Launcher, grid_of, next_power_of_2
from kernels.jagged.score_layout import BLOCK
from kernels.jagged.tiles import (
    first_of_head,
    first_score,
    load_entry,
    load_scores,
    load_tile,
    load_user_index,
    store_scores,
    store_tile,
)

MIN_WIDTH = 16  # of what a tensor core multiplies
TILES_TO_FILL_A_GPU = 6 if INTERPRETED else 512  # with fewer, every head has programs of its own
HEADS_OF_A_SUM = 2  # of a program at most: with more, programs of long users last too long


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
    HEADS: tl.constexpr,  # of a program
    PRECISION: tl.constexpr,
):
    """Scores of BM queries of one user with all of its keys, HEADS heads one after the other.

    These heads are in one loop with the keys, though queries are then read for every tile of keys: tiles that are
    loaded ahead hide how long memory takes, and many users have no more than one or two tiles of keys.
    """
    pid = tl.program_id(0)
    first_head = pid % (H // HEADS) * HEADS
    i_entry = pid // (H // HEADS)
    q_start, n, k_start, num_keys, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_m = i_tile * BM
    s_start, is_inside = first_score(p_offsets, load_user_index(p_tiles, i_entry), n, num_keys, T)
    if not is_inside:
        return
    if num_keys == 0:  # nothing to do, and no number of tiles to divide by
        return
    p_q += q_start * stride_ql
    p_k += k_start * stride_kl
    p_s += s_start
    tiles_of_keys = tl.cdiv(num_keys, BN)
    for i in range(0, HEADS * tiles_of_keys):
        i_h = (first_head + i // tiles_of_keys).to(tl.int64)
        i_n = i % tiles_of_keys * BN
        b_q = load_tile(p_q + i_h * stride_qh, i_m, n, stride_ql, D, BM, BD, True)
        b_k = load_tile(p_k + i_h * stride_kh, i_n, num_keys, stride_kl, D, BN, BD, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        store_scores(p_s + first_of_head(i_h, T), b_s, i_m, i_n, n, num_keys, BM, BN)


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
    HEADS: tl.constexpr,  # of a program
    TRANSPOSED: tl.constexpr,
    GAPS_ARE_FINITE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of scores times x, or columns of scores times x: BO rows of one user, over all rows of x.

    HEADS heads one after the other, in one loop with the rows of x, as in jagged_scores_kernel. If GAPS_ARE_FINITE,
    scores go to the tensor cores as they are, with what lies between a row's end and the next one, where x is zero;
    else they pass through registers, to be cleaned. Columns of scores meet no gap.
    """
    pid = tl.program_id(0)
    first_head = pid % (H // HEADS) * HEADS
    i_entry = pid // (H // HEADS)
    start, n, x_start, num_x, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_o = i_tile * BO
    num_queries, num_keys = n, num_x
    if TRANSPOSED:
        num_queries, num_keys = num_x, n
    s_start, is_inside = first_score(p_offsets, load_user_index(p_tiles, i_entry), num_queries, num_keys, T)
    num_x = tl.where(is_inside, num_x, 0)
    p_s += s_start
    p_x += x_start * stride_xl
    p_out += start * H * D
    tiles_of_x = tl.maximum(tl.cdiv(num_x, BX), 1)  # without any, zero is written
    b_acc = tl.zeros([BO, BD], dtype=tl.float32)
    for i in range(0, HEADS * tiles_of_x):
        i_h = (first_head + i // tiles_of_x).to(tl.int64)
        i_x = i % tiles_of_x * BX
        b_x = load_tile(p_x + i_h * stride_xh, i_x, num_x, stride_xl, D, BX, BD, True)
        p_head = p_s + first_of_head(i_h, T)
        if TRANSPOSED:
            b_s = tl.trans(load_scores(p_head, i_x, i_o, num_x, n, n, BX, BO))
        else:
            b_s = load_scores(p_head, i_o, i_x, n, num_x, num_x, BO, BX)
            if not GAPS_ARE_FINITE:
                b_s = tl.where(i_x + tl.arange(0, BX)[None, :] < num_x, b_s, 0.0)
        b_acc = tl.dot(b_s, b_x, b_acc, input_precision=PRECISION)
        if i_x + BX >= num_x:
            store_tile(p_out + i_h * D, b_acc * scale, i_o, n, H * D, D, BO, BD)
            b_acc = tl.zeros([BO, BD], dtype=tl.float32)


launch_scores_kernel = Launcher(jagged_scores_kernel, "num_warps", "num_stages")
launch_weighted_sum_kernel = Launcher(jagged_weighted_sum_kernel, "num_warps", "num_stages")


class Stream(NamedTuple):
    """How rows stream by a program, by their bytes: all has to fit into the 99 KB of the smallest GPUs."""

    rows: int
    """Of a tile."""

    stages: int
    """Tiles on the chip at once."""

    num_warps: int = 4


WIDE, WIDER, WIDEST = Stream(64, 2), Stream(64, 1), Stream(16, 1)  # rows of up to 256 bytes, 512 bytes, more
SCORES = Stream(32 if INTERPRETED else 128, 3, num_warps=8)  # up to 128 bytes
WEIGHTED_SUM, TRANSPOSED_SUM = Stream(32 if INTERPRETED else 64, 3), Stream(32, 3)


def _stream_of(x: Tensor, narrow: Stream) -> tuple[int, Stream]:
    """Columns of a tile of x, and how its rows stream by; `narrow` where they have up to 128 bytes."""
    columns = max(next_power_of_2(x.shape[2]), MIN_WIDTH)
    num_bytes = columns * x.element_size()
    if num_bytes <= 128:
        return columns, narrow
    return columns, WIDE if num_bytes <= 256 else WIDER if num_bytes <= 512 else WIDEST


def launch_scores(
    q: Tensor, k: Tensor, query_tiles: Tensor, score_offsets: Tensor, total: int, scale: float, precision: str
) -> Tensor:
    """`(H, total)` in q's dtype: `scale q k^T` of every user.

    Args:
        q, k: `(L, H, D)`, `(keys, H, D)`, contiguous in the last dimension.
        query_tiles: `(entries, 8)`, tiles of BLOCK queries.
        score_offsets: `(B + 1,)` int64.
        total: T, as of the layout.
        scale, precision: as for `jagged_scores`.
    """
    _, H, D = q.shape
    scores = q.new_empty((H, total))
    if scores.numel() == 0 or query_tiles.shape[0] == 0:
        return scores
    columns, stream = _stream_of(k, SCORES)
    heads = H if query_tiles.shape[0] >= TILES_TO_FILL_A_GPU else 1
    launch_scores_kernel(
        grid_of(query_tiles, H // heads),
        (),
        (q, k, scores, query_tiles, score_offsets),
        (*q.stride()[:2], *k.stride()[:2]),
        (total, scale),
        (H, D, BLOCK, stream.rows, columns, heads, precision),
        (stream.num_warps, stream.stages),
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
    gaps_are_finite: bool,
    precision: str,
) -> Tensor:
    """`(num_rows, H, D)` in x's dtype: `scale p x` of every user, or `scale p^T x` if `transposed`.

    Args:
        weights: `(H, T)`, contiguous.
        x: `(rows of the other side, H, D)`, contiguous in the last dimension.
        tiles: `(entries, 8)`, tiles of BLOCK queries, or keys if `transposed`.
        score_offsets: `(B + 1,)` int64.
        num_rows: rows of the result: queries, or keys if `transposed`.
        gaps_are_finite: so are the weights between the end of a row and the next one; faster. Nothing to
            `transposed`, whose sums meet no gap.
        scale, precision: as for `jagged_scores`.
    """
    _, H, D = x.shape
    out = torch.empty((num_rows, H, D), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or tiles.shape[0] == 0:
        return out
    columns, stream = _stream_of(x, TRANSPOSED_SUM if transposed else WEIGHTED_SUM)
    heads = HEADS_OF_A_SUM if H % HEADS_OF_A_SUM == 0 and tiles.shape[0] >= TILES_TO_FILL_A_GPU else 1
    launch_weighted_sum_kernel(
        grid_of(tiles, H // heads),
        (),
        (weights, x, out, tiles, score_offsets),
        x.stride()[:2],
        (weights.shape[1], scale),
        (H, D, BLOCK, stream.rows, columns, heads, transposed, gaps_are_finite or transposed, precision),
        (stream.num_warps, stream.stages),
    )
    return out
