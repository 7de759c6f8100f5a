"""Flash attention over sequences of different lengths packed one after another, forward and backward."""

from kernels.jagged_flash_attention.checks import check_offsets
from kernels.jagged_flash_attention.launch import unavailable_reason
from kernels.jagged_flash_attention.op import jagged_flash_attention
from kernels.jagged_flash_attention.reference import dense_mask, dropout_mask, reference_attention
from kernels.jagged_flash_attention.schedule import Schedule

__all__ = [
    "Schedule",
    "check_offsets",
    "dense_mask",
    "dropout_mask",
    "jagged_flash_attention",
    "reference_attention",
    "unavailable_reason",
]
