# mypy: allow-untyped-defs, allow-incomplete-defs
"""The pieces that the forward and the backward kernels share: where a user is, which tiles it needs, loads.

Names, here and in the kernels: B users, H heads, D head dim, L tokens of all users together; BM x BN tiles of
queries x keys, BD the head dim padded to a power of two; `i_*` indices, `o_*` offsets of a tile's rows within
the user, `m_*` masks, `p_*` pointers, `b_*` blocks on the chip. A user's rows are `bos <= row < bos + n`; its
first h tokens are history, the other n - h candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # pragma: no cover
def load_user(p_offsets, p_num_targets, i_b, L, max_seqlen, HAS_TARGETS: tl.constexpr):
    """First row (int64), number of tokens, number of history tokens.

    Clamped so that no offsets, however wrong, make a kernel touch memory outside its tensors.
    """
    bos = tl.minimum(tl.maximum(tl.load(p_offsets + i_b).to(tl.int64), 0), L)
    eos = tl.minimum(tl.maximum(tl.load(p_offsets + i_b + 1).to(tl.int64), bos), L)
    n = tl.minimum(eos - bos, max_seqlen).to(tl.int32)
    h = n
    if HAS_TARGETS:
        num_targets = tl.load(p_num_targets + i_b).to(tl.int64)
        h = (n - tl.minimum(tl.maximum(num_targets, 0), n)).to(tl.int32)
    return bos, n, h


@triton.jit  # pragma: no cover
def load_tile(
    p_user,
    i_row,
    num_rows,
    stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Rows i_row ... i_row + BLOCK of one user and head as (BLOCK, BD).

    Zero past D and, with CHECK, past num_rows; without CHECK all these rows must exist. Addresses are int64:
    rows x stride passes 2^31 long before memory is full.
    """
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BD)
    o_tile = o_row[:, None].to(tl.int64) * stride + o_d[None, :]
    p_tile = p_user + tl.cast(i_row, tl.int64) * stride + o_tile
    m_row = (i_row + o_row < num_rows)[:, None]
    m_d = (o_d < D)[None, :]
    if CHECK and D < BD:
        return tl.load(p_tile, mask=m_row & m_d, other=0.0)
    elif CHECK:
        return tl.load(p_tile, mask=m_row, other=0.0)
    elif D < BD:
        return tl.load(p_tile, mask=m_d, other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit  # pragma: no cover
def store_tile(p_user, b_tile, i_row, num_rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    """Write a (BLOCK, BD) block to rows i_row ... i_row + BLOCK, as far as the user and the head go."""
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BD)
    o_tile = o_row[:, None].to(tl.int64) * stride + o_d[None, :]
    p_tile = p_user + tl.cast(i_row, tl.int64) * stride + o_tile
    mask = (i_row + o_row < num_rows)[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, b_tile.to(p_user.dtype.element_ty), mask=mask)


@triton.jit  # pragma: no cover
def load_rowwise(p_user, i_row, num_rows, other, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """One float per row (log-sum-exp, delta): (BLOCK,), `other` past num_rows when CHECK."""
    o_row = i_row + tl.arange(0, BLOCK)
    if CHECK:
        return tl.load(p_user + o_row, mask=o_row < num_rows, other=other)
    else:
        return tl.load(p_user + o_row)


@triton.jit  # pragma: no cover
def is_visible(o_m, o_n, h, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TARGETS: tl.constexpr):
    """Whether query o_m sees *history* key o_n; a candidate's sight of itself is a step of its own.

    o_m and o_n broadcast against each other: (BM, 1) and (1, BN), or (1, BM) and (BN, 1).
    """
    mask = o_n < h
    if CAUSAL:
        mask = mask & (o_n <= o_m)  # holds for every candidate too: it comes after the history
    if HAS_WINDOW:
        in_window = o_m - o_n < window
        if not CAUSAL:
            in_window = in_window & (o_n - o_m < window)
        if HAS_TARGETS:
            in_window = in_window | (o_m >= h)
        mask = mask & in_window
    return mask


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
def key_range(i_m, n, h, window, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
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
    # Candidates see the whole history: with one in the tile all of it is visited, with nothing else in it
    # none of it is masked.
    has_candidate = tl.minimum(i_m + BM, n) > h
    only_candidates = i_m >= h
    lo = tl.where(has_candidate, 0, lo)
    hi = tl.minimum(tl.where(has_candidate, h, hi), h)
    full_lo = tl.where(only_candidates, 0, full_lo)
    full_hi = tl.where(only_candidates, h, full_hi)
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
