"""Our own fused Triton kernel: no padding, any mask."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys.attention.interface import AttentionBackend, JaggedLayout, MaskSpec, Request

HEAD_DIMS = range(16, 257)


class JaggedFlash(AttentionBackend):
    """`kernels.jagged_flash_attention`: softmax attention over the real tokens only."""

    name = "jagged_flash"
    summary = "our fused Triton kernel"

    def unavailable(self, device: torch.device) -> str | None:
        # Imported here, because a machine without Triton must still be able to import and list the backends.
        try:
            from kernels.jagged_flash_attention import unavailable_reason
        except ImportError as error:
            return f"its Triton kernel can't be imported ({error})"
        return unavailable_reason(device)

    def refuses(self, request: Request) -> str | None:
        if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"q, k, v are {request.dtype}, it takes float32, float16 and bfloat16"
        if request.head_dim not in HEAD_DIMS:
            return f"the head dim is {request.head_dim}, it takes {HEAD_DIMS.start} to {HEAD_DIMS.stop - 1}"
        if request.dropout_p > 0.0:
            return f"dropout_p is {request.dropout_p}, it has no dropout"
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
        )
