"""Operators of `torch.library` that eager calls skip: dispatching one can take longer than a short kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels.jagged.launch import is_traced

NAMESPACE = "recsys_kernels"


class Operator:
    """A custom op, called as such while somebody records operators; otherwise what it wraps is called directly.

    Fakes and gradients are registered as for `torch.library.custom_op`, once for both ways.

    Args:
        name: in the namespace `recsys_kernels`.
        function: computes it, from tensors and other arguments that are given by position.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
        self.backward: Callable[..., tuple[Tensor | None, ...]] | None = None
        self.setup_context: Callable[[Any, tuple, Any], None] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """What the results look like; a decorator."""
        self.op.register_fake(fake)
        return fake

    def register_autograd(
        self,
        backward: Callable[..., tuple[Tensor | None, ...]],
        *,
        setup_context: Callable[[Any, tuple, Any], None],
    ) -> None:
        """The gradient: `backward(ctx, *gradients)`, after `setup_context(ctx, inputs, output)`."""
        self.op.register_autograd(backward, setup_context=setup_context)
        self.backward, self.setup_context = backward, setup_context

    def __call__(self, *args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if is_traced(*tensors) or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return self.op(*args)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self.function(*args)
        if self.backward is None:
            return self.op(*args)  # says so when somebody wants a gradient
        return _Eager.apply(self, *args)


class _Eager(torch.autograd.Function):
    """An operator with its gradient, without the operator."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *args: Any) -> Any:
        output = operator.function(*args)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*[x for x in outputs if not x.is_floating_point()])
        assert operator.setup_context is not None
        operator.setup_context(ctx, args, output)
        ctx.operator = operator
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.operator.backward(_OfArguments(ctx), *gradients)


class _OfArguments:
    """A context whose inputs are the arguments of the operator, without the operator."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad = ctx.needs_input_grad[1:]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of a function; a decorator."""
    return lambda function: Operator(name, function)
