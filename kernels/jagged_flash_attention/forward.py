# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward: one program per tile of queries, online softmax over the keys it sees.

Scores are kept in base 2 (multiplied by log2 e), so that `exp2`, one instruction, does for the exponential.
For every query the kernel also stores the base-2 log-sum-exp of its scores, from which the backward
recomputes the probabilities. Names: see tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import Launcher, descriptors, grid_of, next_power_of_2
from kernels.jagged.tiles import (
    finite_or_zero,
    inverse_or_zero,
    is_visible,
    load_entry,
    load_tile,
    store_tile,
    visible_keys,
)
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.tiles import is_kept, key_range
from kernels.jagged_flash_attention.tuning import Tile


@triton.jit  # pragma: no cover
def attend(
    b_acc,  # (BM, BD) sum of p v so far
    b_max,  # (BM,) greatest score so far
    b_sum,  # (BM,) sum of p so far, relative to b_max
    b_q,
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
    """Take history keys lo ... hi into the running softmax; only EDGE tiles are bounds-checked and masked."""
    first, end = visible_keys((i_m + tl.arange(0, BM))[:, None], h, window, CAUSAL, HAS_WINDOW, HAS_TARGETS)
    for i_n in tl.range(lo, hi, BN):
        if TMA and not EDGE:
            b_k = desc_k.load([k_row + i_n, column_k])
            b_v = desc_v.load([k_row + i_n, column_k])
        else:
            b_k = load_tile(p_k, i_n, h, stride_kl, D, BN, BD, EDGE)
            b_v = load_tile(p_v, i_n, h, stride_vl, D, BN, BD, EDGE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BM, BN), not scaled
        o_key = tl.arange(0, BN)[None, :]
        if EDGE:
            b_s = tl.where(is_visible(o_key, i_n, first, end, HAS_WINDOW), b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)  # the scale is positive
        b_shift = b_new_max
        if EDGE and HAS_WINDOW:  # a query may not have seen any key yet
            b_shift = finite_or_zero(b_new_max)
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        if DROPOUT:
            o_row = i_row + tl.arange(0, BM)[:, None]
            b_p = tl.where(is_kept(seed, o_row, i_h, i_n + o_key, drop_below), b_p, 0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
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
    seed,
    i_row,
    i_h,
    drop_below,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Let every candidate of the tile see itself: the diagonal, one row-wise product."""
    b_k = load_tile(p_k, i_m, n, stride_kl, D, BM, BD, True).to(tl.float32)
    b_v = load_tile(p_v, i_m, n, stride_vl, D, BM, BD, True).to(tl.float32)
    o_m = i_m + tl.arange(0, BM)
    b_s = tl.where(o_m >= h, tl.sum(b_q.to(tl.float32) * b_k, 1) * scale_log2, float("-inf"))
    b_new_max = tl.maximum(b_max, b_s)
    b_p = tl.exp2(b_s - b_new_max)
    b_decay = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + b_p
    if DROPOUT:
        b_p = tl.where(is_kept(seed, i_row + tl.arange(0, BM), i_h, o_m, drop_below), b_p, 0.0)
    b_acc = b_acc * b_decay[:, None] + b_p[:, None] * b_v
    return b_acc, b_new_max, b_sum


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@triton.jit(do_not_specialize=["L", "window", "drop_below", "keep_scale"])  # pragma: no cover
def jagged_flash_attention_forward_kernel(
    desc_k,  # of k as (keys, H // G * D), read only with TMA
    desc_v,
    p_q,  # (L, H, D)
    p_k,  # (keys, H // G, D)
    p_v,
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2, written only with HAS_LSE
    p_tiles,  # (entries, 8), tiles of BM queries
    p_seed,  # (1,) int64, read only with DROPOUT
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    L,
    window,
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
    HAS_LSE: tl.constexpr,
):
    """One tile of BM queries of one user and head."""
    pid = tl.program_id(0)
    i_h = pid % H  # heads next to each other share the lines of their rows
    q_start, n, k_start, _num_keys, i_tile, h = load_entry(p_tiles, pid // H)
    if n == 0:
        return
    i_m = i_tile * BM
    p_q += q_start * stride_ql + i_h.to(tl.int64) * stride_qh
    p_k += k_start * stride_kl + (i_h // G).to(tl.int64) * stride_kh
    p_v += k_start * stride_vl + (i_h // G).to(tl.int64) * stride_vh
    i_row = q_start + i_m
    k_row = k_start.to(tl.int32)
    column_k = i_h // G * D
    seed = 0
    if DROPOUT:
        seed = tl.load(p_seed)

    b_q = load_tile(p_q, i_m, n, stride_ql, D, BM, BD, True)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)

    lo, full_lo, full_hi, hi = key_range(i_m, n, h, window, BM, BN, CAUSAL, HAS_WINDOW, HAS_TARGETS)
    if not SPLIT:  # one loop, all of it masked
        full_lo = hi
    for part in tl.static_range(0 if HAS_WINDOW or not SPLIT else 1, 3 if SPLIT else 1):  # masked, not masked, masked
        begin, end = lo, full_lo
        if part == 1:
            begin, end = full_lo, full_hi
        elif part == 2:
            begin, end = full_hi, hi
        b_acc, b_max, b_sum = attend(
            b_acc, b_max, b_sum, b_q, p_k, p_v, desc_k, desc_v, stride_kl, stride_vl, i_m, begin, end, k_row, column_k,
            h, window, scale_log2, seed, i_row, i_h, drop_below,
            D, BM, BN, BD, CAUSAL, HAS_WINDOW, HAS_TARGETS, DROPOUT, PRECISION, TMA, part != 1,
        )  # fmt: skip
    if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
        if i_m + BM > h:
            b_acc, b_max, b_sum = attend_self(
                b_acc, b_max, b_sum, b_q, p_k, p_v, stride_kl, stride_vl, i_m, n, h, scale_log2,
                seed, i_row, i_h, drop_below, D, BM, BD, DROPOUT,
            )  # fmt: skip

    # In cross attention a user may have queries and no keys: their output is zero, as is every gradient.
    b_norm = inverse_or_zero(b_sum)
    if DROPOUT:
        b_norm = b_norm * keep_scale
    store_tile(p_out + (q_start * H + i_h) * D, b_acc * b_norm[:, None], i_m, n, H * D, D, BM, BD)
    if HAS_LSE:
        b_lse = tl.where(b_sum == 0.0, float("inf"), b_max + tl.log2(b_sum))
        o_m = i_m + tl.arange(0, BM)
        tl.store(p_lse + i_h.to(tl.int64) * L + q_start + o_m, b_lse, mask=o_m < n)


launch = Launcher(jagged_flash_attention_forward_kernel, "num_warps", "num_stages", "maxnreg")


def empty_lse(q: Tensor) -> Tensor:
    """Memory for the log-sum-exp of queries `(L, H, D)`: `(H, L)`, float32."""
    return q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    call: Call,
    tile: Tile,
    lse: Tensor | None,
    seed: Tensor | None = None,
) -> Tensor:
    """Output `(L, H, D)`, contiguous, in q's dtype.

    Args:
        q, k, v: `(L, H, D)` and twice `(keys, H // G, D)`, contiguous in the last dimension.
        tiles: `(entries, 8)`, the tiles of `tile.block_m` queries; see tile_lists.py.
        call: mask, scale and dropout.
        tile: how to compute it.
        lse: `(H, L)`, float32 and contiguous, written: log-sum-exp in base 2, which the backward needs; None: nobody
            wants it.
        seed: `(1,)` int64, where there is dropout.
    """
    L, H, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if L == 0 or tiles.shape[0] == 0:
        return out
    stride_ql, stride_qh, _ = q.stride()
    stride_kl, stride_kh, _ = k.stride()
    stride_vl, stride_vh, _ = v.stride()
    desc_k, desc_v = descriptors(k, v, block=tile.block_n, wanted=tile.tma)
    launch(
        grid_of(tiles, H),
        (desc_k, desc_v),
        (q, k, v, out, out if lse is None else lse, tiles, tiles if seed is None else seed),
        (stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh),
        (L, call.window or 0, call.scale_log2, call.drop_below, call.keep_scale),
        (
            H, H // k.shape[1], D, tile.block_m, tile.block_n, next_power_of_2(D), *call.constants,
            desc_k is not None, tile.split, lse is not None,
        ),
        (tile.num_warps, tile.num_stages, tile.max_registers),
    )  # fmt: skip
    return out
