"""What an operation and its providers are.

Letters as in ../layouts.py; `D` head dim.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.attention.shapes import Work
from benchmarks.interaction.layouts import Layouts

OURS = "ours"
PADDED = "padded"
Convert = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
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
    result: Convert = same
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


def padded_rows(layouts: Layouts) -> Convert:
    """`(L, H, D)` to `(B, H, S, D)`."""
    return lambda x: layouts.pad_rows(x).transpose(1, 2).contiguous()


def jagged_rows(layouts: Layouts) -> Convert:
    return lambda x: layouts.unpad_rows(x.transpose(1, 2))
