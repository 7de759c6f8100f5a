"""Inputs for tests of jagged attention, and the comparison of a kernel with the reference by the tolerance policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.jagged_flash_attention import jagged_flash_attention, reference_attention
from tests.numerics import FORWARD_FACTOR, GRADIENT_FACTOR, assert_matches_reference

# Tiles are 16 and 32 rows in the interpreter, up to 128 on a GPU, where lengths are multiplied (`on_device`).
LENGTHS: dict[str, list[int]] = {
    "one_token": [1],
    "one_user": [70],
    "only_single_tokens": [1, 1, 1, 1, 1],
    "empty_users_around": [0, 0, 5, 0, 37, 0],
    "at_tile_edges": [15, 16, 17, 31, 32, 33],
    "one_long_many_short": [3, 2, 80, 1, 4],
    "only_empty_users": [0, 0, 0],
    "no_users": [],
}
MIXED = [0, 1, 66, 33, 5, 0, 16]  # a window of 47 ends one row off the edges of the tiles of 66
CANDIDATES = [3, 0, 1000, 1, 20]  # dealt out to users in turn, at most their length: some are all candidates


@dataclass(frozen=True)
class Case:
    """One call: the sequences, the mask and the tensors' shape."""

    lengths: list[int]
    num_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    offsets_dtype: torch.dtype = torch.int64
    causal: bool = True
    window: int | None = None
    has_candidates: bool = False
    scale: float | None = None
    slack: int = 0  # max_seqlen above the longest length
    seed: int = 0

    def on_device(self, device: torch.device) -> Case:
        """Longer on a GPU, to fill its larger tiles: lengths of 2 and more times 7, the window too."""
        if device.type == "cpu":
            return self
        window = self.window if self.window in (None, 1) else 7 * self.window
        return replace(self, lengths=[7 * n if n > 1 else n for n in self.lengths], window=window)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0) + self.slack

    def make_offsets(self, device: torch.device) -> Tensor:
        lengths = torch.tensor([0, *self.lengths], dtype=self.offsets_dtype)
        return lengths.cumsum(0, dtype=self.offsets_dtype).to(device)

    def make_qkvg(self, device: torch.device) -> list[Tensor]:
        """q, k, v and the gradient of the output, standard normal."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (4, sum(self.lengths), self.num_heads, self.head_dim)
        return [x.to(device, self.dtype) for x in torch.randn(shape, generator=generator)]

    def options(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the operator and of the reference."""
        num_targets = None
        if self.has_candidates:
            dealt = [min(n, CANDIDATES[i % len(CANDIDATES)]) for i, n in enumerate(self.lengths)]
            num_targets = torch.tensor(dealt, dtype=self.offsets_dtype, device=device)
        return {"causal": self.causal, "window": self.window, "num_targets": num_targets, "scale": self.scale}


def with_gradients(function: Any, qkv: list[Tensor], dout: Tensor, *args: Any, **options: Any) -> dict[str, Tensor]:
    """`function`'s output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = function(*leaves, *args, **options)
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def assert_kernel_matches_reference(case: Case, device: torch.device) -> None:
    """Forward and gradients of the kernel against float64, within the policy's multiple of PyTorch's own error."""
    *qkv, dout = case.make_qkvg(device)
    args = (case.make_offsets(device), case.max_seqlen)
    options = case.options(device)
    actual = with_gradients(jagged_flash_attention, qkv, dout, *args, **options)
    baseline = with_gradients(reference_attention, qkv, dout, *args, **options)
    exact = with_gradients(reference_attention, [x.double() for x in qkv], dout.double(), *args, **options)
    for name in actual:
        factor = FORWARD_FACTOR if name == "out" else GRADIENT_FACTOR
        assert_matches_reference(
            actual[name], baseline[name], exact[name], factor=factor, name=name, lengths=case.lengths
        )
