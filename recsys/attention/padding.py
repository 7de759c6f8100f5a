"""Jagged to padded and back, and the padded mask, for the backends that pad.

Letters as in `interface.py`.
"""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
import torch
from torch import Tensor

from recsys.attention.interface import AttentionBackend, CrossLayout, JaggedLayout, MaskSpec, Request

PADDABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""FBGEMM's CPU padding has no float64."""


def pad(x_LHD: Tensor, layout: JaggedLayout) -> Tensor:
    """`(L, H, D)` to `(B, H, S, D)`, zeros behind each user's last token."""
    L, H, D = x_LHD.shape
    S = layout.max_seqlen
    x_BSE = torch.ops.fbgemm.jagged_to_padded_dense(x_LHD.reshape(L, H * D), [layout.offsets], [S], 0.0)
    return x_BSE.view(layout.num_users, S, H, D).transpose(1, 2)


def unpad(x_BHSD: Tensor, layout: JaggedLayout) -> Tensor:
    """`(B, H, S, D)` to `(L, H, D)`; the padding is dropped."""
    B, H, S, D = x_BHSD.shape
    # The total is given, because FBGEMM would otherwise read it back from the device.
    x_LE, _ = torch.ops.fbgemm.dense_to_jagged(
        x_BHSD.transpose(1, 2).reshape(B, S, H * D), [layout.offsets], layout.total
    )
    return x_LE.view(layout.total, H, D)


def visible_pairs(layout: JaggedLayout, mask: MaskSpec) -> Tensor:
    """`(B, 1, S, S)` bool: may query i see key j? Made once per layout and mask.

    The diagonal is always True. A real token sees itself under every mask, so that changes nothing for it; a
    padded row sees just itself instead of nothing, so that its softmax, which nobody reads, is finite in both
    directions.
    """
    return layout.cached("visible_pairs", mask, lambda: _visible_pairs(layout, mask))


def _visible_pairs(layout: JaggedLayout, mask: MaskSpec) -> Tensor:
    position = torch.arange(layout.max_seqlen, device=layout.offsets.device)
    i, j = position[:, None], position[None, :]
    among_history = torch.ones_like(i * j, dtype=torch.bool)
    if mask.causal:
        among_history &= j <= i
    if mask.window is not None:
        # A causal query has no key ahead, so |i - j| says the same for both kinds.
        among_history &= (i - j).abs() < mask.window
    length = layout.offsets.diff()[:, None, None]
    history = length if mask.num_targets is None else length - mask.num_targets[:, None, None]
    is_candidate = (i >= history) & (i < length)
    visible = (j < history) & (((i < history) & among_history) | is_candidate) | (i == j)
    return visible[:, None]


def visible_keys(layout: CrossLayout) -> Tensor:
    """`(B, 1, 1, S)` bool: is there a key j? Of a user without keys the first of the padding, whose value is zero."""

    def build() -> Tensor:
        position = torch.arange(layout.keys.max_seqlen, device=layout.keys.offsets.device)
        return (position < layout.keys.offsets.diff().clamp(min=1)[:, None])[:, None, None]

    return layout.cached("visible_keys", build)


class PaddedBackend(AttentionBackend):
    """What backends that pad have in common: they run anywhere, in the dtypes that can be padded."""

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refuses(self, request: Request) -> str | None:
        if request.dtype not in PADDABLE_DTYPES:
            return f"q, k, v are {request.dtype}, it takes float32, float16 and bfloat16"
        return None
