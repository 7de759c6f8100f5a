# mypy: allow-untyped-defs, allow-incomplete-defs
"""The pieces that kernels share: entries of tile lists, tiles of rows and of scores, who sees whom.

Names, here and in the kernels: L tokens of all users together, H heads, D head dim; BM x BN tiles of queries x keys,
BD the head dim padded to a power of two; `i_*` indices, `o_*` offsets of a tile's rows within the user, `m_*` masks,
`p_*` pointers, `b_*` blocks on the chip. A user has n queries; h of its keys are history, which others may see. In
self attention the other n - h tokens are candidates, which see the history and themselves; in cross attention there
are none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.jagged.launch import next_power_of_2


@triton.jit  # pragma: no cover
def load_entry(p_tiles, i_entry):
    """A row of a tile list (see tile_lists.py): own start, own length, other start, other length, tile, history."""
    p_entry = p_tiles + i_entry.to(tl.int64) * 8
    own_start, own_len = tl.load(p_entry).to(tl.int64), tl.load(p_entry + 1)
    other_start, other_len = tl.load(p_entry + 2).to(tl.int64), tl.load(p_entry + 3)
    return own_start, own_len, other_start, other_len, tl.load(p_entry + 4), tl.load(p_entry + 5)


@triton.jit  # pragma: no cover
def load_user_index(p_tiles, i_entry):
    """Whose tile it is."""
    return tl.load(p_tiles + i_entry.to(tl.int64) * 8 + 6)


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

    Zero past D and, with CHECK, past num_rows; without CHECK all these rows must exist. The tile's address is int64:
    rows x stride passes 2^31 long before memory is full. Inside the tile int32 does (`launch.py` sees to it).
    """
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BD)
    p_tile = p_user + tl.cast(i_row, tl.int64) * stride + (o_row[:, None] * stride + o_d[None, :])
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
    p_tile = p_user + tl.cast(i_row, tl.int64) * stride + (o_row[:, None] * stride + o_d[None, :])
    mask = (i_row + o_row < num_rows)[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, b_tile.to(p_user.dtype.element_ty), mask=mask)


@triton.jit  # pragma: no cover
def visible_keys(o_m, h, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TARGETS: tl.constexpr):
    """Of each query o_m, the *history* keys it sees: from the first to below the second; both in the shape of o_m.

    A candidate's sight of itself is a step of its own.
    """
    first, end = o_m * 0, o_m * 0 + h
    if CAUSAL:
        end = o_m + 1
        if HAS_TARGETS:
            end = tl.minimum(end, h)  # a candidate comes after the history
    elif HAS_WINDOW:
        end = tl.minimum(o_m + window, h)
    if HAS_WINDOW:
        first = o_m - window + 1
        if HAS_TARGETS:
            first = tl.where(o_m >= h, 0, first)
            end = tl.where(o_m >= h, h, end)
    return first, end


@triton.jit  # pragma: no cover
def is_visible(o_key, i_n, first, end, HAS_WINDOW: tl.constexpr):
    """Whether key i_n + o_key lies between; one comparison per pair, two with a window.

    The bounds are moved instead of the keys: there are fewer of them, and o_key stays the same in every tile.
    """
    if HAS_WINDOW:
        return (o_key >= first - i_n) & (o_key < end - i_n)
    else:
        return o_key < end - i_n


