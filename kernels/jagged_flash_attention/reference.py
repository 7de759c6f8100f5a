"""What the kernel has to compute, in plain PyTorch: pad, mask, softmax. Slow, and easy to believe.

B users, N = max_seqlen, M = max_key_seqlen, L tokens of all users together, H heads, D head dim.
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
    key_offsets: Tensor | None = None,
    max_key_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for every user and head, computed in the dtype of the inputs.

    Arguments and result as of `jagged_flash_attention`. For an exact result pass float64; in a lower precision it is
    the baseline that the kernel's error is compared with.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    row, is_query = _rows(offsets, max_seqlen, q.shape[0])  # (B, N)
    if key_offsets is None:
        key_row, mask = row, dense_mask(offsets, max_seqlen, causal=causal, window=window, num_targets=num_targets)
    else:
        assert max_key_seqlen is not None
        key_row, is_key = _rows(key_offsets, max_key_seqlen, k.shape[0])  # (B, M)
        mask = is_query[:, :, None] & is_key[:, None, :]

    def pad(x: Tensor, row: Tensor) -> Tensor:  # (L, H, D) -> (B, H, N, D)
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[row].transpose(1, 2)

    def repeat(x: Tensor) -> Tensor:  # every key head serves `group` query heads
        return x.repeat_interleave(group, dim=1)

    scores = (pad(q, row) @ repeat(pad(k, key_row)).transpose(-1, -2)) * scale
    mask = mask.unsqueeze(1)
    # A row that sees nothing (no token, or a user without keys) gives zero; its softmax would be 0 / 0.
    sees_something = mask.any(dim=-1, keepdim=True)
    probs = scores.masked_fill(~mask & sees_something, float("-inf")).softmax(dim=-1) * sees_something
    if dropout_p > 0.0:
        assert seed is not None
        keys = torch.arange(key_row.shape[1], device=q.device)
        heads = torch.arange(q.shape[1], device=q.device)
        kept = dropout_mask(seed, row[:, None, :, None], heads[None, :, None, None], keys, dropout_p)
        probs = probs * kept / (1.0 - dropout_p)
    return (probs @ repeat(pad(v, key_row))).transpose(1, 2)[is_query]


def _rows(offsets: Tensor, max_seqlen: int, total: int) -> tuple[Tensor, Tensor]:
    """Row of every slot `(B, N)`, past the last one where there is no token; and whether there is one."""
    position = torch.arange(max_seqlen, device=offsets.device)
    is_token = position < offsets.diff().unsqueeze(1)
    return torch.where(is_token, offsets[:-1].unsqueeze(1) + position, total), is_token


def dropout_mask(seed: Tensor, row: Tensor, head: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """Which pairs dropout keeps: bool, in the shape that row, head and key broadcast to.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of the counter
    (key, row, head, 0) and the key `seed`; a pair is kept if the first of the four words is at least dropout_p · 2^32.

    Args:
        seed: `(1,)` int64.
        row: row of the query in q; head: its head; key: index of the key within its user; all integers.
        dropout_p: probability of dropping a pair.
    """
    low = 0xFFFFFFFF
    c0, c1, c2 = (x.long() & low for x in torch.broadcast_tensors(key, row, head))
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low

    def high(a: int, b: Tensor) -> Tensor:  # of the 64-bit product
        return ((a * b) >> 32) & low

    for _ in range(10):
        c0, c1, c2, c3 = (
            high(0xCD9E8D57, c2) ^ c1 ^ k0,
            (0xCD9E8D57 * c2) & low,
            high(0xD2511F53, c0) ^ c3 ^ k1,
            (0xD2511F53 * c0) & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0 >= int(dropout_p * 2**32)
