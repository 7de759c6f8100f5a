# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rings of tiles of keys and values that two groups share."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.jagged_flash_attention.hopper.common import next_slot


@gluon.jit  # pragma: no cover
def load_tile(desc, row, column, slots, ready, free, slot, phase):
    """A tile into its slot, once this is free; the phase is that of its barrier then."""
    mbarrier.wait(free.index(slot), phase)
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], ready.index(slot), slots.index(slot))


@gluon.jit  # pragma: no cover
def pass_tiles(k_ready, k_free, v_ready, v_free, count, slot, phase, STAGES: gl.constexpr):
    """Let the next tiles go, which only the other group needs.

    Who didn't wait for them could arrive twice on a barrier before the other group has arrived once.
    """
    for _ in range(count):
        mbarrier.wait(k_ready.index(slot), phase)
        mbarrier.arrive(k_free.index(slot))
        mbarrier.wait(v_ready.index(slot), phase)
        mbarrier.arrive(v_free.index(slot))
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase
