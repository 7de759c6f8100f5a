# mypy: allow-untyped-defs, allow-incomplete-defs
"""The ring of tiles of keys and values of one group."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit  # pragma: no cover
def load_keys_with_values(desc_k, desc_v, row, column_k, column_v, k_slots, v_slots, free, ready, slot, phase):
    """A tile of keys and one of values into their slots, once these are free."""
    mbarrier.wait(free.index(slot), phase)
    is_ready = ready.index(slot)
    mbarrier.expect(is_ready, 2 * desc_k.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_k, [row, column_k], is_ready, k_slots.index(slot))
    tma.async_copy_global_to_shared(desc_v, [row, column_v], is_ready, v_slots.index(slot))
