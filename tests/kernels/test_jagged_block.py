"""All jagged operators in one layer: on a stream of its own, in a CUDA graph, compiled, without waiting for the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.jagged import Schedule
from kernels.jagged.score_layout import ScoreLayout
from kernels.jagged_concat import jagged_concat, jagged_last, jagged_split
from kernels.jagged_elementwise import (
    jagged_dense_elementwise,
    jagged_jagged_elementwise,
    jagged_to_padded,
    padded_to_jagged,
)
from kernels.jagged_matmul import jagged_dense_bmm, jagged_jagged_bmm, jagged_scores, jagged_weighted_sum
from kernels.jagged_pooling import jagged_pool
from kernels.jagged_softmax import jagged_score_softmax, jagged_softmax
from kernels.score_pitch import count_scores
from tests.kernels.jagged_operands import longer, make, offsets_of, with_gradients

H, D = 2, 16


class Layer:
    """A layer for users of some lengths, with schedules that are made in every call or given."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.offsets = offsets_of(lengths, device, torch.int64)

    def operands(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        L, B = sum(self.lengths), len(self.lengths)
        shapes = [(L, H, D)] * 3 + [(B, H, D, D), (B, H * D)]
        return [0.3 * x for x in make(self.offsets.device, dtype, *shapes)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, dense: Tensor) -> Tensor:
        total, longest = sum(self.lengths), max(self.lengths)
        schedule = Schedule(self.offsets, total, longest)
        layout = ScoreLayout(schedule, count_scores(self.lengths))
        weights = jagged_score_softmax(jagged_scores(q, k, layout, scale=0.25), layout, causal=True)
        mixed = jagged_weighted_sum(weights, v, layout)
        mixed = jagged_dense_bmm(mixed, w + jagged_jagged_bmm(q, k, schedule), schedule)
        x = jagged_dense_elementwise(mixed.flatten(1), dense, schedule, activation="silu")
        x = x * jagged_softmax(x, schedule)
        x, _ = jagged_jagged_elementwise(x, q.flatten(1), schedule, schedule, lengths="longer", total=total)
        x = padded_to_jagged(jagged_to_padded(x, schedule), schedule)
        both = jagged_concat(x, v.flatten(1), schedule, schedule)
        x, _ = jagged_split(both, schedule, schedule)
        last, offsets = jagged_last(x, schedule, 5, sum(min(n, 5) for n in self.lengths))
        pooled = jagged_pool(last, Schedule(offsets, len(last), 5), "mean")
        return pooled + jagged_pool(x, schedule, "max")


def layer_on(device: torch.device) -> Layer:
    return Layer(longer([7, 0, 40, 1, 33], device), device)


def test_gradients_reach_everything(kernel_device: torch.device) -> None:
    layer = layer_on(kernel_device)
    operands = layer.operands()
    (dout,) = make(kernel_device, torch.float32, (5, H * D), seed=1)
    out, *gradients = with_gradients(layer, operands, dout)
    again = with_gradients(layer, operands, dout)
    assert bool(out.isfinite().all())
    for gradient in gradients:
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())
    assert all(torch.equal(a, b) for a, b in zip([out, *gradients], again, strict=True))


def test_compiled_it_is_the_same(kernel_device: torch.device) -> None:
    layer = layer_on(kernel_device)
    operands = layer.operands()
    (dout,) = make(kernel_device, torch.float32, (5, H * D), seed=1)
    compiled = torch.compile(layer.__call__, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, operands, dout), with_gradients(layer, operands, dout), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    layer = layer_on(torch.device("cuda"))
    operands = layer.operands(torch.bfloat16)
    (dout,) = make(torch.device("cuda"), torch.bfloat16, (5, H * D), seed=1)
    with_gradients(layer, operands, dout)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(layer, operands, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_stream_of_its_own() -> None:
    layer = layer_on(torch.device("cuda"))
    operands = layer.operands(torch.bfloat16)
    (dout,) = make(torch.device("cuda"), torch.bfloat16, (5, H * D), seed=1)
    expected = with_gradients(layer, operands, dout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on another stream would come first
        late = [x.clone() for x in operands]
        results = with_gradients(layer, late, dout)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    layer = layer_on(torch.device("cuda"))
    operands = [x.requires_grad_() for x in layer.operands(torch.bfloat16)]
    (dout,) = make(torch.device("cuda"), torch.bfloat16, (5, H * D), seed=1)

    def step() -> tuple[Tensor, ...]:
        out = layer(*operands)
        return out, *torch.autograd.grad(out, operands, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for x in operands:
                x.mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))
