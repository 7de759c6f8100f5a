"""Softmax over the tokens of a user, and over the rows of its scores; with gradients."""

from kernels.jagged_softmax.op import jagged_score_softmax, jagged_softmax

__all__ = ["jagged_score_softmax", "jagged_softmax"]
