"""Products of jagged tensors with each other, with dense ones and with jagged scores; all with gradients."""

from kernels.jagged_matmul.op import jagged_dense_bmm, jagged_jagged_bmm, jagged_scores, jagged_weighted_sum

__all__ = ["jagged_dense_bmm", "jagged_jagged_bmm", "jagged_scores", "jagged_weighted_sum"]
