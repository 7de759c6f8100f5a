"""What the kernels have to compute, in plain PyTorch, a user at a time. Slow, and easy to believe.

Arguments and results as of the functions in op.py; computed in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.score_pitch import row_pitch


def of_users(x: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """The rows of every user."""
    return x.split(offsets.diff().tolist()) if offsets.shape[0] > 1 else ()


def scores_of_users(scores: Tensor, offsets: Tensor, key_offsets: Tensor) -> tuple[Tensor, ...]:
    """The scores of every user, `(H, m, l)`."""
    if offsets.shape[0] <= 1:
        return ()
    shapes = list(zip(offsets.diff().tolist(), key_offsets.diff().tolist(), strict=True))
    parts = scores.split([m * row_pitch(l) for m, l in shapes], dim=1)
    return tuple(part.unflatten(1, (m, row_pitch(l)))[..., :l] for part, (m, l) in zip(parts, shapes, strict=True))


def scores_together(scores: Sequence[Tensor], like: Tensor, num_heads: int) -> Tensor:
    """And back: `(H, T)`, rows rounded up with zeros."""
    parts = [F.pad(x, (0, row_pitch(x.shape[2]) - x.shape[2])).flatten(1) for x in scores]
    return torch.cat([like.new_empty(num_heads, 0), *parts], dim=1)


def reference_jagged_dense_bmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Of every user `x_b w_b`."""
    parts = [torch.einsum("lhk,hkn->lhn", *pair) for pair in zip(of_users(x, offsets), w.unbind(), strict=True)]
    return torch.cat([x.new_empty(0, x.shape[1], w.shape[3]), *parts])


def reference_jagged_jagged_bmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """Of every user `x_b^T y_b`."""
    pairs = zip(of_users(x, offsets), of_users(y, offsets), strict=True)
    parts = [torch.einsum("lhm,lhn->hmn", *pair) for pair in pairs]
    return torch.stack(parts) if parts else x.new_empty(0, *x.shape[1:], y.shape[2])


def reference_jagged_scores(q: Tensor, k: Tensor, offsets: Tensor, key_offsets: Tensor, scale: float = 1.0) -> Tensor:
    """Of every user `scale q_b k_b^T`, `(H, T)`."""
    pairs = zip(of_users(q, offsets), of_users(k, key_offsets), strict=True)
    return scores_together([torch.einsum("mhd,lhd->hml", *pair) * scale for pair in pairs], q, q.shape[1])


def reference_jagged_weighted_sum(
    weights: Tensor, v: Tensor, offsets: Tensor, key_offsets: Tensor, transposed: bool = False
) -> Tensor:
    """Of every user `p_b v_b`, or `p_b^T v_b`, where v belongs to the queries."""
    squares = scores_of_users(weights, offsets, key_offsets)
    rows = of_users(v, offsets if transposed else key_offsets)
    product = "hml,mhd->lhd" if transposed else "hml,lhd->mhd"
    parts = [torch.einsum(product, *pair) for pair in zip(squares, rows, strict=True)]
    return torch.cat([v.new_empty(0, *v.shape[1:]), *parts])
