"""Products of jagged operands."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.interaction.layouts import heads_first, heads_inside
from benchmarks.interaction.operations.base import OURS, PADDED, Operation, Provider, jagged_rows, padded_rows, same
from kernels.jagged_matmul import jagged_dense_bmm, jagged_jagged_bmm, jagged_scores, jagged_weighted_sum
from kernels.jagged_matmul.reference import (
    reference_jagged_dense_bmm,
    reference_jagged_jagged_bmm,
    reference_jagged_scores,
    reference_jagged_weighted_sum,
)


class JaggedDenseBmm(Operation):
    """Rows of a user times its matrix of head dim x head dim."""

    name = "jagged_dense_bmm"

    def operand_shapes(self) -> list[tuple[int, ...]]:
        D = self.shape.head_dim
        return [(self.batch.total, D), (self.shape.users, D, D)]

    def result_shape(self) -> tuple[int, ...]:
        return self.batch.total, self.shape.head_dim

    def flop(self) -> int:
        return 2 * self.batch.total * self.shape.head_dim**2

    def reference(self, *operands: Tensor) -> Tensor:
        x, w = operands
        return reference_jagged_dense_bmm(x[:, None], w[:, None], self.batch.offsets)[:, 0]

    def providers(self) -> dict[str, Provider]:
        layouts, batch = self.layouts, self.batch
        pad, unpad = layouts.pad_rows, layouts.unpad_rows
        ops, offsets, longest, tf32 = torch.ops.fbgemm, layouts.offsets, batch.max_seqlen, self.tf32
        return {
            OURS: Provider(lambda x, w: jagged_dense_bmm(x, w, layouts.schedule)),
            PADDED: Provider(torch.bmm, (pad, same), (unpad, same), unpad, pad),
            "nested": Provider(lambda x, w: torch.bmm(layouts.nested(x), w).values()),
            "fbgemm": Provider(
                lambda x, w: ops.jagged_dense_bmm(x, offsets, w, longest)[0], cuda_only=True, needs="fbgemm_gpu"
            ),
            "sll": Provider(
                lambda x, w: ops.sll_jagged_dense_bmm(x, w, offsets, longest, tf32, False),
                cuda_only=True,
                needs="fbgemm_gpu.sll.triton",
            ),
        }


class JaggedJaggedBmm(Operation):
    """Of every user the sum of outer products of two rows."""

    name = "jagged_jagged_bmm"

    def operand_shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch.total, self.shape.head_dim)] * 2

    def result_shape(self) -> tuple[int, ...]:
        return self.shape.users, self.shape.head_dim, self.shape.head_dim

    def flop(self) -> int:
        return 2 * self.batch.total * self.shape.head_dim**2

    def reference(self, *operands: Tensor) -> Tensor:
        x, y = operands
        return reference_jagged_jagged_bmm(x[:, None], y[:, None], self.batch.offsets)[:, 0]

    def providers(self) -> dict[str, Provider]:
        layouts, batch = self.layouts, self.batch
        pad, unpad = layouts.pad_rows, layouts.unpad_rows
        ops, offsets, longest, tf32 = torch.ops.fbgemm, layouts.offsets, batch.max_seqlen, self.tf32
        return {
            OURS: Provider(lambda x, y: jagged_jagged_bmm(x, y, layouts.schedule)),
            PADDED: Provider(lambda x, y: x.transpose(1, 2) @ y, (pad, pad), (unpad, unpad)),
            "nested": Provider(lambda x, y: layouts.nested(x).transpose(1, 2) @ layouts.nested(y)),
            "fbgemm": Provider(
                lambda x, y: ops.jagged_jagged_bmm(x, y, offsets, longest), cuda_only=True, needs="fbgemm_gpu"
            ),
            "sll": Provider(
                lambda x, y: ops.sll_jagged_jagged_bmm(x, y, offsets, longest, tf32, False),
                cuda_only=True,
                needs="fbgemm_gpu.sll.triton",
            ),
        }


class JaggedScores(Operation):
    """Of every user queries times keys."""

    name = "jagged_scores"
    on_scores = True

    def operand_shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch.total, self.shape.heads, self.shape.head_dim)] * 2

    def result_shape(self) -> tuple[int, ...]:
        return self.shape.heads, self.layouts.num_scores

    def flop(self) -> int:
        return 2 * self.layouts.num_pairs * self.shape.heads * self.shape.head_dim

    def reference(self, *operands: Tensor) -> Tensor:
        q, k = operands
        return reference_jagged_scores(q, k, self.batch.offsets, self.batch.offsets)

    def providers(self) -> dict[str, Provider]:
        layouts, H = self.layouts, self.shape.heads
        rows, offsets, scores, score_offsets = layouts.offsets_of_heads(H)
        pad, unpad = padded_rows(layouts), jagged_rows(layouts)
        return {
            OURS: Provider(lambda q, k: jagged_scores(q, k, layouts.scores)),
            PADDED: Provider(
                lambda q, k: q @ k.transpose(2, 3), (pad, pad), (unpad, unpad), layouts.unpad_scores, layouts.pad_scores
            ),
            "sll": Provider(
                lambda q, k: torch.ops.fbgemm.sll_jagged_jagged_bmm_jagged_out(
                    q, k, rows, offsets, rows, offsets, scores, score_offsets, self.batch.max_seqlen, self.tf32
                ),
                (heads_first, heads_first),
                (lambda x: heads_inside(x, H),) * 2,
                lambda x: layouts.loose(x.view(H, -1)),
                lambda x: layouts.tight(x).reshape(-1),
                cuda_only=True,
                needs="fbgemm_gpu.sll.triton",
            ),
        }


class JaggedWeightedSum(Operation):
    """Of every user scores times values."""

    name = "jagged_weighted_sum"
    on_scores = True

    def operand_shapes(self) -> list[tuple[int, ...]]:
        H, D = self.shape.heads, self.shape.head_dim
        return [(H, self.layouts.num_scores), (self.batch.total, H, D)]

    def result_shape(self) -> tuple[int, ...]:
        return self.batch.total, self.shape.heads, self.shape.head_dim

    def flop(self) -> int:
        return 2 * self.layouts.num_pairs * self.shape.heads * self.shape.head_dim

    def reference(self, *operands: Tensor) -> Tensor:
        weights, v = operands
        return reference_jagged_weighted_sum(weights, v, self.batch.offsets, self.batch.offsets)

    def providers(self) -> dict[str, Provider]:
        layouts, H = self.layouts, self.shape.heads
        rows, offsets, scores, score_offsets = layouts.offsets_of_heads(H)
        pad, unpad = padded_rows(layouts), jagged_rows(layouts)
        return {
            OURS: Provider(lambda p, v: jagged_weighted_sum(p, v, layouts.scores)),
            PADDED: Provider(torch.matmul, (layouts.pad_scores, pad), (layouts.unpad_scores, unpad), unpad, pad),
            "sll": Provider(
                lambda p, v: torch.ops.fbgemm.sll_array_jagged_bmm_jagged_out(
                    p, v, scores, score_offsets, rows, offsets, rows, offsets, self.batch.max_seqlen, self.tf32
                ),
                (lambda x: layouts.tight(x).reshape(-1), heads_first),
                (lambda x: layouts.loose(x.view(H, -1)), lambda x: heads_inside(x, H)),
                lambda x: heads_inside(x, H),
                heads_first,
                cuda_only=True,
                needs="fbgemm_gpu.sll.triton",
            ),
        }
