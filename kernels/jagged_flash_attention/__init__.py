"""Flash attention over sequences of different lengths packed one after another, forward and backward."""

from kernels.jagged_flash_attention.op import check_offsets, jagged_flash_attention, unavailable_reason
from kernels.jagged_flash_attention.reference import dense_mask, reference_attention

__all__ = [
    "check_offsets",
    "dense_mask",
    "jagged_flash_attention",
    "reference_attention",
    "unavailable_reason",
]
