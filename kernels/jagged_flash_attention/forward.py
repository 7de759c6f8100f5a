# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward: one program per tile of queries, online softmax over the keys it sees.

Scores are kept in base 2 (multiplied by log2 e), so that `exp2`, one instruction, does for the exponential.
For every query the kernel also stores the base-2 log-sum-exp of its scores, from which the backward
recomputes the probabilities. Names: see tiles.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged_flash_attention.launch import LaunchShape, launch_on
from kernels.jagged_flash_attention.tiles import is_visible, key_range, load_tile, load_user, store_tile
from kernels.jagged_flash_attention.tuning import choose_tiles

LOG2_E = math.log2(math.e)


@triton.jit  # pragma: no cover
def attend(
    b_acc,  # (BM, BD) sum of p v so far
    b_max,  # (BM,) greatest score so far
    b_sum,  # (BM,) sum of p so far, relative to b_max
    b_q,
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
    """Take history keys lo ... hi into the running softmax; only EDGE tiles are bounds-checked and masked."""
    for i_n in tl.range(lo, hi, BN):
        b_k = load_tile(p_k, i_n, h, stride_kl, D, BN, BD, EDGE)
        b_v = load_tile(p_v, i_n, h, stride_vl, D, BN, BD, EDGE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # (BM, BN)
        if EDGE:
            o_m = (i_m + tl.arange(0, BM))[:, None]
            o_n = (i_n + tl.arange(0, BN))[None, :]
            m_s = is_visible(o_m, o_n, h, window, CAUSAL, HAS_WINDOW, HAS_TARGETS)
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = b_new_max
        if EDGE:  # a query may not have seen any key yet: -inf - (-inf) would be NaN
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")
        b_max = b_new_max
    return b_acc, b_max, b_sum


@triton.jit  # pragma: no cover
def attend_self(
    b_acc,
    b_max,
    b_sum,
    b_q,
    p_k,
    p_v,
    stride_kl,
    stride_vl,
    i_m,
    n,
    h,
    scale_log2,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Let every candidate of the tile see itself: the diagonal, one row-wise product."""
    b_k = load_tile(p_k, i_m, n, stride_kl, D, BM, BD, True).to(tl.float32)
    b_v = load_tile(p_v, i_m, n, stride_vl, D, BM, BD, True).to(tl.float32)
    m_candidate = i_m + tl.arange(0, BM) >= h
    b_s = tl.where(m_candidate, tl.sum(b_q.to(tl.float32) * b_k, 1) * scale_log2, float("-inf"))
    b_new_max = tl.maximum(b_max, b_s)
    b_p = tl.exp2(b_s - b_new_max)
    b_decay = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + b_p
    b_acc = b_acc * b_decay[:, None] + b_p[:, None] * b_v
    return b_acc, b_new_max, b_sum


# Totals and lengths differ in every batch: a kernel specialised on them would be compiled over and over.
@triton.jit(do_not_specialize=["L", "max_seqlen", "num_tiles", "window"])  # pragma: no cover
def jagged_flash_attention_forward_kernel(
    p_q,  # (L, H, D)
    p_k,
    p_v,
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2
    p_offsets,  # (B + 1,)
    p_num_targets,  # (B,), not read unless HAS_TARGETS
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    L,
    max_seqlen,
    num_tiles,
    window,
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
    """One tile of BM queries of one user and head."""
    pid = tl.program_id(0)
    i_m = (num_tiles - 1 - pid % num_tiles) * BM  # the last tile first: under a causal mask it is the longest
    i_b = pid // num_tiles // H
    i_h = (pid // num_tiles % H).to(tl.int64)

    bos, n, h = load_user(p_offsets, p_num_targets, i_b, L, max_seqlen, HAS_TARGETS)
    if i_m >= n:
        return
    p_q += bos * stride_ql + i_h * stride_qh
    p_k += bos * stride_kl + i_h * stride_kh
    p_v += bos * stride_vl + i_h * stride_vh
    p_out += (bos * H + i_h) * D
    p_lse += i_h * L + bos

    b_q = load_tile(p_q, i_m, n, stride_ql, D, BM, BD, True)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)

    lo, full_lo, full_hi, hi = key_range(i_m, n, h, window, BM, BN, CAUSAL, HAS_WINDOW)
    if HAS_WINDOW:
        b_acc, b_max, b_sum = attend(
            b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kl, stride_vl, i_m, lo, full_lo,
            h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, True,
        )  # fmt: skip
    b_acc, b_max, b_sum = attend(
        b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kl, stride_vl, i_m, full_lo, full_hi,
        h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, False,
    )  # fmt: skip
    b_acc, b_max, b_sum = attend(
        b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kl, stride_vl, i_m, full_hi, hi,
        h, window, scale_log2, D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, True,
    )  # fmt: skip
    if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
        if i_m + BM > h:
            b_acc, b_max, b_sum = attend_self(
                b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kl, stride_vl, i_m, n, h, scale_log2, D, BM, BD
            )

    store_tile(p_out, b_acc / b_sum[:, None], i_m, n, H * D, D, BM, BD)
    o_m = i_m + tl.arange(0, BM)
    tl.store(p_lse + o_m, b_max + tl.log2(b_sum), mask=o_m < n)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `(L, H, D)` in q's dtype and base-2 log-sum-exp `(H, L)` in float32, both contiguous."""
    L, H, D = q.shape
    out = torch.empty((L, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((H, L), dtype=torch.float32, device=q.device)
    tile = choose_tiles(D, q.dtype, q.device).forward
    shape = LaunchShape(num_users=offsets.shape[0] - 1, num_heads=H, max_seqlen=max_seqlen)
    grid = shape.grid(tile.block_m)
    if grid[0] == 0:
        return out, lse
    with launch_on(q.device):
        jagged_flash_attention_forward_kernel[grid](
            q, k, v, out, lse, offsets, offsets if num_targets is None else num_targets,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            L, max_seqlen, shape.num_tiles(tile.block_m), window or 0, scale * LOG2_E,
            H=H, D=D, BM=tile.block_m, BN=tile.block_n, BD=triton.next_power_of_2(D),
            CAUSAL=causal, HAS_WINDOW=window is not None, HAS_TARGETS=num_targets is not None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse
