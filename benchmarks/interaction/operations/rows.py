"""What is done with rows of as many columns as heads x head dim."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.interaction.operations.base import OURS, PADDED, Operation, Provider, same
from kernels.jagged_concat import jagged_concat
from kernels.jagged_concat.reference import reference_jagged_concat
from kernels.jagged_elementwise import jagged_dense_elementwise, jagged_to_padded
from kernels.jagged_elementwise.reference import reference_jagged_dense_elementwise, reference_jagged_to_padded
from kernels.jagged_pooling import jagged_pool
from kernels.jagged_pooling.reference import reference_jagged_pool


class RowOperation(Operation):
    """On rows of heads x head dim columns."""

    @property
    def rows(self) -> tuple[int, int]:
        return self.batch.total, self.shape.heads * self.shape.head_dim

    def flop(self) -> int:
        return 0


class JaggedDenseElementwise(RowOperation):
    """A row for every user added to all of its tokens, then SiLU."""

    name = "jagged_dense_elementwise"

    def operand_shapes(self) -> list[tuple[int, ...]]:
        return [self.rows, (self.shape.users, self.rows[1])]

    def result_shape(self) -> tuple[int, ...]:
        return self.rows

    def reference(self, *operands: Tensor) -> Tensor:
        x, dense = operands
        return reference_jagged_dense_elementwise(x, dense, self.batch.offsets, activation="silu")

    def providers(self) -> dict[str, Provider]:
        layouts = self.layouts
        pad, unpad = layouts.pad_rows, layouts.unpad_rows
        user = layouts.user_of_token
        return {
            OURS: Provider(lambda x, dense: jagged_dense_elementwise(x, dense, layouts.schedule, activation="silu")),
            PADDED: Provider(lambda x, dense: F.silu(x + dense[:, None]), (pad, same), (unpad, same), unpad, pad),
            "torch": Provider(lambda x, dense: F.silu(x + dense.index_select(0, user))),
            "nested": Provider(lambda x, dense: F.silu(layouts.nested(x) + dense[:, None]).values()),
        }


class JaggedPool(RowOperation):
    """The mean over a user's tokens."""

    name = "jagged_pool"
    saves_operands = False

    def operand_shapes(self) -> list[tuple[int, ...]]:
        return [self.rows]

    def result_shape(self) -> tuple[int, ...]:
        return self.shape.users, self.rows[1]

    def reference(self, *operands: Tensor) -> Tensor:
        (x,) = operands
        return reference_jagged_pool(x, self.batch.offsets, "mean")

    def providers(self) -> dict[str, Provider]:
        layouts = self.layouts
        pad, unpad = layouts.pad_rows, layouts.unpad_rows
        offsets = layouts.offsets
        lengths = offsets.diff()[:, None]
        return {
            OURS: Provider(lambda x: jagged_pool(x, layouts.schedule, "mean")),
            PADDED: Provider(lambda x: x.sum(dim=1) / lengths, (pad,), (unpad,)),
            "torch": Provider(lambda x: torch.segment_reduce(x, "mean", offsets=offsets, unsafe=True)),
        }


class JaggedConcat(RowOperation):
    """Every user's rows of one tensor, then its rows of another one of the same lengths."""

    name = "jagged_concat"
    saves_operands = False

    def operand_shapes(self) -> list[tuple[int, ...]]:
        return [self.rows, self.rows]

    def result_shape(self) -> tuple[int, ...]:
        return 2 * self.rows[0], self.rows[1]

    def reference(self, *operands: Tensor) -> Tensor:
        x, y = operands
        return reference_jagged_concat(x, y, self.batch.offsets, self.batch.offsets)

    def providers(self) -> dict[str, Provider]:
        layouts = self.layouts
        order = layouts.order_of_pairs
        return {
            OURS: Provider(lambda x, y: jagged_concat(x, y, layouts.schedule, layouts.schedule)),
            "torch": Provider(lambda x, y: torch.cat([x, y]).index_select(0, order)),
        }


class JaggedToPadded(RowOperation):
    """Rows with padding behind them; the padding counts as written."""

    name = "jagged_to_padded"
    saves_operands = False

    def operand_shapes(self) -> list[tuple[int, ...]]:
        return [self.rows]

    def result_shape(self) -> tuple[int, ...]:
        return self.shape.users, self.batch.max_seqlen, self.rows[1]

    def reference(self, *operands: Tensor) -> Tensor:
        (x,) = operands
        return reference_jagged_to_padded(x, self.batch.offsets, self.batch.max_seqlen)

    def providers(self) -> dict[str, Provider]:
        layouts, batch = self.layouts, self.batch
        return {
            OURS: Provider(lambda x: jagged_to_padded(x, layouts.schedule)),
            "nested": Provider(
                lambda x: layouts.nested(x).to_padded_tensor(0.0, (self.shape.users, batch.max_seqlen, x.shape[1]))
            ),
            "fbgemm": Provider(
                lambda x: torch.ops.fbgemm.jagged_to_padded_dense(x, [batch.offsets], [batch.max_seqlen], 0.0),
                needs="fbgemm_gpu",
            ),
        }
