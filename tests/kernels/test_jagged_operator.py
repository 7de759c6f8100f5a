"""Operators that eager calls skip: the same results, gradients and refusals on both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.jagged.operator import operator

asked: list[tuple[bool, ...]] = []


@operator("test_scale_and_count")
def scale_and_count(x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x * y * factor, torch.full((1,), x.numel(), dtype=torch.int32)


@scale_and_count.register_fake
def _fake(x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((1,), dtype=torch.int32)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, y, ctx.factor = inputs
    ctx.save_for_backward(x, y)


def _backward(ctx: Any, dout: Tensor, _dcount: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    asked.append(ctx.needs_input_grad[:2])
    dx = scale_and_count(dout, y, ctx.factor)[0] if ctx.needs_input_grad[0] else None
    return dx, scale_and_count(dout, x, ctx.factor)[0] if ctx.needs_input_grad[1] else None, None


scale_and_count.register_autograd(_backward, setup_context=_setup)


@operator("test_without_gradient")
def without_gradient(x: Tensor) -> Tensor:
    return x * 2.0


class Recorder(TorchDispatchMode):
    """Names of the operators of ours that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "recsys_kernels" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, generator=generator).requires_grad_(), torch.randn(5, generator=generator).requires_grad_()


def results(call: Any) -> list[Tensor]:
    x, y = leaves()
    out, count = call(x, y, 3.0)
    dx, dy = torch.autograd.grad(out.square().sum(), (x, y), create_graph=True)
    return [out, count, dx, dy, *torch.autograd.grad(dx.sum() + dy.square().sum(), (x, y))]


def test_both_ways_agree_with_torch() -> None:
    def plain(x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return x * y * factor, torch.full((1,), x.numel(), dtype=torch.int32)

    expected = results(plain)
    for way in (scale_and_count, scale_and_count.op):
        for a, b in zip(results(way), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_only_gradients_that_are_needed_are_asked_for() -> None:
    x, y = leaves()
    asked.clear()
    out, _ = scale_and_count(x.detach(), y, 1.0)
    (dy,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(dy, x.detach())
    assert asked == [(False, True)]


def test_eager_calls_skip_the_operator_and_recorded_ones_do_not() -> None:
    x, y = leaves()
    expected = scale_and_count(x, y, 2.0)[0]
    assert "_Eager" in type(expected.grad_fn).__name__
    with torch.no_grad():
        assert scale_and_count(x, y, 2.0)[0].grad_fn is None
    with Recorder() as recorder:
        torch.testing.assert_close(scale_and_count(x, y, 2.0)[0], expected)
    assert recorder.names == ["recsys_kernels.test_scale_and_count.default"]
    compiled = torch.compile(lambda x, y: scale_and_count(x, y, 2.0)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), expected)
    torch.library.opcheck(scale_and_count.op, (x, y, 2.0))


def test_an_operator_without_a_gradient_says_so() -> None:
    x, _ = leaves()
    assert torch.equal(without_gradient(x.detach()), 2.0 * x.detach())
    out = without_gradient(x)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
