"""Element by element: jagged with dense rows, jagged with jagged, and jagged to padded and back; all with gradients."""

from kernels.jagged_elementwise.op import jagged_dense_elementwise, jagged_jagged_elementwise
from kernels.jagged_elementwise.op_padded import jagged_to_padded, padded_to_jagged
from kernels.jagged_elementwise.reference import dropout_mask

__all__ = [
    "dropout_mask",
    "jagged_dense_elementwise",
    "jagged_jagged_elementwise",
    "jagged_to_padded",
    "padded_to_jagged",
]
