# mypy: allow-untyped-defs, allow-incomplete-defs
"""delta and dq: one program per tile of queries, over the keys that it sees. The equations are those of backward.py.

Names: see tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import Launcher, descriptors, grid_of, next_power_of_2
from kernels.jagged.tiles import is_visible, load_entry, load_tile, store_tile, visible_keys
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.tiles import is_kept, key_range, load_rowwise, self_gradient
from kernels.jagged_flash_attention.tuning import Tile


@triton.jit  # pragma: no cover
def accumulate_dq(
    b_dq,  # (BM, BD) so far
    b_q,
    b_dout,
    b_lse,
    b_delta,
    p_k,
    p_v,
    desc_k,
    desc_v,
    stride_kl,
    stride_vl,
    i_m,
    lo,
    hi,
    k_row,
    column_k,
    h,
    window,
    scale_log2,
    seed,
    i_row,
    i_h,
    drop_below,
    keep_scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what history keys lo ... hi give to this tile of queries."""
    first, end = visible_keys((i_m + tl.arange(0, BM))[:, None], h, window, CAUSAL, HAS_WINDOW, HAS_TARGETS)
    for i_n in tl.range(lo, hi, BN):
        if TMA and not EDGE:
            b_k = desc_k.load([k_row + i_n, column_k])
            b_v = desc_v.load([k_row + i_n, column_k])
        else:
            b_k = load_tile(p_k, i_n, h, stride_kl, D, BN, BD, EDGE)
            b_v = load_tile(p_v, i_n, h, stride_vl, D, BN, BD, EDGE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BM, BN), not scaled
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        o_key = tl.arange(0, BN)[None, :]
        if EDGE:
            b_p = tl.where(is_visible(o_key, i_n, first, end, HAS_WINDOW), b_p, 0.0)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        if DROPOUT:
            o_row = i_row + tl.arange(0, BM)[:, None]
            b_dp = tl.where(is_kept(seed, o_row, i_h, i_n + o_key, drop_below), b_dp * keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["L", "window", "drop_below", "keep_scale"])  # pragma: no cover
def dq_kernel(
    desc_k,  # of k as (keys, H // G * D), read only with TMA
    desc_v,
    p_q,  # (L, H, D)
    p_k,  # (keys, H // G, D)
    p_v,
    p_dout,  # (L, H, D)
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2
    p_delta,  # (H, L), float32, written
    p_dq,  # (L, H, D), contiguous
    p_tiles,  # (entries, 8), tiles of BM queries
    p_seed,
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    stride_gl,
    stride_gh,
    L,
    window,
    scale,
    scale_log2,
    drop_below,
    keep_scale,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """dq and delta of one tile of BM queries of one user and head: the same walk over the keys as the forward."""
    pid = tl.program_id(0)
    i_h = pid % H
    q_start, n, k_start, _num_keys, i_tile, h = load_entry(p_tiles, pid // H)
    if n == 0:
        return
    i_m = i_tile * BM
    p_q += q_start * stride_ql + i_h.to(tl.int64) * stride_qh
    p_k += k_start * stride_kl + (i_h // G).to(tl.int64) * stride_kh
    p_v += k_start * stride_vl + (i_h // G).to(tl.int64) * stride_vh
    p_dout += q_start * stride_gl + i_h.to(tl.int64) * stride_gh
    row_q = (q_start * H + i_h) * D
    row_h = i_h.to(tl.int64) * L + q_start
    i_row = q_start + i_m
    k_row = k_start.to(tl.int32)
    column_k = i_h // G * D
    seed = 0
    if DROPOUT:
        seed = tl.load(p_seed)

    b_q = load_tile(p_q, i_m, n, stride_ql, D, BM, BD, True)
    b_dout = load_tile(p_dout, i_m, n, stride_gl, D, BM, BD, True)
    b_out = load_tile(p_out + row_q, i_m, n, H * D, D, BM, BD, True)
    b_lse = load_rowwise(p_lse + row_h, i_m, n, float("inf"), BM, True)  # inf: a probability of zero
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    o_m = i_m + tl.arange(0, BM)
    tl.store(p_delta + row_h + o_m, b_delta, mask=o_m < n)
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)

    lo, full_lo, full_hi, hi = key_range(i_m, n, h, window, BM, BN, CAUSAL, HAS_WINDOW, HAS_TARGETS)
    if not SPLIT:  # one loop, all of it masked
        full_lo = hi
    for part in tl.static_range(0 if HAS_WINDOW or not SPLIT else 1, 3 if SPLIT else 1):  # masked, not masked, masked
        begin, end = lo, full_lo
        if part == 1:
            begin, end = full_lo, full_hi
        elif part == 2:
            begin, end = full_hi, hi
        b_dq = accumulate_dq(
            b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, desc_k, desc_v, stride_kl, stride_vl, i_m, begin, end,
            k_row, column_k, h, window, scale_log2, seed, i_row, i_h, drop_below, keep_scale,
            D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, DROPOUT, PRECISION, TMA, part != 1,
        )  # fmt: skip
    if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
        if i_m + BM > h:
            b_own_k = load_tile(p_k, i_m, n, stride_kl, D, BM, BD, True).to(tl.float32)
            b_own_v = load_tile(p_v, i_m, n, stride_vl, D, BM, BD, True).to(tl.float32)
            _, b_ds = self_gradient(
                b_q.to(tl.float32), b_own_k, b_own_v, b_dout.to(tl.float32), b_lse, b_delta, scale_log2,
                seed, i_row + tl.arange(0, BM), i_h, o_m, drop_below, keep_scale, DROPOUT,
            )  # fmt: skip
            b_dq += tl.where(o_m >= h, b_ds, 0.0)[:, None] * b_own_k

    store_tile(p_dq + row_q, b_dq * scale, i_m, n, H * D, D, BM, BD)


launch = Launcher(dq_kernel, "num_warps", "num_stages", "maxnreg")


def launch_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_tiles: Tensor,
    dq: Tensor,
    delta: Tensor,
    call: Call,
    tile: Tile,
    seed: Tensor | None,
) -> None:
    """`dq`, `(L, H, D)` and contiguous, and `delta`, `(H, L)` float32.

    Args:
        dout, q, k, v, out, lse, seed: as `launch_backward` has them.
        query_tiles: `(entries, 8)`, of `tile.block_m` queries.
        dq, delta: written, as far as the tiles go.
        call: mask, scale and dropout.
        tile: how to compute it.
    """
    L, H, D = q.shape
    if query_tiles.shape[0] == 0:
        return
    desc_k, desc_v = descriptors(k, v, block=tile.block_n, wanted=tile.tma)
    launch(
        grid_of(query_tiles, H),
        (desc_k, desc_v),
        (q, k, v, dout, out, lse, delta, dq, query_tiles, query_tiles if seed is None else seed),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2]),
        (L, call.window or 0, call.scale, call.scale_log2, call.drop_below, call.keep_scale),
        (
            H, H // k.shape[1], D, tile.block_m, tile.block_n, next_power_of_2(D), *call.constants,
            desc_k is not None, tile.split,
        ),
        (tile.num_warps, tile.num_stages, tile.max_registers),
    )  # fmt: skip
