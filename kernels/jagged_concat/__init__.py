"""Rows of users moved: two jagged tensors one after the other, apart again, the last rows; all with gradients."""

from kernels.jagged_concat.op import jagged_concat, jagged_last, jagged_split

__all__ = ["jagged_concat", "jagged_last", "jagged_split"]
