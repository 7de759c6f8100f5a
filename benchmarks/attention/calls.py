"""One call of a provider: forward, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.attention.shapes import Batch, Inputs
from benchmarks.timing import Calls, sets_past_cache

Results = tuple[torch.Tensor, ...]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run_once(attention: Attention, inputs: Inputs, mode: str) -> Results:
    """`(out,)`, or `(out, dq, dk, dv)` for the gradient `inputs.dout`."""
    if mode == "forward":
        with torch.no_grad():
            return (attention(inputs.q, inputs.k, inputs.v),)
    out = attention(inputs.q, inputs.k, inputs.v)
    return out, *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)


def calls_of(attention: Attention, inputs: Sequence[Inputs], mode: str) -> Callable[[], Calls]:
    """Makes calls on the same memory as new leaves of autograd, set after set."""

    def make_calls() -> Calls:
        leaves = [_fresh_leaves(one) for one in inputs]
        return lambda i: run_once(attention, leaves[i % len(leaves)], mode)

    return make_calls


def copies_past_cache(batch: Batch) -> int:
    """How many sets of inputs one replay has to rotate over to be past the L2 cache."""
    shape = batch.shape
    num_bytes = batch.total * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * batch.dtype.itemsize
    return sets_past_cache(num_bytes, batch.device)


def _fresh_leaves(inputs: Inputs) -> Inputs:
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    return Inputs(q, k, v, inputs.dout)
