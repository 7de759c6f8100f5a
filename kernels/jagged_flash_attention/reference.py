"""What the kernel has to compute, in plain PyTorch: pad, mask, softmax. Slow, and easy to believe.

B users, N = max_seqlen, L tokens of all users together, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_mask(
    offsets: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    window: int | None = None,
    num_targets: Tensor | None = None,
) -> Tensor:
    """Which query sees which key: `(B, N, N)` bool, `[b, i, j]` true where token i of user b sees token j.

    User b has n tokens, of which the last `num_targets[b]` are candidates and the first h are history:

        history i < h sees history j < h with  j <= i (causal)  and  |i - j| < window (if any)
        candidate i >= h sees every history j < h, and itself

    Rows and columns past the user's length are all false.
    """
    lengths = offsets.diff().view(-1, 1, 1)
    history = lengths if num_targets is None else lengths - num_targets.view(-1, 1, 1)
    position = torch.arange(max_seqlen, device=offsets.device)
    i, j = position.view(1, -1, 1), position.view(1, 1, -1)

    history_rule = (j <= i) if causal else torch.ones_like(i == j)
    if window is not None:
        history_rule = history_rule & ((i - j).abs() < window)
    sees_history = (j < history) & (history_rule | (i >= history))
    sees_itself = (i == j) & (i >= history)
    return (sees_history | sees_itself) & (i < lengths)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    window: int | None = None,
    num_targets: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for every user and head, computed in the dtype of the inputs.

    q, k, v and the result are `(L, H, D)`, offsets `(B + 1,)`, `num_targets` `(B,)` or None. For an exact
    result pass float64; in a lower precision it is the baseline that the kernel's error is compared with.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    position = torch.arange(max_seqlen, device=q.device)
    is_token = position < offsets.diff().unsqueeze(1)  # (B, N)
    row = torch.where(is_token, offsets[:-1].unsqueeze(1) + position, q.shape[0])  # (B, N), past the last: zeros

    def pad(x: Tensor) -> Tensor:  # (L, H, D) -> (B, H, N, D)
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[row].transpose(1, 2)

    mask = dense_mask(offsets, max_seqlen, causal=causal, window=window, num_targets=num_targets)
    # Slots without a token see themselves, or their softmax would be 0 / 0 and its NaN reach the gradients.
    mask = mask | torch.diag_embed(~is_token)

    scores = (pad(q) @ pad(k).transpose(-1, -2)) * scale
    probs = scores.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return (probs @ pad(v)).transpose(1, 2)[is_token]
