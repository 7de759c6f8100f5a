# mypy: allow-untyped-defs, allow-incomplete-defs
"""Programs that stay: as many as fit on the GPU take items of a tile list, one after the other.

A program of its own for every tile would spend most of a short user's time on waiting: for its row of the tile list,
its rows, its successor. Here an item is a tile of 64 rows and a head, and the longest users come first. The warps of a
program take two parts:

- one warp loads, by TMA into rings of slots, and runs ahead into the items to come as far as there are slots. What it
  knows of an item it passes on in shared memory;
- one group of four warps computes, with asynchronous matrix products (wgmma). Several programs share a multiprocessor,
  so that one computes while another waits.

The first two items of a program follow from its index, further ones it draws from a counter, so that all programs end
at about the same time. Who computes an item has no influence on the result. The counter is a spare field of the tile
list, zero before and after.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.jagged_flash_attention.launch import check_fields

BLOCK = 64  # rows of an item: of a tile of the tile list
ITEM_SLOTS = 2  # items that are on the chip
NUM_FIELDS = gl.constexpr(
    8
)  # of an item in shared memory: head, first row, rows, first row of the tile, history keys, ...
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
def draw(p_tiles, num_items):
    """The next item that nobody has; the first two of every program are given."""
    num_given = 2 * gl.num_programs(0)
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
def load_keys_with_values(desc_k, desc_v, row, column_k, column_v, k_slots, v_slots, free, ready, slot, phase):
    """A tile of keys and one of values into their slots, once these are free."""
    mbarrier.wait(free.index(slot), phase)
    is_ready = ready.index(slot)
    mbarrier.expect(is_ready, 2 * desc_k.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_k, [row, column_k], is_ready, k_slots.index(slot))
    tma.async_copy_global_to_shared(desc_v, [row, column_v], is_ready, v_slots.index(slot))


@gluon.jit  # pragma: no cover
def leave(p_tiles, num_items):
    """Whoever is the last leaves the counters as they were."""
    if 2 * gl.num_programs(0) < num_items:  # noqa: SIM102 (only then there are counters)
        if gl.atomic_add(p_tiles + 8 + COUNTER, 1) == gl.num_programs(0) - 1:  # nobody will draw again
            gl.store(p_tiles + COUNTER, 0)
            gl.store(p_tiles + 8 + COUNTER, 0)


@dataclass(frozen=True)
class PersistentConfig:
    """How the programs are laid out; no setting changes what is computed."""

    num_stages: int
    """Slots of the ring of tiles, at least 2."""

    programs_per_sm: int
    """Programs that share a multiprocessor."""

    block_n: int = 64
    """Rows of a tile in the ring: 64, in the forward also 128."""

    in_registers: bool = False
    """Left operands that stay for the whole item are in registers instead of shared memory."""

    block: ClassVar[int] = BLOCK
    """Rows of an item."""

    def __post_init__(self) -> None:
        allowed = {"num_stages": range(2, 9), "programs_per_sm": range(1, 9), "block_n": (64, 128)}
        check_fields(self, "programs that stay", {**allowed, "in_registers": (False, True)})


def registers_of(programs_per_sm: int) -> int:
    """Per thread when a program starts with its 8 warps. Four of them keep 24, the others share what these leave."""
    return min(65536 // (256 * programs_per_sm) // 8 * 8, 128)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(tiles: Tensor, num_items: int, programs_per_sm: int) -> int:
    """As many as run at once; one per item, where the list is too short to have both counters."""
    if tiles.shape[0] < 2:
        return num_items
    return min(num_items, _num_multiprocessors(tiles.device) * programs_per_sm)
