"""What the kernels have to compute, in plain PyTorch, a user at a time. Slow, and easy to believe.

Arguments and results as of the functions in op.py; computed in the dtype of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spans(offsets: Tensor) -> list[slice]:
    """The rows of every user."""
    bounds = offsets.tolist()
    return [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]


def reference_jagged_dense_bmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Of every user `x_b w_b`."""
    parts = [torch.einsum("lhk,hkn->lhn", x[rows], w[b]) for b, rows in enumerate(spans(offsets))]
    return torch.cat([x.new_empty(0, x.shape[1], w.shape[3]), *parts])


def reference_jagged_jagged_bmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """Of every user `x_b^T y_b`."""
    parts = [torch.einsum("lhm,lhn->hmn", x[rows], y[rows]) for rows in spans(offsets)]
    return torch.stack(parts) if parts else x.new_empty(0, *x.shape[1:], y.shape[2])


def reference_jagged_scores(q: Tensor, k: Tensor, offsets: Tensor, key_offsets: Tensor, scale: float = 1.0) -> Tensor:
    """Of every user `scale q_b k_b^T`, `(H, T)`."""
    pairs = zip(spans(offsets), spans(key_offsets), strict=True)
    parts = [torch.einsum("mhd,lhd->hml", q[own], k[other]).flatten(1) * scale for own, other in pairs]
    return torch.cat([q.new_empty(q.shape[1], 0), *parts], dim=1)


def reference_jagged_weighted_sum(
    weights: Tensor, v: Tensor, offsets: Tensor, key_offsets: Tensor, transposed: bool = False
) -> Tensor:
    """Of every user `p_b v_b`, or `p_b^T v_b`, where v belongs to the queries."""
    parts = []
    begin = 0
    for own, other in zip(spans(offsets), spans(key_offsets), strict=True):
        m, l = own.stop - own.start, other.stop - other.start
        weights_of_user = weights[:, begin : begin + m * l].unflatten(1, (m, l))
        begin += m * l
        if transposed:
            parts.append(torch.einsum("hml,mhd->lhd", weights_of_user, v[own]))
        else:
            parts.append(torch.einsum("hml,lhd->mhd", weights_of_user, v[other]))
    return torch.cat([v.new_empty(0, *v.shape[1:]), *parts])
