"""Padded attention through torch's `scaled_dot_product_attention`, which picks its own kernel."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from recsys.attention.interface import CrossLayout, JaggedLayout, MaskSpec
from recsys.attention.padding import PaddedBackend, pad, unpad, visible_keys, visible_pairs


class Sdpa(PaddedBackend):
    """Pad, then `scaled_dot_product_attention`, with as little mask as correctness allows.

    Only without an explicit mask may torch use its flash kernel, so it is left out where nothing needs it:

    - causal history alone: padding comes last, so a real query never reaches a padded key, and `is_causal` is
      the whole mask;
    - full attention with all users equally long: there is no padding;
    - anything else (full attention with padding, a window, candidates) takes the boolean `(B, 1, S, S)` mask.
    """

    name = "sdpa"
    summary = "pad, torch's scaled_dot_product_attention"

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
        maskless = mask.num_targets is None and mask.window is None and (mask.causal or layout.is_rectangular)
        out = F.scaled_dot_product_attention(
            pad(q, layout),
            pad(k, layout),
            pad(v, layout),
            attn_mask=None if maskless else visible_pairs(layout, mask),
            is_causal=maskless and mask.causal,
            dropout_p=dropout_p,
            scale=scale,
        )
        return unpad(out, layout)

    def attend_across(
        self, q: Tensor, k: Tensor, v: Tensor, layout: CrossLayout, scale: float, dropout_p: float
    ) -> Tensor:
        out = F.scaled_dot_product_attention(
            pad(q, layout.queries),
            pad(k, layout.keys),
            pad(v, layout.keys),
            attn_mask=None if layout.keys.is_rectangular else visible_keys(layout),
            dropout_p=dropout_p,
            scale=scale,
        )
        return unpad(out, layout.queries)
