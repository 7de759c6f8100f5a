"""Padded attention with an explicit softmax: the plainest code, which the others are compared with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from recsys.attention.interface import JaggedLayout, MaskSpec
from recsys.attention.padding import PaddedBackend, pad, unpad, visible_pairs


class Dense(PaddedBackend):
    """Pad, `q kᵀ`, softmax in fp32, `p v`.

    Keeps `(B, H, S, S)` scores: memory grows with the square of the longest user.
    """

    name = "dense"
    summary = "pad, explicit softmax in fp32"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        mask: MaskSpec,
        scale: float,
        dropout_p: float,
    ) -> Tensor:
        visible = visible_pairs(layout, mask)
        q, k, v = pad(q, layout), pad(k, layout), pad(v, layout)
        scores = (q @ k.transpose(-2, -1)).float() * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        weights = F.dropout(weights, dropout_p, training=dropout_p > 0.0)
        return unpad(weights.to(v.dtype) @ v, layout)
