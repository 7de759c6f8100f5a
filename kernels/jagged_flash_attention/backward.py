# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward: two kernels without atomics, so that the same input always gives the same bits.

With p = exp2(s - lse), the probabilities recomputed from the forward's log-sum-exp, and g the gradient
of out:

    delta_i = sum_d g_id out_id
    dq_i    = scale · sum_j p_ij (g_i·v_j - delta_i) k_j     one program per tile of queries, over the keys they see
    dv_j    = sum_i p_ij g_i                                 one program per tile of keys, over the queries that
    dk_j    = scale · sum_i p_ij (g_i·v_j - delta_i) q_i     see it

(Dao, FlashAttention-2, 2023, algorithm 2.) The kernel of dq comes first and leaves delta for the other. Users that fit
into one tile have a kernel of their own, in backward_short.py. Names: see tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged_flash_attention.backward_short import launch_short_users
from kernels.jagged_flash_attention.hopper.common import readable_by_tma
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.hopper.one_group.dkv import launch_one_group_dkv
from kernels.jagged_flash_attention.hopper.one_group.dq import launch_one_group_dq
from kernels.jagged_flash_attention.hopper.two_groups.dkv import launch_two_group_dkv
from kernels.jagged_flash_attention.hopper.two_groups.dq import launch_two_group_dq
from kernels.jagged_flash_attention.launch import Call, Launcher, descriptors, grid_of, next_power_of_2
from kernels.jagged_flash_attention.tiles import (
    is_kept,
    is_visible,
    key_range,
    load_entry,
    load_rowwise,
    load_tile,
    query_range,
    sees_key,
    store_tile,
    visible_keys,
)
from kernels.jagged_flash_attention.tuning import Tiles


@triton.jit  # pragma: no cover
def self_gradient(
    b_q, b_k, b_v, b_dout, b_lse, b_delta, scale_log2, seed, o_row, i_h, o_n, drop_below, keep_scale,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Of tokens that see themselves, row by row: probability that dv takes, gradient of the score; both (BLOCK,)."""
    b_p = tl.exp2(tl.sum(b_q * b_k, 1) * scale_log2 - b_lse)
    b_dp = tl.sum(b_dout * b_v, 1)
    b_dropped = b_p
    if DROPOUT:
        b_keep = tl.where(is_kept(seed, o_row, i_h, o_n, drop_below), keep_scale, 0.0)
        b_dropped = b_p * b_keep
        b_dp = b_dp * b_keep
    return b_dropped, b_p * (b_dp - b_delta)


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


launch_dkv = Launcher(dkv_kernel, "num_warps", "num_stages", "maxnreg")
launch_dq = Launcher(dq_kernel, "num_warps", "num_stages", "maxnreg")


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    short_users: Tensor | None,
    call: Call,
    tiles: Tiles,
    for_hopper: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous and in their shapes; `out` and `lse` as the forward gave them.

    Args:
        dout: `(L, H, D)`, contiguous in the last dimension; q, k, v as for the forward.
        query_tiles, key_tiles: `(entries, 8)`, of `tiles.dq.block_m` queries and of `tiles.dkv.block_n` keys.
        short_users: `(entries, 8)`, users of at most `tiles.short.block_m` tokens, which the other lists leave out;
            None: there are none.
        call: as for the forward.
        tiles: how to compute it.
        for_hopper: the kernels written for Hopper can do the call; the lists are made for those that `tiles` names.
        seed: `(1,)` int64, where there is dropout.
    """
    L, H, D = q.shape
    Hk = k.shape[1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)

    for_dq, for_dkv = (tiles.hopper_dq, tiles.hopper_dkv) if for_hopper else (None, None)
    if for_dq is not None or for_dkv is not None:  # once for both
        dout, q, k, v = (readable_by_tma(x) for x in (dout, q, k, v))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    numbers = (L, call.window or 0, call.scale, call.scale_log2, call.drop_below, call.keep_scale)
    block_d = next_power_of_2(D)
    seed_or_any = query_tiles if seed is None else seed
    if isinstance(for_dq, OneGroupConfig):
        launch_one_group_dq(dout, q, k, v, out, lse, query_tiles, dq, delta, call, for_dq)
    elif for_dq is not None:
        launch_two_group_dq(dout, q, k, v, out, lse, query_tiles, dq, delta, call, for_dq)
    elif query_tiles.shape[0] > 0:
        tile = tiles.dq
        desc_k, desc_v = descriptors(k, v, block=tile.block_n, wanted=tile.tma)
        launch_dq(
            grid_of(query_tiles, H),
            (desc_k, desc_v),
            (q, k, v, dout, out, lse, delta, dq, query_tiles, seed_or_any),
            strides,
            numbers,
            (H, H // Hk, D, tile.block_m, tile.block_n, block_d, *call.constants, desc_k is not None, tile.split),
            (tile.num_warps, tile.num_stages, tile.max_registers),
        )
    if isinstance(for_dkv, OneGroupConfig):
        launch_one_group_dkv(dout, q, k, v, lse, delta, key_tiles, dk, dv, call, for_dkv)
    elif for_dkv is not None:
        launch_two_group_dkv(dout, q, k, v, lse, delta, key_tiles, dk, dv, call, for_dkv)
    elif key_tiles.shape[0] > 0:
        tile = tiles.dkv
        desc_q, desc_dout = descriptors(q, dout, block=tile.block_m, wanted=tile.tma)
        launch_dkv(
            grid_of(key_tiles, Hk),
            (desc_q, desc_dout),
            (q, k, v, dout, lse, delta, dk, dv, key_tiles, seed_or_any),
            strides,
            numbers,
            (H, H // Hk, D, tile.block_m, tile.block_n, block_d, *call.constants, desc_q is not None, tile.split),
            (tile.num_warps, tile.num_stages, tile.max_registers),
        )
    if tiles.short is not None and short_users is not None and short_users.shape[0] > 0:
        launch_short_users(dout, q, k, v, out, lse, (dq, dk, dv), short_users, call, tiles.short, seed)
    return dq, dk, dv
