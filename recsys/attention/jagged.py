"""Our unfused Triton kernels: scores of the real tokens only, in memory. Shows what fusing them buys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.attention.interface import AttentionBackend, CrossLayout, JaggedLayout, MaskSpec, Request
from recsys.attention.jagged_flash import cross_schedule, self_schedule

if TYPE_CHECKING:
    from kernels.jagged.score_layout import ScoreLayout

MAX_HEAD_DIM = 256


class Jagged(AttentionBackend):
    """Jagged matmul, jagged softmax, jagged matmul: no padding, but every user's square of scores is kept.

    Memory grows with the sum of the squared lengths (rows of scores are rounded up to 8), where `dense` needs users x
    square of the longest.
    """

    name = "jagged"
    summary = "our unfused Triton kernels: jagged matmul, jagged softmax, jagged matmul"

    def unavailable(self, device: torch.device) -> str | None:
        # Imported here, because a machine without Triton must still be able to import and list the backends.
        try:
            from kernels.jagged import unavailable_reason
        except ImportError as error:
            return f"its Triton kernels can't be imported ({error})"
        return unavailable_reason(device)

    def refuses(self, request: Request) -> str | None:
        if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"q, k, v are {request.dtype}, it takes float32, float16 and bfloat16"
        if request.head_dim > MAX_HEAD_DIM:
            return f"the head dim is {request.head_dim}, it takes up to {MAX_HEAD_DIM}"
        if not request.knows_scores:
            return "the layout has no total_scores, the number of scores on the host, which it needs"
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
        from kernels.jagged.score_layout import ScoreLayout

        assert layout.total_scores is not None, "refuses() lets no such layout through"
        total_scores = layout.total_scores
        scores = layout.cached("score_layout", mask, lambda: ScoreLayout(self_schedule(layout, mask), total_scores))
        return _attend(q, k, v, scores, mask, scale, dropout_p)

    def attend_across(
        self, q: Tensor, k: Tensor, v: Tensor, layout: CrossLayout, scale: float, dropout_p: float
    ) -> Tensor:
        from kernels.jagged.score_layout import ScoreLayout

        assert layout.total_scores is not None, "refuses() lets no such layout through"
        total_scores = layout.total_scores
        scores = layout.cached("score_layout", lambda: ScoreLayout(cross_schedule(layout), total_scores))
        return _attend(q, k, v, scores, MaskSpec(causal=False), scale, dropout_p)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: ScoreLayout, mask: MaskSpec, scale: float, dropout_p: float
) -> Tensor:
    from kernels.jagged_matmul import jagged_scores, jagged_weighted_sum
    from kernels.jagged_softmax import jagged_score_softmax

    scores = jagged_scores(q, k, layout, scale=scale)  # scaled before they are rounded: float16 ends at 65,504
    weights = jagged_score_softmax(scores, layout, causal=mask.causal, window=mask.window)
    return jagged_weighted_sum(F.dropout(weights, dropout_p, training=dropout_p > 0.0), v, layout)
