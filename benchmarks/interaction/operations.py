"""What is measured: the operations, the work they can't do without, and who does them.

Letters as in layouts.py; `D` head dim.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention.accuracy import user_mask
from benchmarks.attention.shapes import Work, visible_pairs
from benchmarks.interaction.layouts import Layouts, heads_first, heads_inside
from kernels.jagged_concat import jagged_concat
from kernels.jagged_concat.reference import reference_jagged_concat
from kernels.jagged_elementwise import jagged_dense_elementwise, jagged_to_padded
from kernels.jagged_elementwise.reference import reference_jagged_dense_elementwise, reference_jagged_to_padded
from kernels.jagged_matmul import jagged_dense_bmm, jagged_jagged_bmm, jagged_scores, jagged_weighted_sum
from kernels.jagged_matmul.reference import (
    reference_jagged_dense_bmm,
    reference_jagged_jagged_bmm,
    reference_jagged_scores,
    reference_jagged_weighted_sum,
)
from kernels.jagged_pooling import jagged_pool
from kernels.jagged_pooling.reference import reference_jagged_pool
from kernels.jagged_softmax import jagged_score_softmax, jagged_softmax
from kernels.jagged_softmax.reference import reference_jagged_score_softmax, reference_jagged_softmax

OURS = "ours"
PADDED = "padded"
Convert = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Provider:
    """How somebody does an operation.

    The operands are converted into its layout, and its result and gradients back, outside of the timed region.
    """

    call: Callable[..., Tensor]
    operands: Sequence[Convert] | None = None
    """For each operand; None: they are taken as they are."""

    gradients: Sequence[Convert] | None = None
    result: Convert = _same
    dout: Convert | None = None
    """For the gradient of the result; None: it is taken as it is."""

    cuda_only: bool = False
    needs: str | None = None
    """A module that has to be importable."""

    def absent(self, device: torch.device) -> str | None:
        """Why it can't run here; None when it can."""
        if self.cuda_only and device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        if self.needs is None:
            return None
        try:
            importlib.import_module(self.needs)
        except Exception as error:  # a binary package that doesn't fit this machine raises anything
            return f"{self.needs} can't be imported ({type(error).__name__}: {error})"
        return None


class Operation(ABC):
    """One operation on a batch. Sizes: heads and head dim of the shape."""

    name: ClassVar[str]

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self.batch = layouts.batch
        self.shape = layouts.batch.shape

    @abstractmethod
    def operand_shapes(self) -> list[tuple[int, ...]]:
        """Of ours."""

    @abstractmethod
    def result_shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def flop(self) -> int:
        """Of the forward; the backward of a product is two products."""

    @abstractmethod
    def reference(self, *operands: Tensor) -> Tensor:
        """In plain PyTorch, a user at a time."""

    @abstractmethod
    def providers(self) -> dict[str, Provider]:
        """Ours first."""

    @property
    def tf32(self) -> bool:
        """What peers that ask are told: ours multiplies float32 without it."""
        return self.batch.dtype != torch.float32

    on_scores: ClassVar[bool] = False
    """It reads or writes jagged scores."""

    saves_operands: ClassVar[bool] = True
    """The backward reads the operands again."""

    saves_result: ClassVar[bool] = False
    """The backward reads the result again."""

    def work(self, mode: str) -> Work:
        """Operands read once and the result written once; a backward reads what it needs and writes gradients."""
        operands = sum(self._size(shape) for shape in self.operand_shapes())
        result = self._size(self.result_shape())
        elements, flop = operands + result, self.flop()
        if mode == "forward_backward":
            elements += result + operands  # the gradient of the result is read, those of the operands are written
            elements += operands if self.saves_operands else 0
            elements += result if self.saves_result else 0
            flop *= 3
        return Work(flop, elements * self.batch.dtype.itemsize)

    def _size(self, shape: Sequence[int]) -> int:
        """Elements, of scores those of a query and a key."""
        if tuple(shape) == (self.shape.heads, self.layouts.num_scores):
            return self.shape.heads * self.layouts.num_pairs
        return int(torch.Size(shape).numel())


def _padded_rows(layouts: Layouts) -> Convert:
    """`(L, H, D)` to `(B, H, S, D)`."""
    return lambda x: layouts.pad_rows(x).transpose(1, 2).contiguous()


def _jagged_rows(layouts: Layouts) -> Convert:
    return lambda x: layouts.unpad_rows(x.transpose(1, 2))


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
        ops, offsets, longest, tf32 = torch.ops.fbgemm, batch.offsets.long(), batch.max_seqlen, self.tf32
        return {
            OURS: Provider(lambda x, w: jagged_dense_bmm(x, w, layouts.schedule)),
            PADDED: Provider(torch.bmm, (pad, _same), (unpad, _same), unpad, pad),
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
        ops, offsets, longest, tf32 = torch.ops.fbgemm, batch.offsets.long(), batch.max_seqlen, self.tf32
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
        pad, unpad = _padded_rows(layouts), _jagged_rows(layouts)
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
        pad, unpad = _padded_rows(layouts), _jagged_rows(layouts)
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
        offsets = batch.offsets.long()
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
            PADDED: Provider(lambda x, dense: F.silu(x + dense[:, None]), (pad, _same), (unpad, _same), unpad, pad),
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
        layouts, batch = self.layouts, self.batch
        pad, unpad = layouts.pad_rows, layouts.unpad_rows
        offsets = batch.offsets.long()
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


_ALL: tuple[type[Operation], ...] = (
    JaggedDenseBmm, JaggedJaggedBmm, JaggedScores, JaggedWeightedSum, JaggedSoftmax, JaggedScoreSoftmax,
    JaggedDenseElementwise, JaggedPool, JaggedConcat, JaggedToPadded,
)  # fmt: skip
OPERATIONS: dict[str, type[Operation]] = {operation.name: operation for operation in _ALL}
PROVIDERS = (OURS, PADDED, "torch", "nested", "fbgemm", "sll")
