# mypy: allow-untyped-defs, allow-incomplete-defs
"""dk and dv: one program per tile of keys, over the queries that see it. The equations are those of backward.py.

Names: see tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import Launcher, descriptors, grid_of, next_power_of_2
from kernels.jagged.tiles import load_entry, load_tile, store_tile
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.tiles import is_kept, load_rowwise, query_range, sees_key, self_gradient
from kernels.jagged_flash_attention.tuning import Tile


@triton.jit  # pragma: no cover
def accumulate_dkv(
    b_dk,  # (BN, BD) so far
    b_dv,
    b_k,
    b_v,
    p_q,
    p_dout,
    desc_q,
    desc_dout,
    p_lse,
    p_delta,
    stride_ql,
    stride_gl,
    i_n,
    lo,
    hi,
    q_row,
    column,
    num_queries,
    h,
    window,
    scale_log2,
    seed,
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
    MASK: tl.constexpr,
):
    """Add what queries lo ... hi give to this tile of history keys; those past num_queries count for nothing.

    Works on the transposed scores (BN, BM): probabilities are then the left operand of both products.
    """
    o_n = i_n + tl.arange(0, BN)[:, None]
    for i_m in tl.range(lo, hi, BM):
        if TMA and not EDGE:
            b_q = desc_q.load([q_row + i_m, column])
            b_dout = desc_dout.load([q_row + i_m, column])
        else:
            b_q = load_tile(p_q, i_m, num_queries, stride_ql, D, BM, BD, EDGE)
            b_dout = load_tile(p_dout, i_m, num_queries, stride_gl, D, BM, BD, EDGE)
        b_lse = load_rowwise(p_lse, i_m, num_queries, float("inf"), BM, EDGE)  # inf: a probability of zero
        b_delta = load_rowwise(p_delta, i_m, num_queries, 0.0, BM, EDGE)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # (BN, BM), not scaled
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        o_query = tl.arange(0, BM)[None, :]
        if MASK:
            b_p = tl.where(sees_key(o_query, i_m, o_n, h, window, CAUSAL, HAS_WINDOW, HAS_TARGETS), b_p, 0.0)
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_dropped = b_p
        if DROPOUT:
            b_keep = tl.where(is_kept(seed, q_row + i_m + o_query, i_h, o_n, drop_below), keep_scale, 0.0)
            b_dropped = b_p * b_keep
            b_dp = b_dp * b_keep
        b_dv = tl.dot(b_dropped.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["L", "window", "drop_below", "keep_scale"])  # pragma: no cover
def dkv_kernel(
    desc_q,  # of q as (L, H * D), read only with TMA
    desc_dout,
    p_q,  # (L, H, D)
    p_k,  # (keys, H // G, D)
    p_v,
    p_dout,  # (L, H, D)
    p_lse,  # (H, L), float32, base 2
    p_delta,  # (H, L), float32
    p_dk,  # (keys, H // G, D), contiguous
    p_dv,
    p_tiles,  # (entries, 8), tiles of BN keys
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
    """dk and dv of one tile of BN keys of one user and key head."""
    pid = tl.program_id(0)
    i_kh = pid % (H // G)
    k_start, num_keys, q_start, n, i_tile, h = load_entry(p_tiles, pid // (H // G))
    if num_keys == 0:
        return
    i_n = i_tile * BN
    p_k += k_start * stride_kl + i_kh.to(tl.int64) * stride_kh
    p_v += k_start * stride_vl + i_kh.to(tl.int64) * stride_vh
    row_kv = (k_start * (H // G) + i_kh) * D
    q_row = q_start.to(tl.int32)
    seed = 0
    if DROPOUT:
        seed = tl.load(p_seed)

    b_k = load_tile(p_k, i_n, h, stride_kl, D, BN, BD, True)
    b_v = load_tile(p_v, i_n, h, stride_vl, D, BN, BD, True)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BD], dtype=tl.float32)

    for i_g in range(G):
        i_h = i_kh * G + i_g
        p_head_q = p_q + q_start * stride_ql + i_h.to(tl.int64) * stride_qh
        p_head_dout = p_dout + q_start * stride_gl + i_h.to(tl.int64) * stride_gh
        p_head_lse = p_lse + i_h.to(tl.int64) * L + q_start
        p_head_delta = p_delta + i_h.to(tl.int64) * L + q_start
        num_queries = n
        if HAS_WINDOW:  # candidates, which know no window, have their own loop
            num_queries = h
        lo, full_lo, full_hi, hi = query_range(i_n, num_queries, h, window, BM, BN, CAUSAL, HAS_WINDOW)
        if not SPLIT:  # one loop, all of it masked
            full_lo = hi
        for part in tl.static_range(0 if CAUSAL or HAS_WINDOW or not SPLIT else 1, 3 if SPLIT else 1):
            begin, end = lo, full_lo
            if part == 1:  # the only one not masked
                begin, end = full_lo, full_hi
            elif part == 2:
                begin, end = full_hi, hi
            b_dk, b_dv = accumulate_dkv(
                b_dk, b_dv, b_k, b_v, p_head_q, p_head_dout, desc_q, desc_dout, p_head_lse, p_head_delta,
                stride_ql, stride_gl, i_n, begin, end, q_row, i_h * D, num_queries, h, window, scale_log2,
                seed, i_h, drop_below, keep_scale, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, DROPOUT, PRECISION,
                TMA, part != 1, HAS_WINDOW or (CAUSAL and part == 0),
            )  # fmt: skip
        if HAS_WINDOW and HAS_TARGETS:
            b_dk, b_dv = accumulate_dkv(
                b_dk, b_dv, b_k, b_v, p_head_q, p_head_dout, desc_q, desc_dout, p_head_lse, p_head_delta,
                stride_ql, stride_gl, i_n, h, tl.where(i_n < h, n, h), q_row, i_h * D, n, h, window, scale_log2,
                seed, i_h, drop_below, keep_scale, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, DROPOUT, PRECISION,
                TMA, True, True,
            )  # fmt: skip

    if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
        # A candidate key is seen by itself alone; what the loops gave its row is discarded.
        if i_n + BN > h:
            o_n = i_n + tl.arange(0, BN)
            m_candidate = (o_n >= h)[:, None]
            b_dk = tl.where(m_candidate, 0.0, b_dk)
            b_dv = tl.where(m_candidate, 0.0, b_dv)
            b_own_k = load_tile(p_k, i_n, n, stride_kl, D, BN, BD, True).to(tl.float32)
            b_own_v = load_tile(p_v, i_n, n, stride_vl, D, BN, BD, True).to(tl.float32)
            for i_g in range(G):
                i_h = i_kh * G + i_g
                p_head_q = p_q + q_start * stride_ql + i_h.to(tl.int64) * stride_qh
                p_head_dout = p_dout + q_start * stride_gl + i_h.to(tl.int64) * stride_gh
                b_q = load_tile(p_head_q, i_n, n, stride_ql, D, BN, BD, True).to(tl.float32)
                b_dout = load_tile(p_head_dout, i_n, n, stride_gl, D, BN, BD, True).to(tl.float32)
                row_h = i_h.to(tl.int64) * L + q_start
                b_lse = load_rowwise(p_lse + row_h, i_n, n, float("inf"), BN, True)
                b_delta = load_rowwise(p_delta + row_h, i_n, n, 0.0, BN, True)
                b_p, b_ds = self_gradient(
                    b_q, b_own_k, b_own_v, b_dout, b_lse, b_delta, scale_log2,
                    seed, q_row + o_n, i_h, o_n, drop_below, keep_scale, DROPOUT,
                )  # fmt: skip
                b_dk += tl.where(m_candidate, b_ds[:, None] * b_q, 0.0)
                b_dv += tl.where(m_candidate, b_p[:, None] * b_dout, 0.0)

    store_tile(p_dk + row_kv, b_dk * scale, i_n, num_keys, H // G * D, D, BN, BD)
    store_tile(p_dv + row_kv, b_dv, i_n, num_keys, H // G * D, D, BN, BD)


launch = Launcher(dkv_kernel, "num_warps", "num_stages", "maxnreg")


def launch_dkv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_tiles: Tensor,
    dk: Tensor,
    dv: Tensor,
    call: Call,
    tile: Tile,
    seed: Tensor | None,
) -> None:
    """`dk` and `dv`, `(keys, H / G, D)` and contiguous, from the delta that the kernel of dq left.

    Args:
        dout, q, k, v, lse, seed: as `launch_backward` has them.
        delta: `(H, L)` float32, contiguous.
        key_tiles: `(entries, 8)`, of `tile.block_n` keys.
        dk, dv: written, as far as the tiles go.
        call: mask, scale and dropout.
        tile: how to compute it.
    """
    L, H, D = q.shape
    num_kv = k.shape[1]
    if key_tiles.shape[0] == 0:
        return
    desc_q, desc_dout = descriptors(q, dout, block=tile.block_m, wanted=tile.tma)
    launch(
        grid_of(key_tiles, num_kv),
        (desc_q, desc_dout),
        (q, k, v, dout, lse, delta, dk, dv, key_tiles, key_tiles if seed is None else seed),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2]),
        (L, call.window or 0, call.scale, call.scale_log2, call.drop_below, call.keep_scale),
        (
            H, H // num_kv, D, tile.block_m, tile.block_n, next_power_of_2(D), *call.constants, desc_q is not None,
            tile.split,
        ),
        (tile.num_warps, tile.num_stages, tile.max_registers),
    )  # fmt: skip
