"""Our own fused Triton kernel: no padding, any mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys.attention.interface import AttentionBackend, CrossLayout, JaggedLayout, MaskSpec, Request

if TYPE_CHECKING:
    from kernels.jagged import Schedule

HEAD_DIMS = range(16, 257)


class JaggedFlash(AttentionBackend):
    """`kernels.jagged_flash_attention`: softmax attention over the real tokens only.

    All layers of a step, forward and backward, share one schedule, the list of the tiles that exist.
    """

    name = "jagged_flash"
    summary = "our fused Triton kernel"

    def unavailable(self, device: torch.device) -> str | None:
        # Imported here, because a machine without Triton must still be able to import and list the backends.
        try:
            from kernels.jagged import unavailable_reason
        except ImportError as error:
            return f"its Triton kernel can't be imported ({error})"
        return unavailable_reason(device)

    def refuses(self, request: Request) -> str | None:
        if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"q, k, v are {request.dtype}, it takes float32, float16 and bfloat16"
        if request.head_dim not in HEAD_DIMS:
            return f"the head dim is {request.head_dim}, it takes {HEAD_DIMS.start} to {HEAD_DIMS.stop - 1}"
        return None

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
        from kernels.jagged_flash_attention import jagged_flash_attention

        return jagged_flash_attention(
            q,
            k,
            v,
            layout.offsets,
            layout.max_seqlen,
            causal=mask.causal,
            window=mask.window,
            num_targets=mask.num_targets,
            scale=scale,
            dropout_p=dropout_p,
            schedule=self_schedule(layout, mask),
        )

    def attend_across(
        self, q: Tensor, k: Tensor, v: Tensor, layout: CrossLayout, scale: float, dropout_p: float
    ) -> Tensor:
        from kernels.jagged_flash_attention import jagged_flash_attention

        return jagged_flash_attention(
            q,
            k,
            v,
            layout.queries.offsets,
            layout.queries.max_seqlen,
            causal=False,
            key_offsets=layout.keys.offsets,
            max_key_seqlen=layout.keys.max_seqlen,
            scale=scale,
            dropout_p=dropout_p,
            schedule=cross_schedule(layout),
        )


def self_schedule(layout: JaggedLayout, mask: MaskSpec) -> Schedule:
    """The tiles of self attention, for the kernels; made once per layout and candidates."""
    from kernels.jagged import Schedule

    return layout.cached(
        "schedule",
        mask,
        lambda: Schedule(
            layout.offsets, layout.total, layout.max_seqlen, num_targets=mask.num_targets, check_values=True
        ),
    )


def cross_schedule(layout: CrossLayout) -> Schedule:
    """The tiles of cross attention, for the kernels; made once per layout."""
    from kernels.jagged import Schedule

    queries, keys = layout.queries, layout.keys
    return layout.cached(
        "schedule",
        lambda: Schedule(
            queries.offsets,
            queries.total,
            queries.max_seqlen,
            key_offsets=keys.offsets,
            total_keys=keys.total,
            max_key_seqlen=keys.max_seqlen,
            check_values=True,
        ),
    )
