"""Softmax over tokens and over scores."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attention.accuracy import user_mask
from benchmarks.attention.shapes import Work, visible_pairs
from benchmarks.interaction.operations.base import OURS, PADDED, Operation, Provider
from kernels.jagged_softmax import jagged_score_softmax, jagged_softmax
from kernels.jagged_softmax.reference import reference_jagged_score_softmax, reference_jagged_softmax


class JaggedSoftmax(Operation):
    """Over a user's tokens, for as many columns as heads x head dim."""

    name = "jagged_softmax"
    saves_operands = False
    saves_result = True

    def operand_shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch.total, self.shape.heads * self.shape.head_dim)]

    def result_shape(self) -> tuple[int, ...]:
        return self.operand_shapes()[0]

    def flop(self) -> int:
        return 0

    def reference(self, *operands: Tensor) -> Tensor:
        (x,) = operands
        return reference_jagged_softmax(x, self.batch.offsets)

    def providers(self) -> dict[str, Provider]:
        layouts, batch = self.layouts, self.batch
        pad, unpad = layouts.pad_rows, layouts.unpad_rows
        hidden = ~layouts.is_token[:, :, None]
        # Not of nested tensors: the gradient of their softmax over tokens is wrong (torch 2.13).
        offsets = layouts.offsets
        return {
            OURS: Provider(lambda x: jagged_softmax(x, layouts.schedule)),
            PADDED: Provider(
                lambda x: x.masked_fill(hidden, float("-inf")).softmax(dim=1), (pad,), (unpad,), unpad, pad
            ),
            "fbgemm": Provider(
                lambda x: torch.ops.fbgemm.jagged_softmax(x, offsets, batch.max_seqlen)[0],
                cuda_only=True,
                needs="fbgemm_gpu",
            ),
            "sll": Provider(
                lambda x: torch.ops.fbgemm.sll_jagged_softmax(x, offsets, batch.max_seqlen, False),
                cuda_only=True,
                needs="fbgemm_gpu.sll.triton",
            ),
        }


class JaggedScoreSoftmax(Operation):
    """Over the keys that each query sees: the mask of the shape."""

    name = "jagged_score_softmax"
    on_scores = True
    saves_operands = False
    saves_result = True

    def operand_shapes(self) -> list[tuple[int, ...]]:
        return [(self.shape.heads, self.layouts.num_scores)]

    def result_shape(self) -> tuple[int, ...]:
        return self.operand_shapes()[0]

    def flop(self) -> int:
        return 0

    def work(self, mode: str) -> Work:
        """What nobody sees is written, and not read."""
        batch, shape = self.batch, self.shape
        pairs = zip(batch.lengths, batch.targets, strict=True)
        visible = sum(visible_pairs(n - targets, targets, shape.causal, shape.window) for n, targets in pairs)
        read, written = (1, 1) if mode == "forward" else (3, 2)  # the scores; probabilities and their gradients
        elements = shape.heads * (read * visible + written * self.layouts.num_pairs)
        return Work(0, elements * batch.dtype.itemsize)

    def reference(self, *operands: Tensor) -> Tensor:
        (scores,) = operands
        return reference_jagged_score_softmax(
            scores,
            self.batch.offsets,
            self.batch.offsets,
            causal=self.shape.causal,
            window=self.batch.window,
            num_targets=self.batch.num_targets,
        )

    def providers(self) -> dict[str, Provider]:
        layouts, batch, shape = self.layouts, self.batch, self.shape
        known = {
            OURS: Provider(lambda x: jagged_score_softmax(x, layouts.scores, causal=shape.causal, window=batch.window)),
        }
        if batch.num_targets is None:
            hidden = ~user_mask(batch.max_seqlen, 0, shape.causal, batch.window, batch.device)[None, None]
            if not shape.causal and batch.window is None:
                hidden = ~layouts.is_token[:, None, None]
            known[PADDED] = Provider(
                lambda x: x.masked_fill(hidden, float("-inf")).softmax(dim=3),
                (layouts.pad_scores,),
                (layouts.unpad_scores,),
                layouts.unpad_scores,
                layouts.pad_scores,
            )
        if not shape.causal and batch.window is None and batch.num_targets is None:
            _rows, offsets, _scores, score_offsets = layouts.offsets_of_heads(shape.heads)
            known["sll"] = Provider(
                lambda x: torch.ops.fbgemm.sll_jagged2_softmax(x, offsets, score_offsets, batch.max_seqlen, False),
                (lambda x: layouts.tight(x).reshape(-1),),
                (lambda x: layouts.loose(x.view(shape.heads, -1)),),
                lambda x: layouts.loose(x.view(shape.heads, -1)),
                lambda x: layouts.tight(x).reshape(-1),
                cuda_only=True,
                needs="fbgemm_gpu.sll.triton",
            )
        return known
