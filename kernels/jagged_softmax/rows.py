# mypy: allow-untyped-defs, allow-incomplete-defs
"""Softmax over the rows of jagged scores: one program per BR queries and head.

A block on the chip has as many elements whether its rows are short or long: BR rows of BN keys where the queries see
few keys, half as many rows of twice as many keys where they see more, and so on for some classes. What sees more keys
than the last class has is read twice.

Names: see kernels/jagged/tiles.py; T scores of all users together, placed as kernels/jagged/score_layout.py says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import INTERPRETED, LOG2_E, Launcher, grid_of
from kernels.jagged.score_layout import BLOCK
from kernels.jagged.tiles import (
    finite_or_zero,
    first_of_head,
    first_score,
    inverse_or_zero,
    is_visible,
    load_entry,
    load_scores,
    load_user_index,
    pitch_of,
    store_scores,
    visible_keys,
)


class Block(NamedTuple):
    """Of the first class; a program has as many queries as this has rows, which is a part of a tile of BLOCK."""

    rows: int
    keys: int
    classes: int


LONG = 40 if INTERPRETED else 512  # keys; where users may have more, rows of the first class are longer
FORWARD, BACKWARD = (Block(16, 16, 3), Block(8, 16, 3)) if INTERPRETED else (Block(32, 64, 4), Block(16, 64, 4))
LONG_BLOCK = Block(8, 16, 3) if INTERPRETED else Block(16, 128, 5)
NUM_WARPS = 4


@triton.jit  # pragma: no cover
def load_visible(
    p_s, i_m, i_n, n, num_keys, hi, h, window, scale_log2, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_TARGETS: tl.constexpr,
):  # fmt: skip
    """Scores in base 2, (BM, BN) float32; -inf where the query doesn't see the key. None of them sees hi or beyond."""
    o_m = (i_m + tl.arange(0, BM))[:, None]
    o_n = tl.arange(0, BN)[None, :]
    first, end = visible_keys(o_m, h, window, CAUSAL, HAS_WINDOW, HAS_TARGETS)
    mask = is_visible(o_n, i_n, first, end, HAS_WINDOW)
    if HAS_TARGETS:
        mask = mask | ((o_m >= h) & (o_m == i_n + o_n))
    b_s = load_scores(p_s, i_m, i_n, n, num_keys, hi, BM, BN).to(tl.float32) * scale_log2
    return tl.where(mask, b_s, float("-inf"))


@triton.jit  # pragma: no cover
def seen_range(
    i_m, n, num_keys, h, window, BR: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):  # fmt: skip
    """Keys before the first and from the second on are seen by none of BR queries; 8 divides the first."""
    lo, hi = 0, num_keys
    if CAUSAL:
        hi = tl.minimum(i_m + BR, num_keys)
    elif HAS_WINDOW:
        hi = tl.minimum(i_m + BR - 1 + window, num_keys)
    if HAS_WINDOW:
        lo = tl.maximum(i_m - window + 1, 0) // 8 * 8
    if HAS_TARGETS:  # candidates see the whole history, and themselves behind it
        has_candidate = tl.minimum(i_m + BR, n) > h
        lo = tl.where(has_candidate, 0, lo)
        hi = tl.where(has_candidate, num_keys, hi)
    return lo, hi


@triton.jit  # pragma: no cover
def store_zeros(p_rows, i_first, end, lo, hi, num_keys, BR: tl.constexpr, BN: tl.constexpr):
    """Zero keys lo ... hi, which 8 divides, of queries i_first ... end."""
    o_m, o_n = tl.arange(0, BR)[:, None], tl.arange(0, BN)[None, :]
    pitch = pitch_of(num_keys)
    zeros = tl.zeros([BR, BN], dtype=p_rows.dtype.element_ty)
    for i_m in range(i_first, end, BR):
        p_group = p_rows + tl.cast(i_m, tl.int64) * pitch + o_m * pitch
        for i_n in range(lo, hi, BN):
            tl.store(p_group + (i_n + o_n), zeros, mask=(i_m + o_m < end) & (i_n + o_n < hi))


