"""Padded attention with an explicit softmax: the plainest code, which the others are compared with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from recsys.attention.interface import CrossLayout, JaggedLayout, MaskSpec
from recsys.attention.padding import PaddedBackend, pad, unpad, visible_keys, visible_pairs


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
        return unpad(_attend(pad(q, layout), pad(k, layout), pad(v, layout), visible, scale, dropout_p), layout)

    def attend_across(
        self, q: Tensor, k: Tensor, v: Tensor, layout: CrossLayout, scale: float, dropout_p: float
    ) -> Tensor:
        visible = visible_keys(layout)
        padded = pad(q, layout.queries), pad(k, layout.keys), pad(v, layout.keys)
        return unpad(_attend(*padded, visible, scale, dropout_p), layout.queries)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, dropout_p: float) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).float() * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0.0)
    return weights.to(v.dtype) @ v
