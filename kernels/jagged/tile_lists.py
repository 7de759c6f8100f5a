# mypy: allow-untyped-defs, allow-incomplete-defs
"""Lists of the tiles of a jagged batch, which the attention kernels walk, and the kernel that makes them.

A grid of users x tiles of the longest user is mostly empty where lengths differ, and the host can't know the tiles
without waiting for the GPU. So one small kernel writes them down, the longest users first, and the host launches the
most there can be. Row i of a list, int32, is one tile of BLOCK rows of one user:

    0 own_start    first row of the user on the side that is cut into tiles
    1 own_len      rows of the user on that side; 0: no work, this row is past the end of the list
    2 other_start  first row of the user on the other side (self attention: own_start)
    3 other_len    rows of the user on the other side (self attention: own_len)
    4 tile         index of the tile within the user, 0 ... ceil(own_len / BLOCK) - 1
    5 history      keys of the user that others may see: own_len minus its candidates, in cross attention all keys
    6 user         index of the user
    7 0; kernels may count here while they run, in the first two rows

Names: B users; a user's class is the index of its last tile, -1 when it is empty; `i_*`, `o_*`, `m_*`, `p_*` as in
tiles.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents
from triton.language.target_info import cuda_capability_geq

from kernels.jagged.checks import check_offsets, checks_values
from kernels.jagged.launch import INTERPRETED, Launcher, next_power_of_2, require_triton

COLUMNS = 8
MIN_BLOCK = 16
MAX_ROWS = 2**31 - 1  # a list holds int32
MAX_INT32_SUM = 2**31 - 1
# Programs per list: every one reads all offsets, so more of them cost bandwidth, and the interpreter runs them in turn.
TARGET_GROUPS = 3 if INTERPRETED else 64
MAX_USERS_PER_GROUP = 128
MIN_CHUNK, MAX_CHUNK = 128, 4096  # users that a program counts at once; fewer would leave threads without a user
MAX_TILES_PER_STEP = 1024  # (user, tile) pairs that a program places at once
COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit  # pragma: no cover
def load_user(p_offsets, i_b, total, max_seqlen):
    """First row and number of rows, int32.

    Clamped so that no offsets, however wrong, make a kernel touch memory outside its tensors.
    """
    bos = tl.minimum(tl.maximum(tl.load(p_offsets + i_b).to(tl.int64), 0), total)
    eos = tl.minimum(tl.maximum(tl.load(p_offsets + i_b + 1).to(tl.int64), bos), total)
    return bos.to(tl.int32), tl.minimum(eos - bos, max_seqlen).to(tl.int32)


@triton.jit  # pragma: no cover
def last_tile_of(o_user, length, B, shift, more_than, at_most):
    """The class of users: -1 past the last user and for those whose length keeps them off this list."""
    return tl.where((o_user < B) & (length > more_than) & (length <= at_most), (length - 1) >> shift, -1)


@triton.jit  # pragma: no cover
def load_last_tiles(p_offsets, first_user, B, total, max_seqlen, shift, more_than, at_most, CHUNK: tl.constexpr):
    """The class of users first_user ... first_user + CHUNK: (CHUNK,)."""
    o_user = first_user + tl.arange(0, CHUNK)
    _, length = load_user(p_offsets, tl.minimum(o_user, B - 1), total, max_seqlen)
    return last_tile_of(o_user, length, B, shift, more_than, at_most)


@triton.jit  # pragma: no cover
def count_classes(last_tile, is_before, first_class, CLASSES: tl.constexpr):
    """Users of each class first_class ... first_class + CLASSES, before and not before the group: (2 * CLASSES,)."""
    o_class = last_tile - first_class
    mask = (o_class >= 0) & (o_class < CLASSES) & (last_tile >= 0)
    o_bin = tl.where(mask, 2 * o_class + tl.where(is_before, 0, 1), 0)
    return tl.histogram(o_bin, 2 * CLASSES, mask=mask)


# Totals and lengths differ in every batch: a kernel specialised on them would be compiled over and over.
@triton.jit(do_not_specialize=["B", "total", "max_seqlen", "other_total", "other_max_seqlen"])  # pragma: no cover
def jagged_tile_lists_kernel(
    p_lists,  # (capacities of all lists, 8)
    p_offsets,  # (B + 1,)
    p_other_offsets,  # (B + 1,), not read unless HAS_OTHER
    p_num_targets,  # (B,), not read unless HAS_TARGETS
    B,
    total,
    max_seqlen,
    other_total,
    other_max_seqlen,
    SHIFTS: tl.constexpr,  # log2(BLOCK) of every list
    DESCENDING: tl.constexpr,  # of every list
    MORE_THAN: tl.constexpr,  # of every list: only users longer than that ...
    AT_MOST: tl.constexpr,  # ... and not longer than that are on it
    HAS_OTHER: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    KEYS_ARE_OTHER: tl.constexpr,
    USERS: tl.constexpr,
    CLASSES: tl.constexpr,
    STEPS: tl.constexpr,  # of CLASSES classes, that cover the longest user; mostly 1, and then no loop is left
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,  # B <= CHUNK
    ZEROS: tl.constexpr,
    SUM: tl.constexpr,  # int64 where clamped wrong offsets can add up to 2^31 tiles
):
    """One program: USERS users of one list. Counts the users of each class, which says where each tile belongs.

    The tiles of longer users come before those of a user: programs that run at the same time then share keys, and what
    comes last is small. DESCENDING begins with a user's last tile.
    """
    # From now on the next kernel may begin, if it is launched with `launch_pdl`; it then waits for this one by itself.
    if COMPILED:  # noqa: SIM102 (the interpreter must not ask for a GPU)
        if cuda_capability_geq(9, 0):
            gdc_launch_dependents()

    capacity = 0
    first_row = tl.zeros([], dtype=tl.int64)
    shift = 0
    descending = False
    more_than = 0
    at_most = 0
    for i_list in tl.static_range(len(SHIFTS)):
        first_row += tl.where(i_list <= tl.program_id(1), capacity, 0)
        is_mine = i_list == tl.program_id(1)
        most_tiles = B
        if AT_MOST[i_list] > 2 ** SHIFTS[i_list]:
            most_tiles += total >> SHIFTS[i_list]
        capacity = tl.where(i_list <= tl.program_id(1), most_tiles, capacity)
        shift = tl.where(is_mine, SHIFTS[i_list], shift)
        more_than = tl.where(is_mine, MORE_THAN[i_list], more_than)
        at_most = tl.where(is_mine, AT_MOST[i_list], at_most)
        descending = tl.where(is_mine, DESCENDING[i_list], descending)
    p_list = p_lists + first_row * 8

    first_user = tl.program_id(0) * USERS
    o_chunk = tl.arange(0, CHUNK)
    b_chunk = load_last_tiles(
        p_offsets, 0, B, total, max_seqlen, shift, more_than, at_most, CHUNK
    )  # first, it is waited for longest
    o_user = first_user + tl.arange(0, USERS)
    i_user = tl.minimum(o_user, B - 1)
    start, length = load_user(p_offsets, i_user, total, max_seqlen)
    other_start, other_length = start, length
    if HAS_OTHER:
        other_start, other_length = load_user(p_other_offsets, i_user, other_total, other_max_seqlen)
    history = length
    if HAS_TARGETS:
        num_targets = tl.load(p_num_targets + i_user).to(tl.int64)
        history = length - tl.minimum(tl.maximum(num_targets, 0), length).to(tl.int32)
    if KEYS_ARE_OTHER:
        history = other_length
    o_column = tl.arange(0, 8)[None, :]
    b_row = tl.where(o_column == 0, start[:, None], 0)
    b_row = tl.where(o_column == 1, length[:, None], b_row)
    b_row = tl.where(o_column == 2, other_start[:, None], b_row)
    b_row = tl.where(o_column == 3, other_length[:, None], b_row)
    b_row = tl.where(o_column == 5, history[:, None], b_row)
    b_row = tl.where(o_column == 6, o_user[:, None], b_row)  # (USERS, 8)

    last_tile = last_tile_of(o_user, length, B, shift, more_than, at_most)
    is_earlier = (o_user[None, :] < o_user[:, None]) & (last_tile[None, :] == last_tile[:, None])
    num_earlier = tl.sum(is_earlier.to(tl.int32), 1).to(SUM)  # users of the same class before it in the group

    num_tiles = tl.zeros([], dtype=SUM)  # of the users of the classes above
    place = tl.zeros([USERS], dtype=SUM)
    first_step = 0
    if STEPS > 1:  # max_seqlen may be far above the longest user: begin where the first users are
        highest = tl.max(b_chunk, 0)
        if not ONE_CHUNK:
            for i_chunk in range(CHUNK, B, CHUNK):
                b_more = load_last_tiles(p_offsets, i_chunk, B, total, max_seqlen, shift, more_than, at_most, CHUNK)
                highest = tl.maximum(highest, tl.max(b_more, 0))
        first_step = STEPS - 1 - tl.maximum(highest, 0) // CLASSES
    for i_step in range(first_step, STEPS):  # the highest classes first
        first_class = (STEPS - 1 - i_step) * CLASSES
        o_class = first_class + tl.arange(0, CLASSES)
        counts = count_classes(b_chunk, o_chunk < first_user, first_class, CLASSES)
        if not ONE_CHUNK:
            for i_chunk in range(CHUNK, B, CHUNK):
                b_more = load_last_tiles(p_offsets, i_chunk, B, total, max_seqlen, shift, more_than, at_most, CHUNK)
                counts += count_classes(b_more, i_chunk + o_chunk < first_user, first_class, CLASSES)
        before, after = tl.split(tl.reshape(counts, (CLASSES, 2)))
        before, count = before.to(SUM), (before + after).to(SUM)
        tiles = count * (o_class + 1)
        longer_tiles = num_tiles + tl.cumsum(tiles, 0, reverse=True)  # of users of this class and above
        is_class = last_tile[:, None] == o_class[None, :]
        b_place = longer_tiles - tiles + before * (o_class + 1)
        within = num_earlier * (last_tile + 1)
        place += tl.sum(tl.where(is_class, b_place[None, :] + within[:, None], 0), 1)

        position = o_class[None, :].to(SUM) + place[:, None]  # (USERS, CLASSES), of tiles first_class ...
        mask = (o_class[None, :] <= last_tile[:, None]) & (position < capacity)
        tile = tl.where(descending, last_tile[:, None] - o_class[None, :], o_class[None, :])
        p_row = p_list + position.to(tl.int64)[:, :, None] * 8 + o_column[None, :, :]
        tl.store(p_row, tl.where(o_column[None, :, :] == 4, tile[:, :, None], b_row[:, None, :]), mask=mask[:, :, None])
        num_tiles += tl.sum(tiles, 0)

    # What is left of the list is zero. No list is as long as 2^31 rows, so the clamped sum fits an int32.
    end = tl.minimum(num_tiles, capacity).to(tl.int32)
    for i_row in range(end + tl.program_id(0) * ZEROS, capacity, tl.num_programs(0) * ZEROS):
        o_row = i_row + tl.arange(0, ZEROS)[:, None]
        p_row = p_list + o_row.to(tl.int64) * 8 + o_column
        tl.store(p_row, tl.zeros([ZEROS, 8], dtype=tl.int32), mask=(o_row < capacity) & (o_column < 8))


launch = Launcher(jagged_tile_lists_kernel, "num_warps")


def make_tile_lists(
    offsets: Tensor,
    other_offsets: Tensor | None,
    num_targets: Tensor | None,
    total: int,
    max_seqlen: int,
    other_total: int,
    other_max_seqlen: int,
    blocks: list[int],
    descending: list[bool],
    more_than: list[int],
    at_most: list[int],
    keys_are_other: bool,
    check_values: bool = False,
) -> Tensor:
    """The lists of all blocks one after another, (sum of their capacities, 8) int32, in one launch.

    Args:
        offsets, total, max_seqlen: of the side that is cut into tiles.
        other_offsets, other_total, other_max_seqlen: of the other side; None and any numbers in self attention.
        blocks: rows of a tile, powers of two, one per list.
        descending: for each list whether it begins with a user's last tile.
        more_than, at_most: for each list the lengths of users on it: more than the first, not more than the other.
        keys_are_other: cross attention, and the tiles are of queries.
        check_values: as for Schedule.
    """
    # Here and not in Schedule, because under torch.export that would bound a dynamic total.
    if max(total, other_total) > MAX_ROWS:
        raise ValueError(f"a batch may have at most {MAX_ROWS} rows; got {max(total, other_total)}")
    # Likewise: under torch.compile the tensors are real only here.
    if check_values and checks_values(offsets.device):
        of_keys = other_offsets is not None and not keys_are_other
        check_offsets(offsets, max_seqlen, total, num_targets, of_keys=of_keys)
        if other_offsets is not None:
            check_offsets(other_offsets, other_max_seqlen, other_total, of_keys=not of_keys)
    require_triton(offsets.device)
    num_users = offsets.shape[0] - 1
    rows = sum([tile_capacity(total, num_users, *pair) for pair in zip(blocks, at_most, strict=True)])
    lists = offsets.new_empty((rows, COLUMNS), dtype=torch.int32)
    if rows == 0:
        return lists
    if num_users == 0:
        return lists.zero_()
    max_seqlen, other_max_seqlen = min(max_seqlen, total), min(other_max_seqlen, other_total)
    users, *shape, num_warps = _program_shape(num_users, -(-max_seqlen // min(blocks)))
    offsets = offsets.contiguous()
    other = offsets if other_offsets is None else other_offsets.contiguous()
    targets = offsets if num_targets is None else num_targets.contiguous()
    launch(
        (-(-num_users // users), len(blocks)),
        (),
        (lists, offsets, other, targets),
        (),
        (num_users, total, max_seqlen, other_total, other_max_seqlen),
        (
            tuple([block.bit_length() - 1 for block in blocks]), tuple(descending), tuple(more_than), tuple(at_most),
            other_offsets is not None, num_targets is not None, keys_are_other, users, *shape,
        ),
        (num_warps,),
    )  # fmt: skip
    return lists


class ProgramShape(NamedTuple):
    """What a program does at once, as the kernel calls it."""

    USERS: int
    CLASSES: int
    STEPS: int
    CHUNK: int
    ONE_CHUNK: bool
    ZEROS: int
    SUM: tl.dtype
    num_warps: int


@functools.lru_cache(maxsize=4096)
def _program_shape(num_users: int, most_tiles: int) -> ProgramShape:
    """In powers of two, so that batches of other sizes seldom compile another kernel."""
    num_classes = next_power_of_2(max(1, most_tiles))
    users = next_power_of_2(-(-num_users // TARGET_GROUPS))
    users = min(max(users, 2), MAX_USERS_PER_GROUP)
    classes = min(num_classes, MAX_TILES_PER_STEP // users)
    chunk = min(max(next_power_of_2(num_users), MIN_CHUNK), MAX_CHUNK)
    num_warps = 4 if chunk <= 1024 else 8
    return ProgramShape(
        users, classes, num_classes // classes, chunk, num_users <= chunk, 16 * num_warps,
        tl.int64 if num_users * num_classes > MAX_INT32_SUM else tl.int32, num_warps,
    )  # fmt: skip


tile_lists_op = torch.library.custom_op("recsys_kernels::jagged_tile_lists", make_tile_lists, mutates_args=())


@tile_lists_op.register_fake
def _tile_lists_fake(
    offsets: Tensor,
    other_offsets: Tensor | None,
    num_targets: Tensor | None,
    total: int,
    max_seqlen: int,
    other_total: int,
    other_max_seqlen: int,
    blocks: list[int],
    descending: list[bool],
    more_than: list[int],
    at_most: list[int],
    *_: object,
) -> Tensor:
    rows = sum(tile_capacity(total, offsets.shape[0] - 1, *pair) for pair in zip(blocks, at_most, strict=True))
    return offsets.new_empty((rows, COLUMNS), dtype=torch.int32)


def tile_capacity(total: int, num_users: int, block: int, at_most: int = MAX_ROWS) -> int:
    """Rows of a list: no fewer than the tiles that `num_users` users of `at_most` tokens, `total` in all, can have."""
    return num_users if at_most <= block else total // block + num_users