@triton.jit  # pragma: no cover
def is_of_class(num_seen, i_class: tl.constexpr, BN: tl.constexpr):
    """Whether so many keys fit into BN << i_class, and not into half of it."""
    fits = num_seen <= BN << i_class
    if i_class > 0:
        fits = fits & (num_seen > BN << (i_class - 1))
    return fits


@triton.jit  # pragma: no cover
def softmax_at_once(
    p_s, p_p, i_first, end, lo, n, num_keys, h, window, scale_log2, BR: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TARGETS: tl.constexpr,
):  # fmt: skip
    """Probabilities of queries i_first ... end, BR at a time, which see at most the BN keys from lo on."""
    for i_m in range(i_first, end, BR):
        _, hi = seen_range(i_m, n, num_keys, h, window, BR, CAUSAL, HAS_WINDOW, HAS_TARGETS)
        b_s = load_visible(
            p_s, i_m, lo, n, num_keys, hi, h, window, scale_log2, BR, BN, CAUSAL, HAS_WINDOW, HAS_TARGETS
        )
        b_max = tl.max(b_s, 1)
        b_p = tl.exp2(b_s - finite_or_zero(b_max)[:, None])
        b_sum = tl.sum(b_p, 1)
        store_scores(p_p, b_p * inverse_or_zero(b_sum)[:, None], i_m, lo, n, num_keys, BR, BN)
    store_zeros(p_p, i_first, end, 0, lo, num_keys, BR, BN)
    store_zeros(p_p, i_first, end, lo + BN, pitch_of(num_keys), num_keys, BR, BN)


