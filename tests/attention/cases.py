"""Layouts, masks and the comparison that the attention tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jagged_flash_attention.reference import reference_attention
from kernels.score_pitch import count_scores
from recsys.attention import AttentionBackend, CrossLayout, JaggedLayout, MaskSpec


@dataclass(frozen=True)
class Users:
    """Lengths per user and how many of a user's tokens are candidates."""

    lengths: tuple[int, ...]
    targets: tuple[int, ...]


USERS = {
    "mixed": Users((7, 1, 33, 0, 18), (2, 1, 3, 0, 1)),
    "empty_first_and_last": Users((0, 0, 5, 0), (0, 0, 2, 0)),
    "one_user": Users((19,), (4,)),
    "one_token": Users((1,), (1,)),
    "only_candidates": Users((3, 0, 2), (3, 0, 2)),
    "no_history_for_one": Users((4, 9), (4, 2)),
    "all_equal": Users((8, 8, 8), (0, 0, 0)),
}

MASKS = {
    "causal": (True, None, False),
    "full": (False, None, False),
    "causal_window": (True, 5, False),
    "full_window": (False, 4, False),
    "candidates": (True, None, True),
    "candidates_full": (False, None, True),
    "candidates_window": (True, 3, True),
    "candidates_full_window": (False, 2, True),
}


def make_layout(users: Users, device: torch.device, offsets_dtype: torch.dtype = torch.int64) -> JaggedLayout:
    lengths = torch.tensor((0, *users.lengths))
    offsets = lengths.cumsum(0).to(device, offsets_dtype)
    return JaggedLayout(offsets, max(users.lengths), sum(users.lengths), count_scores(users.lengths))


def make_cross_layout(
    queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device, offsets_dtype: torch.dtype = torch.int64
) -> CrossLayout:
    sides = [make_layout(Users(lengths, ()), device, offsets_dtype) for lengths in (queries, keys)]
    return CrossLayout(*sides, total_scores=count_scores(queries, keys))


def make_mask(users: Users, mask_id: str, device: torch.device) -> MaskSpec:
    causal, window, with_targets = MASKS[mask_id]
    if not with_targets:
        return MaskSpec(causal, window)
    return MaskSpec(
        causal,
        window,
        num_targets=torch.tensor(users.targets, device=device),
        total_targets=sum(users.targets),
        max_targets=max(users.targets),
        max_history=max(n - t for n, t in zip(users.lengths, users.targets, strict=True)),
    )


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def make_inputs(total: int, device: torch.device, dtype: torch.dtype, num_heads: int = 2, head_dim: int = 16) -> Inputs:
    """q, k, v as slices of one fused projection, as models make them: rows are not adjacent in memory."""
    generator = torch.Generator().manual_seed(total)
    qkv = torch.randn(total, 3, num_heads, head_dim, generator=generator).to(device, dtype)
    dout = torch.randn(total, num_heads, head_dim, generator=generator).to(device, dtype)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(dim=1))
    return Inputs(q, k, v, dout)


def make_cross_inputs(layout: CrossLayout, device: torch.device, dtype: torch.dtype, head_dim: int = 16) -> Inputs:
    q = make_inputs(layout.queries.total, device, dtype, head_dim=head_dim)
    k = make_inputs(layout.keys.total, device, dtype, head_dim=head_dim)
    return Inputs(q.q, k.k, k.v, q.dout)


def outputs_of(
    backend: AttentionBackend, inputs: Inputs, layout: JaggedLayout | CrossLayout, mask: MaskSpec
) -> list[Tensor]:
    """out, dq, dk, dv; across, where the layout is."""
    if isinstance(layout, CrossLayout):
        out = backend.cross(inputs.q, inputs.k, inputs.v, layout)
    else:
        out = backend(inputs.q, inputs.k, inputs.v, layout, mask)
    return [out, *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)]


def reference_outputs(
    inputs: Inputs, layout: JaggedLayout | CrossLayout, mask: MaskSpec, dtype: torch.dtype
) -> list[Tensor]:
    """out, dq, dk, dv of plain PyTorch computing in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    queries, keys = (layout.queries, layout.keys) if isinstance(layout, CrossLayout) else (layout, None)
    out = reference_attention(
        q,
        k,
        v,
        queries.offsets,
        queries.max_seqlen,
        causal=mask.causal and keys is None,
        window=mask.window,
        num_targets=mask.num_targets,
        key_offsets=None if keys is None else keys.offsets,
        max_key_seqlen=None if keys is None else keys.max_seqlen,
    )
    return [out, *torch.autograd.grad(out, (q, k, v), inputs.dout.to(dtype))]


def assert_as_exact_as_pytorch(
    actual: list[Tensor], inputs: Inputs, layout: JaggedLayout | CrossLayout, mask: MaskSpec
) -> None:
    """The error against fp64 is at most 2× (gradients 3×) that of plain PyTorch in the inputs' dtype.

    Above a floor: rounding of the result, and of sums over the head dim in fp32 where the exact value is 0.
    """
    exact = reference_outputs(inputs, layout, mask, torch.float64)
    baseline = reference_outputs(inputs, layout, mask, inputs.q.dtype)
    epsilon = torch.finfo(inputs.q.dtype).eps
    for name, factor, got, want, plain in zip(
        ("out", "dq", "dk", "dv"), (2, 3, 3, 3), actual, exact, baseline, strict=True
    ):
        assert got.shape == want.shape
        assert got.dtype == inputs.q.dtype
        assert got.isfinite().all(), f"{name} is not finite"
        if got.numel() == 0:
            continue
        error = (got.double() - want).abs().max().item()
        allowed = factor * (plain.double() - want).abs().max().item() + 2 * epsilon * want.abs().max().item()
        allowed += 4 * torch.finfo(torch.float32).eps * got.shape[-1]
        assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
