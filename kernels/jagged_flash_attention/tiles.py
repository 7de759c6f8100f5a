# mypy: allow-untyped-defs, allow-incomplete-defs
"""The pieces that the forward and the backward kernels share: ranges, visibility from the side of a key, dropout.

Names, here and in the kernels: L tokens of all users together, H heads, D head dim; BM x BN tiles of queries x keys,
BD the head dim padded to a power of two; `i_*` indices, `o_*` offsets of a tile's rows within the user, `m_*` masks,
`p_*` pointers, `b_*` blocks on the chip. A user has n queries; h of its keys are history, which others may see. In
self attention the other n - h tokens are candidates, which see the history and themselves; in cross attention there
are none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # pragma: no cover
def load_rowwise(p_user, i_row, num_rows, other, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """One float per row (log-sum-exp, delta): (BLOCK,), `other` past num_rows when CHECK."""
    o_row = i_row + tl.arange(0, BLOCK)
    if CHECK:
        return tl.load(p_user + o_row, mask=o_row < num_rows, other=other)
    else:
        return tl.load(p_user + o_row)


@triton.jit  # pragma: no cover
def sees_key(o_query, i_m, o_n, h, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TARGETS: tl.constexpr):
    """The same from the other side: whether query i_m + o_query sees *history* key o_n; only where there is a mask."""
    mask = o_query >= o_n - i_m
    if not CAUSAL:
        mask = o_query > o_n - window - i_m
    if HAS_WINDOW:
        in_window = o_query < o_n + window - i_m
        if HAS_TARGETS:
            in_window = in_window | (o_query >= h - i_m)
        mask = mask & in_window
    return mask


@triton.jit  # pragma: no cover
def is_kept(seed, i_row, i_h, o_n, drop_below):
    """Whether dropout keeps the pair of query row i_row (of the whole tensor), head i_h and key o_n of its user.

    Philox of these three, so forward and backward agree, whatever their tiles; i_row and o_n broadcast.
    """
    row = (i_row + o_n * 0).to(tl.uint32)
    key = (i_row * 0 + o_n).to(tl.uint32)
    head = (row * 0 + i_h).to(tl.uint32)
    random, _, _, _ = tl.philox(seed, key, row, head, row * 0)
    return random.to(tl.int64) >= drop_below


@triton.jit  # pragma: no cover
def split_range(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """Tile starts for a loop over [lo, hi) of which only [full_lo, full_hi) needs no mask.

    Gives (lo, full_lo, full_hi, hi) such that [lo, full_lo) and [full_hi, hi) are the edges, whose tiles are
    masked, and every tile of [full_lo, full_hi) lies inside the unmasked part. No tile is visited twice.
    """
    hi = tl.maximum(hi, 0)
    lo = tl.minimum(tl.maximum(lo, 0) // BLOCK * BLOCK, hi)
    end = lo + tl.cdiv(hi - lo, BLOCK) * BLOCK
    full_lo = tl.minimum(tl.cdiv(tl.maximum(full_lo, lo), BLOCK) * BLOCK, end)
    full_hi = tl.maximum(tl.minimum(full_hi, hi) // BLOCK * BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit  # pragma: no cover
def key_range(
    i_m,
    n,
    h,
    window,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """The history keys that queries i_m ... i_m + BM see, as `split_range` gives them."""
    last = tl.minimum(i_m + BM, h) - 1  # last history query of the tile, if it has one
    lo, full_lo, full_hi, hi = 0, 0, h, h
    if CAUSAL:
        hi = last + 1
        full_hi = i_m + 1
    elif HAS_WINDOW:
        hi = last + window
        full_hi = i_m + window
    if HAS_WINDOW:
        lo = i_m - window + 1
        full_lo = last - window + 1
    if HAS_TARGETS:
        # Candidates see the whole history: with one in the tile all of it is visited, with nothing else in it
        # none of it is masked.
        has_candidate = tl.minimum(i_m + BM, n) > h
        only_candidates = i_m >= h
        lo = tl.where(has_candidate, 0, lo)
        hi = tl.where(has_candidate, h, hi)
        full_lo = tl.where(only_candidates, 0, full_lo)
        full_hi = tl.where(only_candidates, h, full_hi)
    hi = tl.minimum(hi, h)
    return split_range(lo, full_lo, full_hi, hi, BN)


@triton.jit  # pragma: no cover
def query_range(
    i_n,
    num_queries,
    h,
    window,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The queries below num_queries that see history keys i_n ... i_n + BN, as `split_range` gives them.

    Without a window a candidate is a query like any other that comes late, so num_queries is n; with one, the
    candidates are left to a loop of their own and num_queries is h.
    """
    last = tl.minimum(i_n + BN, h) - 1  # last history key of the tile
    lo, full_lo, full_hi, hi = 0, 0, num_queries, num_queries
    if CAUSAL:
        lo = i_n
        full_lo = last
    elif HAS_WINDOW:
        lo = i_n - window + 1
        full_lo = last - window + 1
    if HAS_WINDOW:
        hi = tl.minimum(last + window, num_queries)
        full_hi = i_n + window
    hi = tl.where(i_n < h, hi, 0)  # a tile of candidate keys only: nobody but themselves
    return split_range(lo, full_lo, full_hi, hi, BM)


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
