# mypy: allow-untyped-defs, allow-incomplete-defs
"""Programs that stay: as many as fit on the GPU take items of a tile list, one after the other.

A program of its own for every tile would wait at its start, for its row of the tile list and for the first rows, and at
its end, while tensor cores have nothing to do. Here an item is a row of the tile list and a head, the longest users
come first, and the warps of a program take parts:

- one warp loads, by TMA into rings of slots, and runs ahead into the items to come as far as there are slots. What it
  knows of an item it passes on in shared memory;
- groups of four warps compute, with asynchronous matrix products (wgmma). In one_group/ there is one of them, for 64
  rows, and several programs share a multiprocessor, so that one computes while another waits. In two_groups/ a program
  has a multiprocessor to itself, and two groups, which take 64 of an item's 128 rows each.

The first items of a program follow from its index, further ones it draws from a counter, so that all programs end at
about the same time. Who computes an item has no influence on the result. The counter is a spare field of the tile list,
zero before and after.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ITEM_SLOTS = gl.constexpr(2)  # items that are on the chip
# Of an item in shared memory: head, first row, rows, first row of the tile, history keys, ...
NUM_FIELDS = gl.constexpr(8)
COUNTER = gl.constexpr(7)  # field of the tile list's first row: items drawn; of the second row: programs done


@gluon.jit  # pragma: no cover
def load_item(p_tiles, i_item, num_items, H: gl.constexpr, BM: gl.constexpr):
    """An item's head, first row, rows, first query and history keys; no rows past the end of the list."""
    is_there = i_item < num_items
    p_tile = p_tiles + (gl.where(is_there, i_item, 0) // H).to(gl.int64) * 8
    bos = gl.load(p_tile)
    n = gl.load(p_tile + 1)
    tile = gl.load(p_tile + 4)
    h = gl.load(p_tile + 5)
    return i_item % H, bos, gl.where(is_there, n, 0), tile * BM, h


@gluon.jit  # pragma: no cover
def draw(p_tiles, num_items, GIVEN: gl.constexpr):
    """The next item that nobody has; the first GIVEN of every program are its own."""
    num_given = GIVEN * gl.num_programs(0)
    i_item = num_items
    if num_given < num_items:
        i_item = num_given + gl.atomic_add(p_tiles + COUNTER, 1, sem="relaxed")
    return i_item


@gluon.jit  # pragma: no cover
def put(number, slot):
    """A number into shared memory."""
    slot.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit  # pragma: no cover
def get(slot):
    """A number out of shared memory."""
    return gl.sum(slot.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit  # pragma: no cover
def put_item(i_h, bos, n, i_m, h, slots, slot):
    """An item into its slot."""
    put(i_h, slots.index(slot * NUM_FIELDS))
    put(bos, slots.index(slot * NUM_FIELDS + 1))
    put(n, slots.index(slot * NUM_FIELDS + 2))
    put(i_m, slots.index(slot * NUM_FIELDS + 3))
    put(h, slots.index(slot * NUM_FIELDS + 4))


@gluon.jit  # pragma: no cover
def leave(p_tiles, num_items, GIVEN: gl.constexpr):
    """Whoever is the last leaves the counters as they were."""
    if GIVEN * gl.num_programs(0) < num_items:  # noqa: SIM102 (only then there are counters)
        if gl.atomic_add(p_tiles + 8 + COUNTER, 1) == gl.num_programs(0) - 1:  # nobody will draw again
            gl.store(p_tiles + COUNTER, 0)
            gl.store(p_tiles + 8 + COUNTER, 0)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(tiles: Tensor, num_items: int, programs_per_sm: int) -> int:
    """As many as run at once; one per item, where the list is too short to have both counters."""
    if tiles.shape[0] < 2:
        return num_items
    return min(num_items, _num_multiprocessors(tiles.device) * programs_per_sm)
