"""Sum, mean or maximum of every user's rows, with gradients."""

from kernels.jagged_pooling.op import jagged_pool

__all__ = ["jagged_pool"]
