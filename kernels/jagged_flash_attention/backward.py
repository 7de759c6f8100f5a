# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward: three kernels without atomics, so that the same input always gives the same bits.

With p = exp2(s - lse), the probabilities recomputed from the forward's log-sum-exp, and g the gradient
of out:

    delta_i = sum_d g_id out_id                      one program per tile of tokens
    dv_j    = sum_i p_ij g_i                         one program per tile of keys, over the queries
    dk_j    = scale · sum_i p_ij (g_i·v_j - delta_i) q_i     that see it
    dq_i    = scale · sum_j p_ij (g_i·v_j - delta_i) k_j     one program per tile of queries

(Dao, FlashAttention-2, 2023, algorithm 2.) Names: see tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged_flash_attention.forward import LOG2_E
from kernels.jagged_flash_attention.launch import LaunchShape, checked_grid, launch_on
from kernels.jagged_flash_attention.tiles import (
    is_visible,
    key_range,
    load_rowwise,
    load_tile,
    load_user,
    query_range,
    store_tile,
)
from kernels.jagged_flash_attention.tuning import choose_tiles


@triton.jit(do_not_specialize=["L"])  # pragma: no cover
def delta_kernel(
    p_out,  # (L, H, D), contiguous
    p_dout,  # (L, H, D)
    p_delta,  # (H, L), float32
    stride_gl,
    stride_gh,
    L,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """delta_i = sum_d dout_id out_id for BM tokens of one head, whoever they belong to."""
    pid = tl.program_id(0)
    i_l = (pid // H).to(tl.int64) * BM
    i_h = (pid % H).to(tl.int64)
    b_out = load_tile(p_out + i_h * D, i_l, L, H * D, D, BM, BD, True).to(tl.float32)
    b_dout = load_tile(p_dout + i_h * stride_gh, i_l, L, stride_gl, D, BM, BD, True).to(tl.float32)
    o_l = i_l + tl.arange(0, BM)
    tl.store(p_delta + i_h * L + o_l, tl.sum(b_out * b_dout, 1), mask=o_l < L)


@triton.jit  # pragma: no cover
def accumulate_dkv(
    b_dk,  # (BN, BD) so far
    b_dv,
    b_k,
    b_v,
    p_q,
    p_dout,
    p_lse,
    p_delta,
    stride_ql,
    stride_gl,
    i_n,
    lo,
    hi,
    num_queries,
    h,
    window,
    scale_log2,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what queries lo ... hi give to this tile of history keys; those past num_queries count for nothing.

    Works on the transposed scores (BN, BM): probabilities are then the left operand of both products.
    """
    for i_m in tl.range(lo, hi, BM):
        b_q = load_tile(p_q, i_m, num_queries, stride_ql, D, BM, BD, EDGE)
        b_dout = load_tile(p_dout, i_m, num_queries, stride_gl, D, BM, BD, EDGE)
        b_lse = load_rowwise(p_lse, i_m, num_queries, float("inf"), BM, EDGE)  # inf: a probability of zero
        b_delta = load_rowwise(p_delta, i_m, num_queries, 0.0, BM, EDGE)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2  # (BN, BM)
        b_p = tl.exp2(b_s - b_lse[None, :])
        if EDGE:
            o_m = (i_m + tl.arange(0, BM))[None, :]
            o_n = (i_n + tl.arange(0, BN))[:, None]
            m_s = is_visible(o_m, o_n, h, window, CAUSAL, HAS_WINDOW, HAS_TARGETS)
            b_p = tl.where(m_s, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit  # pragma: no cover
def self_gradient(b_q, b_k, b_v, b_dout, b_lse, b_delta, scale_log2):
    """Probability and score gradient of tokens that see themselves, row by row: both (BLOCK,)."""
    b_p = tl.exp2(tl.sum(b_q * b_k, 1) * scale_log2 - b_lse)
    return b_p, b_p * (tl.sum(b_dout * b_v, 1) - b_delta)


@triton.jit(do_not_specialize=["L", "max_seqlen", "num_tiles", "window"])  # pragma: no cover
def dkv_kernel(
    p_q,  # (L, H, D)
    p_k,
    p_v,
    p_dout,
    p_lse,  # (H, L), float32, base 2
    p_delta,  # (H, L), float32
    p_dk,  # (L, H, D), contiguous
    p_dv,
    p_offsets,  # (B + 1,)
    p_num_targets,  # (B,), not read unless HAS_TARGETS
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    stride_gl,
    stride_gh,
    L,
    max_seqlen,
    num_tiles,
    window,
    scale,
    scale_log2,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """dk and dv of one tile of BN keys of one user and head."""
    pid = tl.program_id(0)
    i_n = (pid % num_tiles) * BN  # the first tile first: under a causal mask the most queries see it
    i_b = pid // num_tiles // H
    i_h = (pid // num_tiles % H).to(tl.int64)

    bos, n, h = load_user(p_offsets, p_num_targets, i_b, L, max_seqlen, HAS_TARGETS)
    if i_n >= n:
        return
    p_q += bos * stride_ql + i_h * stride_qh
    p_k += bos * stride_kl + i_h * stride_kh
    p_v += bos * stride_vl + i_h * stride_vh
    p_dout += bos * stride_gl + i_h * stride_gh
    p_dk += (bos * H + i_h) * D
    p_dv += (bos * H + i_h) * D
    p_lse += i_h * L + bos
    p_delta += i_h * L + bos

    b_k = load_tile(p_k, i_n, h, stride_kl, D, BN, BD, True)
    b_v = load_tile(p_v, i_n, h, stride_vl, D, BN, BD, True)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BD], dtype=tl.float32)

    num_queries = n
    if HAS_WINDOW:  # candidates, which know no window, have their own loop
        num_queries = h
    lo, full_lo, full_hi, hi = query_range(i_n, num_queries, h, window, BM, BN, CAUSAL, HAS_WINDOW)
    if CAUSAL or HAS_WINDOW:
        b_dk, b_dv = accumulate_dkv(
            b_dk, b_dv, b_k, b_v, p_q, p_dout, p_lse, p_delta, stride_ql, stride_gl, i_n, lo, full_lo,
            num_queries, h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, True,
        )  # fmt: skip
    b_dk, b_dv = accumulate_dkv(
        b_dk, b_dv, b_k, b_v, p_q, p_dout, p_lse, p_delta, stride_ql, stride_gl, i_n, full_lo, full_hi,
        num_queries, h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, False,
    )  # fmt: skip
    b_dk, b_dv = accumulate_dkv(
        b_dk, b_dv, b_k, b_v, p_q, p_dout, p_lse, p_delta, stride_ql, stride_gl, i_n, full_hi, hi,
        num_queries, h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, True,
    )  # fmt: skip
    if HAS_WINDOW and HAS_TARGETS:
        b_dk, b_dv = accumulate_dkv(
            b_dk, b_dv, b_k, b_v, p_q, p_dout, p_lse, p_delta, stride_ql, stride_gl, i_n, h,
            tl.where(i_n < h, n, h), n, h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS,
            True,
        )  # fmt: skip

    if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
        # A candidate key is seen by itself alone; what the loops gave its row is discarded.
        if i_n + BN > h:
            b_q = load_tile(p_q, i_n, n, stride_ql, D, BN, BD, True).to(tl.float32)
            b_own_k = load_tile(p_k, i_n, n, stride_kl, D, BN, BD, True).to(tl.float32)
            b_own_v = load_tile(p_v, i_n, n, stride_vl, D, BN, BD, True).to(tl.float32)
            b_dout = load_tile(p_dout, i_n, n, stride_gl, D, BN, BD, True).to(tl.float32)
            b_lse = load_rowwise(p_lse, i_n, n, float("inf"), BN, True)
            b_delta = load_rowwise(p_delta, i_n, n, 0.0, BN, True)
            b_p, b_ds = self_gradient(b_q, b_own_k, b_own_v, b_dout, b_lse, b_delta, scale_log2)
            m_candidate = (i_n + tl.arange(0, BN) >= h)[:, None]
            b_dk = tl.where(m_candidate, b_ds[:, None] * b_q, b_dk)
            b_dv = tl.where(m_candidate, b_p[:, None] * b_dout, b_dv)

    store_tile(p_dk, b_dk * scale, i_n, n, H * D, D, BN, BD)
    store_tile(p_dv, b_dv, i_n, n, H * D, D, BN, BD)


@triton.jit  # pragma: no cover
def accumulate_dq(
    b_dq,  # (BM, BD) so far
    b_q,
    b_dout,
    b_lse,
    b_delta,
    p_k,
    p_v,
    stride_kl,
    stride_vl,
    i_m,
    lo,
    hi,
    h,
    window,
    scale_log2,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what history keys lo ... hi give to this tile of queries."""
    for i_n in tl.range(lo, hi, BN):
        b_k = load_tile(p_k, i_n, h, stride_kl, D, BN, BD, EDGE)
        b_v = load_tile(p_v, i_n, h, stride_vl, D, BN, BD, EDGE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # (BM, BN)
        b_p = tl.exp2(b_s - b_lse[:, None])
        if EDGE:
            o_m = (i_m + tl.arange(0, BM))[:, None]
            o_n = (i_n + tl.arange(0, BN))[None, :]
            m_s = is_visible(o_m, o_n, h, window, CAUSAL, HAS_WINDOW, HAS_TARGETS)
            b_p = tl.where(m_s, b_p, 0.0)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=["L", "max_seqlen", "num_tiles", "window"])  # pragma: no cover
def dq_kernel(
    p_q,  # (L, H, D)
    p_k,
    p_v,
    p_dout,
    p_lse,  # (H, L), float32, base 2
    p_delta,  # (H, L), float32
    p_dq,  # (L, H, D), contiguous
    p_offsets,  # (B + 1,)
    p_num_targets,  # (B,), not read unless HAS_TARGETS
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    stride_gl,
    stride_gh,
    L,
    max_seqlen,
    num_tiles,
    window,
    scale,
    scale_log2,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """dq of one tile of BM queries of one user and head: the same walk over the keys as the forward."""
    pid = tl.program_id(0)
    i_m = (num_tiles - 1 - pid % num_tiles) * BM
    i_b = pid // num_tiles // H
    i_h = (pid // num_tiles % H).to(tl.int64)

    bos, n, h = load_user(p_offsets, p_num_targets, i_b, L, max_seqlen, HAS_TARGETS)
    if i_m >= n:
        return
    p_q += bos * stride_ql + i_h * stride_qh
    p_k += bos * stride_kl + i_h * stride_kh
    p_v += bos * stride_vl + i_h * stride_vh
    p_dout += bos * stride_gl + i_h * stride_gh
    p_dq += (bos * H + i_h) * D
    p_lse += i_h * L + bos
    p_delta += i_h * L + bos

    b_q = load_tile(p_q, i_m, n, stride_ql, D, BM, BD, True)
    b_dout = load_tile(p_dout, i_m, n, stride_gl, D, BM, BD, True)
    b_lse = load_rowwise(p_lse, i_m, n, float("inf"), BM, True)  # inf: a probability of zero
    b_delta = load_rowwise(p_delta, i_m, n, 0.0, BM, True)
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)

    lo, full_lo, full_hi, hi = key_range(i_m, n, h, window, BM, BN, CAUSAL, HAS_WINDOW)
    if HAS_WINDOW:
        b_dq = accumulate_dq(
            b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, stride_kl, stride_vl, i_m, lo, full_lo,
            h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, True,
        )  # fmt: skip
    b_dq = accumulate_dq(
        b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, stride_kl, stride_vl, i_m, full_lo, full_hi,
        h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, False,
    )  # fmt: skip
    b_dq = accumulate_dq(
        b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, stride_kl, stride_vl, i_m, full_hi, hi,
        h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, True,
    )  # fmt: skip
    if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
        if i_m + BM > h:
            b_own_k = load_tile(p_k, i_m, n, stride_kl, D, BM, BD, True).to(tl.float32)
            b_own_v = load_tile(p_v, i_m, n, stride_vl, D, BM, BD, True).to(tl.float32)
            _, b_ds = self_gradient(
                b_q.to(tl.float32), b_own_k, b_own_v, b_dout.to(tl.float32), b_lse, b_delta, scale_log2
            )
            m_candidate = i_m + tl.arange(0, BM) >= h
            b_dq += tl.where(m_candidate, b_ds, 0.0)[:, None] * b_own_k

    store_tile(p_dq, b_dq * scale, i_m, n, H * D, D, BM, BD)


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous `(L, H, D)`; `out` and `lse` as the forward gave them."""
    L, H, D = q.shape
    dq, dk, dv = (torch.empty((L, H, D), dtype=q.dtype, device=q.device) for _ in range(3))
    delta = torch.empty_like(lse)
    tiles = choose_tiles(D, q.dtype, q.device)
    shape = LaunchShape(num_users=offsets.shape[0] - 1, num_heads=H, max_seqlen=max_seqlen)
    block_d = triton.next_power_of_2(D)
    if L == 0:
        return dq, dk, dv

    inputs = (q, k, v, dout, lse, delta)
    bounds = (offsets, offsets if num_targets is None else num_targets)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    with launch_on(q.device):
        delta_kernel[checked_grid(triton.cdiv(L, tiles.delta.block_m) * H)](
            out, dout, delta, dout.stride(0), dout.stride(1), L, H=H, D=D, BM=tiles.delta.block_m, BD=block_d,
            num_warps=tiles.delta.num_warps, num_stages=tiles.delta.num_stages,
        )  # fmt: skip
        for kernel, outputs, tile, block in (
            (dkv_kernel, (dk, dv), tiles.dkv, tiles.dkv.block_n),
            (dq_kernel, (dq,), tiles.dq, tiles.dq.block_m),
        ):
            kernel[shape.grid(block)](
                *inputs, *outputs, *bounds, *strides,
                L, max_seqlen, shape.num_tiles(block), window or 0, scale, scale * LOG2_E,
                H=H, D=D, BM=tile.block_m, BN=tile.block_n, BD=block_d,
                CAUSAL=causal, HAS_WINDOW=window is not None, HAS_TARGETS=num_targets is not None,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return dq, dk, dv
