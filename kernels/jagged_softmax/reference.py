"""What the kernels have to compute, in plain PyTorch, a user at a time. Slow, and easy to believe.

Arguments and results as of the functions in op.py; computed in the dtype of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jagged_flash_attention.reference import dense_mask
from kernels.jagged_matmul.reference import of_users, scores_of_users, scores_together


def reference_jagged_softmax(x: Tensor, offsets: Tensor, scale: float = 1.0) -> Tensor:
    """Of every user softmax over its rows, a column at a time."""
    return torch.cat([x[:0], *[(rows * scale).softmax(dim=0) for rows in of_users(x, offsets)]])


def reference_jagged_score_softmax(
    scores: Tensor,
    offsets: Tensor,
    key_offsets: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    num_targets: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Of every user softmax over the keys that a query sees; zero for the others."""
    is_self = key_offsets is offsets
    longest = int(offsets.diff().max()) if offsets.numel() > 1 else 0
    mask = dense_mask(offsets, longest, causal=causal, window=window, num_targets=num_targets) if is_self else None
    parts = []
    for b, of_user in enumerate(scores_of_users(scores, offsets, key_offsets)):
        of_user = of_user * scale
        if mask is not None:
            m = of_user.shape[1]
            of_user = of_user.masked_fill(~mask[b, :m, :m], float("-inf"))
        parts.append(of_user.softmax(dim=2))
    return scores_together(parts, scores, scores.shape[0])
