"""Jagged operands for tests of operators, and the comparison with their references by the tolerance policy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jagged import Schedule
from kernels.jagged.score_layout import ScoreLayout
from kernels.score_pitch import count_scores
from tests.numerics import FORWARD_FACTOR, GRADIENT_FACTOR, assert_matches_reference

# Tiles are 16 to 64 rows in the interpreter, 64 and more on a GPU, where lengths are multiplied.
LENGTHS: dict[str, tuple[int, ...]] = {
    "one_token": (1,),
    "one_user": (70,),
    "empty_users_around": (0, 0, 5, 0, 37, 0),
    "at_tile_edges": (31, 32, 33, 64),
    "one_long_many_short": (3, 2, 90, 1),
    "only_empty_users": (0, 0, 0),
    "no_users": (),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Users:
    """Lengths of the users' queries, and of their keys in cross attention."""

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] | None = None
    targets: tuple[int, ...] | None = None

    def on_device(self, device: torch.device) -> Users:
        """Longer on a GPU, to fill its larger tiles."""
        key_lengths = None if self.key_lengths is None else tuple(longer(self.key_lengths, device))
        return Users(tuple(longer(self.lengths, device)), key_lengths, self.targets)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def total_keys(self) -> int:
        return sum(self.lengths if self.key_lengths is None else self.key_lengths)

    def offsets(self, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        return offsets_of(self.lengths, device, dtype)

    def key_offsets(self, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        return offsets_of(self.lengths if self.key_lengths is None else self.key_lengths, device, dtype)

    def num_targets(self, device: torch.device) -> Tensor | None:
        return None if self.targets is None else torch.tensor(self.targets, dtype=torch.int64, device=device)

    def schedule(self, device: torch.device, dtype: torch.dtype = torch.int64) -> Schedule:
        offsets, longest = self.offsets(device, dtype), max(self.lengths, default=0)
        if self.key_lengths is None:
            targets = self.num_targets(device)
            return Schedule(offsets, self.total, longest, num_targets=targets, check_values=True)
        return Schedule(
            offsets,
            self.total,
            longest,
            key_offsets=self.key_offsets(device, dtype),
            total_keys=self.total_keys,
            max_key_seqlen=max(self.key_lengths, default=0),
            check_values=True,
        )

    def layout(self, device: torch.device, dtype: torch.dtype = torch.int64) -> ScoreLayout:
        return ScoreLayout(self.schedule(device, dtype), count_scores(self.lengths, self.key_lengths))


def longer(lengths: Sequence[int], device: torch.device) -> list[int]:
    """On a GPU, to fill its larger tiles."""
    return [7 * n if n > 1 and device.type == "cuda" else n for n in lengths]


def offsets_of(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def schedule_of(lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Schedule:
    return Users(tuple(lengths)).schedule(device, dtype)


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A standard normal operand."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Standard normal operands."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def with_gradients(function: Callable[..., Tensor], operands: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """What `function` gives, and the gradients of the operands."""
    leaves = [x.detach().requires_grad_() for x in operands]
    out = function(*leaves)
    if out.numel() == 0 and not out.requires_grad:  # of a reference without users
        return [out, *map(torch.zeros_like, operands)]
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=True, materialize_grads=True)
    return [out.detach(), *gradients]


def assert_follows_reference(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    operands: Sequence[Tensor],
    *,
    magnitude: float = 1.0,
    lengths: Sequence[Sequence[int] | None] | None = None,
) -> None:
    """Result and gradients against float64, within the policy's multiple of PyTorch's own error.

    Args:
        function, reference: of the operands alone.
        operands: in the dtype that is tested.
        magnitude: of what is summed and may cancel, as for `assert_matches_reference`.
        lengths: for the result and each gradient the rows of its sequences; None where it has none, or for all.
    """
    exact_operands = [x.double() for x in operands]
    exact_out = reference(*exact_operands)
    (dout,) = make(operands[0].device, operands[0].dtype, tuple(exact_out.shape), seed=1)
    actual = with_gradients(function, operands, dout)
    baseline = with_gradients(reference, operands, dout)
    exact = with_gradients(reference, exact_operands, dout)
    names = ["out", *(f"gradient {i}" for i in range(len(operands)))]
    for i, name in enumerate(names):
        assert_matches_reference(
            actual[i],
            baseline[i],
            exact[i],
            factor=FORWARD_FACTOR if i == 0 else GRADIENT_FACTOR,
            name=name,
            lengths=None if lengths is None else lengths[i],
            magnitude=magnitude,
        )