@triton.jit  # pragma: no cover
def finite_or_zero(b_max):
    """What to subtract from scores with that maximum; of nothing but -inf it is zero, since -inf - (-inf) is NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit  # pragma: no cover
def inverse_or_zero(b_sum):
    """What to multiply exponentials by that have that sum; zero where there are none."""
    return tl.where(b_sum == 0.0, 0.0, 1.0 / b_sum)


@triton.jit  # pragma: no cover
def pitch_of(num_keys):
    """As `row_pitch`; the compiler knows that 8 divides it, and so reads and writes 16 bytes at a time."""
    return (num_keys + 7) // 8 * 8


@triton.jit  # pragma: no cover
def first_score(p_offsets, i_user, n, num_keys, T):
    """First score of a user in a row of `(H, T)`, which 8 divides; and whether all of them lie inside of the row.

    If not, nothing may be touched, whatever offsets and totals say.
    """
    start = tl.load(p_offsets + i_user) // 8 * 8
    return start, (start >= 0) & (start + n.to(tl.int64) * pitch_of(num_keys) <= T)


@triton.jit  # pragma: no cover
def first_of_head(i_h, T):
    """First score of a head in `(H, T)`; 8 divides T, and here the compiler sees it."""
    return tl.cast(i_h, tl.int64) * (T // 8 * 8)


@triton.jit  # pragma: no cover
def load_scores(p_user, i_m, i_n, n, num_keys, end, BM: tl.constexpr, BN: tl.constexpr):
    """Scores of queries i_m ... i_m + BM and keys i_n ... i_n + BN of a user and head, as far as key `end`: (BM, BN).

    Zero from the multiple of 8 above `end` on, and past the queries; in between is whatever the memory holds.
    """
    o_m, o_n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    pitch = pitch_of(num_keys)
    p_tile = p_user + (tl.cast(i_m, tl.int64) * pitch + i_n) + (o_m * pitch + o_n)
    return tl.load(p_tile, mask=(i_m + o_m < n) & (i_n + o_n < pitch_of(end)), other=0.0)


@triton.jit  # pragma: no cover
def store_scores(p_user, b_s, i_m, i_n, n, num_keys, BM: tl.constexpr, BN: tl.constexpr):
    """Write such a tile, as far as the user goes; it has to be zero from the end of a row to the next."""
    o_m, o_n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    pitch = pitch_of(num_keys)
    p_tile = p_user + (tl.cast(i_m, tl.int64) * pitch + i_n) + (o_m * pitch + o_n)
    tl.store(p_tile, b_s.to(p_user.dtype.element_ty), mask=(i_m + o_m < n) & (i_n + o_n < pitch))


@triton.jit  # pragma: no cover
def row_and_columns(C: tl.constexpr, BC: tl.constexpr):
    """Of a program in a grid of rows (users, tiles) x blocks of BC columns: which row, and the first column."""
    pid = tl.program_id(0)
    return pid // tl.cdiv(C, BC), pid % tl.cdiv(C, BC) * BC


@triton.jit  # pragma: no cover
def load_columns(
    p_rows, i_row, num_rows, stride, i_column, num_columns, BLOCK: tl.constexpr, BC: tl.constexpr,
    EVICTION: tl.constexpr = tl.constexpr(""),  # noqa: B008
):  # fmt: skip
    """Rows i_row ... and columns i_column ... of one user: (BLOCK, BC), zero past their ends.

    EVICTION says what the cache may drop first, as of tl.load.
    """
    o_row, o_column = tl.arange(0, BLOCK)[:, None], i_column + tl.arange(0, BC)[None, :]
    p_part = p_rows + tl.cast(i_row, tl.int64) * stride + (o_row.to(tl.int64) * stride + o_column)
    mask = (i_row + o_row < num_rows) & (o_column < num_columns)
    return tl.load(p_part, mask=mask, other=0.0, eviction_policy=EVICTION)


@triton.jit  # pragma: no cover
def store_columns(
    p_rows, b_part, i_row, num_rows, stride, i_column, num_columns, BLOCK: tl.constexpr, BC: tl.constexpr
):
    """Write such a block, as far as rows and columns go."""
    o_row, o_column = tl.arange(0, BLOCK)[:, None], i_column + tl.arange(0, BC)[None, :]
    p_part = p_rows + tl.cast(i_row, tl.int64) * stride + (o_row.to(tl.int64) * stride + o_column)
    mask = (i_row + o_row < num_rows) & (o_column < num_columns)
    tl.store(p_part, b_part.to(p_rows.dtype.element_ty), mask=mask)


def columns_per_tile(num_columns: int, most: int = 128) -> int:
    """How many columns of a matrix one program takes, where rows don't have to be held on the chip as a whole."""
    return min(max(next_power_of_2(num_columns), 16), most)
