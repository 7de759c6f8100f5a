"""Flash attention over sequences of different lengths packed one after another, forward and backward."""

from kernels.jagged_flash_attention.op import jagged_flash_attention
from kernels.jagged_flash_attention.reference import dense_mask, dropout_mask, reference_attention

__all__ = ["dense_mask", "dropout_mask", "jagged_flash_attention", "reference_attention"]