@triton.jit  # pragma: no cover
def softmax_in_turns(
    p_s, p_p, i_first, end, n, num_keys, h, window, scale_log2, BR: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TARGETS: tl.constexpr,
):  # fmt: skip
    """Probabilities of queries i_first ... end, BR at a time, BN keys at a time."""
    for i_m in range(i_first, end, BR):
        lo, hi = seen_range(i_m, n, num_keys, h, window, BR, CAUSAL, HAS_WINDOW, HAS_TARGETS)
        b_max = tl.full([BR], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BR], dtype=tl.float32)
        for i_n in range(lo, hi, BN):
            b_s = load_visible(
                p_s, i_m, i_n, n, num_keys, hi, h, window, scale_log2, BR, BN, CAUSAL, HAS_WINDOW, HAS_TARGETS
            )
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = finite_or_zero(b_new_max)
            b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
            b_max = b_new_max
        b_shift = finite_or_zero(b_max)
        b_norm = inverse_or_zero(b_sum)
        for i_n in range(lo, hi, BN):
            b_s = load_visible(
                p_s, i_m, i_n, n, num_keys, hi, h, window, scale_log2, BR, BN, CAUSAL, HAS_WINDOW, HAS_TARGETS
            )
            store_scores(p_p, tl.exp2(b_s - b_shift[:, None]) * b_norm[:, None], i_m, i_n, n, num_keys, BR, BN)
        end_of_group = tl.minimum(i_m + BR, end)
        store_zeros(p_p, i_m, end_of_group, 0, lo, num_keys, BR, BN)
        after = lo + tl.cdiv(hi - lo, BN) * BN
        store_zeros(p_p, i_m, end_of_group, after, pitch_of(num_keys), num_keys, BR, BN)


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@triton.jit(do_not_specialize=["T", "window", "scale_log2"])  # pragma: no cover
def jagged_score_softmax_kernel(
    p_s,  # (H, T), contiguous
    p_p,  # (H, T), contiguous
    p_tiles,  # (entries, 8), tiles of BM queries
    p_offsets,  # (B + 1,), of scores
    T,
    window,
    scale_log2,
    H: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    CLASSES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """Probabilities of BR queries of one user and head."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = BM // BR
    i_h = pid // PARTS % H
    i_entry = pid // (PARTS * H)
    _q_start, n, _k_start, num_keys, i_tile, h = load_entry(p_tiles, i_entry)
    i_m = i_tile * BM + pid % PARTS * BR
    if i_m >= n:  # also where the entry is empty
        return
    start, is_inside = first_score(p_offsets, load_user_index(p_tiles, i_entry), n, num_keys, T)
    if not is_inside:
        return
    start += first_of_head(i_h, T)
    p_s += start
    p_p += start
    MOST: tl.constexpr = BN << (CLASSES - 1)
    end = tl.minimum(i_m + BR, n)
    lo, hi = seen_range(i_m, n, num_keys, h, window, BR, CAUSAL, HAS_WINDOW, HAS_TARGETS)
    if hi - lo > MOST:
        softmax_in_turns(
            p_s, p_p, i_m, end, n, num_keys, h, window, scale_log2,
            BR >> (CLASSES - 1), MOST, CAUSAL, HAS_WINDOW, HAS_TARGETS,
        )  # fmt: skip
    for i_class in tl.static_range(CLASSES):
        if is_of_class(hi - lo, i_class, BN):
            softmax_at_once(
                p_s, p_p, i_m, end, lo, n, num_keys, h, window, scale_log2,
                BR >> i_class, BN << i_class, CAUSAL, HAS_WINDOW, HAS_TARGETS,
            )  # fmt: skip


@triton.jit  # pragma: no cover
def load_products(p_p, p_dp, i_m, i_n, n, num_keys, hi, BR: tl.constexpr, BN: tl.constexpr):
    """Probabilities, and the gradients of those that aren't zero, both (BR, BN) float32.

    What a query doesn't see takes no part, whatever gradient it has; nor does what lies behind a row, where the forward
    wrote zero.
    """
    b_p = load_scores(p_p, i_m, i_n, n, num_keys, hi, BR, BN).to(tl.float32)
    b_dp = load_scores(p_dp, i_m, i_n, n, num_keys, hi, BR, BN).to(tl.float32)
    return b_p, tl.where(b_p == 0.0, 0.0, b_dp)


@triton.jit  # pragma: no cover
def gradient_at_once(
    p_p, p_dp, p_ds, i_first, end, lo, n, num_keys, h, window, scale, BR: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TARGETS: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores of queries i_first ... end, BR at a time, which see at most the BN keys from lo on."""
    for i_m in range(i_first, end, BR):
        _, hi = seen_range(i_m, n, num_keys, h, window, BR, CAUSAL, HAS_WINDOW, HAS_TARGETS)
        b_p, b_dp = load_products(p_p, p_dp, i_m, lo, n, num_keys, hi, BR, BN)
        b_delta = tl.sum(b_p * b_dp, 1)
        store_scores(p_ds, b_p * (b_dp - b_delta[:, None]) * scale, i_m, lo, n, num_keys, BR, BN)
    store_zeros(p_ds, i_first, end, 0, lo, num_keys, BR, BN)
    store_zeros(p_ds, i_first, end, lo + BN, pitch_of(num_keys), num_keys, BR, BN)


@triton.jit  # pragma: no cover
def gradient_in_turns(
    p_p, p_dp, p_ds, i_first, end, n, num_keys, h, window, scale, BR: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TARGETS: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores of queries i_first ... end, BR at a time, BN keys at a time."""
    for i_m in range(i_first, end, BR):
        lo, hi = seen_range(i_m, n, num_keys, h, window, BR, CAUSAL, HAS_WINDOW, HAS_TARGETS)
        b_delta = tl.zeros([BR], dtype=tl.float32)
        for i_n in range(lo, hi, BN):
            b_p, b_dp = load_products(p_p, p_dp, i_m, i_n, n, num_keys, hi, BR, BN)
            b_delta += tl.sum(b_p * b_dp, 1)
        for i_n in range(lo, hi, BN):
            b_p, b_dp = load_products(p_p, p_dp, i_m, i_n, n, num_keys, hi, BR, BN)
            store_scores(p_ds, b_p * (b_dp - b_delta[:, None]) * scale, i_m, i_n, n, num_keys, BR, BN)
        end_of_group = tl.minimum(i_m + BR, end)
        store_zeros(p_ds, i_m, end_of_group, 0, lo, num_keys, BR, BN)
        after = lo + tl.cdiv(hi - lo, BN) * BN
        store_zeros(p_ds, i_m, end_of_group, after, pitch_of(num_keys), num_keys, BR, BN)


@triton.jit(do_not_specialize=["T", "window", "scale"])  # pragma: no cover
def jagged_score_softmax_backward_kernel(
    p_p,  # (H, T), contiguous
    p_dp,  # (H, T), contiguous
    p_ds,  # (H, T), contiguous
    p_tiles,  # (entries, 8), tiles of BM queries
    p_offsets,  # (B + 1,), of scores
    T,
    window,
    scale,
    H: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    CLASSES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """ds = scale p (dp - sum of p dp over the row), of BR queries of one user and head."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = BM // BR
    i_h = pid // PARTS % H
    i_entry = pid // (PARTS * H)
    _q_start, n, _k_start, num_keys, i_tile, h = load_entry(p_tiles, i_entry)
    i_m = i_tile * BM + pid % PARTS * BR
    if i_m >= n:  # also where the entry is empty
        return
    start, is_inside = first_score(p_offsets, load_user_index(p_tiles, i_entry), n, num_keys, T)
    if not is_inside:
        return
    start += first_of_head(i_h, T)
    p_p += start
    p_dp += start
    p_ds += start
    MOST: tl.constexpr = BN << (CLASSES - 1)
    end = tl.minimum(i_m + BR, n)
    lo, hi = seen_range(i_m, n, num_keys, h, window, BR, CAUSAL, HAS_WINDOW, HAS_TARGETS)
    if hi - lo > MOST:
        gradient_in_turns(
            p_p, p_dp, p_ds, i_m, end, n, num_keys, h, window, scale,
            BR >> (CLASSES - 1), MOST, CAUSAL, HAS_WINDOW, HAS_TARGETS,
        )  # fmt: skip
    for i_class in tl.static_range(CLASSES):
        if is_of_class(hi - lo, i_class, BN):
            gradient_at_once(
                p_p, p_dp, p_ds, i_m, end, lo, n, num_keys, h, window, scale,
                BR >> i_class, BN << i_class, CAUSAL, HAS_WINDOW, HAS_TARGETS,
            )  # fmt: skip


launch_kernel = Launcher(jagged_score_softmax_kernel, "num_warps")
launch_backward_kernel = Launcher(jagged_score_softmax_backward_kernel, "num_warps")


def launch_score_softmax(
    scores: Tensor,
    query_tiles: Tensor,
    score_offsets: Tensor,
    max_key_seqlen: int,
    scale: float,
    causal: bool,
    window: int | None,
    has_targets: bool,
) -> Tensor:
    """Probabilities `(H, T)`; arguments as of `jagged_score_softmax`, scores contiguous, tiles of BLOCK queries.

    No user has more than `max_key_seqlen` keys.
    """
    H, T = scores.shape
    probabilities = torch.empty_like(scores)
    if T == 0 or query_tiles.shape[0] == 0:
        return probabilities
    block = FORWARD if max_key_seqlen <= LONG else LONG_BLOCK
    launch_kernel(
        grid_of(query_tiles, BLOCK // block.rows * H),
        (),
        (scores, probabilities, query_tiles, score_offsets),
        (),
        (T, window or 0, scale * LOG2_E),
        (H, BLOCK, *block, causal, window is not None, has_targets),
        (NUM_WARPS,),
    )
    return probabilities


def launch_score_softmax_backward(
    probabilities: Tensor,
    dout: Tensor,
    query_tiles: Tensor,
    score_offsets: Tensor,
    max_key_seqlen: int,
    scale: float,
    causal: bool,
    window: int | None,
    has_targets: bool,
) -> Tensor:
    """Gradient of the scores `(H, T)` from that of the probabilities; both contiguous. The mask is the forward's."""
    H, T = probabilities.shape
    dscores = torch.empty_like(probabilities)
    if T == 0 or query_tiles.shape[0] == 0:
        return dscores
    block = BACKWARD if max_key_seqlen <= LONG else LONG_BLOCK
    launch_backward_kernel(
        grid_of(query_tiles, BLOCK // block.rows * H),
        (),
        (probabilities, dout, dscores, query_tiles, score_offsets),
        (),
        (T, window or 0, scale),
        (H, BLOCK, *block, causal, window is not None, has_targets),
        (NUM_WARPS,),
    )
    return dscores
