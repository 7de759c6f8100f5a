"""How long a call takes, and how much memory.

Device time is that of calls captured in a CUDA graph, so that the host plays no part. The inputs rotate over
several sets that together are past the L2 cache, as the tensors of a model are when its next layer comes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.attention.shapes import Batch, Inputs

MODES = ("forward", "forward_backward")

CALLS_PER_REPLAY = 10
QUEUED_CALLS = 50

# A call of this length hides the host's work behind the device's, so a graph would tell nothing new; it is queued,
# and a few times only, since the padding providers take a tenth of a second.
SLOW_CALL_MS = 5.0
SLOW_REPEATS = 3
SLOW_QUEUED_CALLS = 2

LEAST_COPIES = 2
L2_CACHES_TO_PASS = 2  # the sets of inputs together are at least so many times the L2 cache

Results = tuple[torch.Tensor, ...]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Timing:
    """What one provider took for one shape and mode."""

    device_ms: float
    """Per call; the median of the repeats."""

    call_ms: float
    """Wall time per call of calls issued one after another, with one synchronisation at the end."""

    method: str
    """`graph`: replays of a CUDA graph. `queued`: calls queued back to back between events, where the host's work
    shows if it is longer than the device's. `wall`: on a CPU."""

    peak_mib: float | None
    """Greatest allocated memory during a call, above what was there before it; None on a CPU."""


def run_once(attention: Attention, inputs: Inputs, mode: str) -> Results:
    """`(out,)`, or `(out, dq, dk, dv)` for the gradient `inputs.dout`."""
    if mode == "forward":
        with torch.no_grad():
            return (attention(inputs.q, inputs.k, inputs.v),)
    out = attention(inputs.q, inputs.k, inputs.v)
    return out, *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)


def copies_past_cache(batch: Batch) -> int:
    """How many sets of inputs one replay has to rotate over to be past the L2 cache."""
    if batch.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(batch.device).L2_cache_size
    shape = batch.shape
    num_bytes = batch.total * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * batch.dtype.itemsize
    needed = -(-L2_CACHES_TO_PASS * cache // max(num_bytes, 1))
    return min(max(needed, LEAST_COPIES), CALLS_PER_REPLAY)


def measure(attention: Attention, inputs: Sequence[Inputs], mode: str, repeats: int) -> Timing:
    """Time and memory of a call that has run before (and so is compiled)."""
    if inputs[0].q.device.type != "cuda":
        return _measure_on_cpu(attention, inputs, mode, repeats)
    peak_mib = _peak_mib(attention, inputs[0], mode)
    if _queued_ms(attention, inputs, mode, repeats=1, calls=1) > SLOW_CALL_MS:
        device_ms = _queued_ms(attention, inputs, mode, SLOW_REPEATS, calls=1)
        return Timing(device_ms, _call_ms(attention, inputs, mode, SLOW_QUEUED_CALLS), "queued", peak_mib)
    captured_ms = _graph_ms(attention, inputs, mode, repeats)
    if captured_ms is None:
        device_ms, method = _queued_ms(attention, inputs, mode, repeats, CALLS_PER_REPLAY), "queued"
    else:
        device_ms, method = captured_ms, "graph"
    return Timing(device_ms, _call_ms(attention, inputs, mode, QUEUED_CALLS), method, peak_mib)


def _measure_on_cpu(attention: Attention, inputs: Sequence[Inputs], mode: str, repeats: int) -> Timing:
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        run_once(attention, inputs[i % len(inputs)], mode)
        times.append(1e3 * (time.perf_counter() - start))
    return Timing(statistics.median(times), sum(times) / len(times), "wall", None)


def _peak_mib(attention: Attention, inputs: Inputs, mode: str) -> float:
    """Memory that one call needs beyond what was allocated before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_once(attention, inputs, mode)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _graph_ms(attention: Attention, inputs: Sequence[Inputs], mode: str, replays: int) -> float | None:
    """Milliseconds per call in a replayed graph; None where the calls can't be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set up their workspaces per stream, which a capture forbids
            inputs = [_fresh_leaves(one) for one in inputs]
            run_once(attention, inputs[0], mode)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(CALLS_PER_REPLAY):
                run_once(attention, inputs[i % len(inputs)], mode)
    except Exception:  # whatever a call did that a capture forbids, in its own library's words; or no memory for a copy
        torch.cuda.synchronize()
        return None
    graph.replay()
    return _between_events(graph.replay, replays) / CALLS_PER_REPLAY


def _fresh_leaves(inputs: Inputs) -> Inputs:
    """The same memory as new leaves of autograd.

    A leaf's node belongs to the stream on which it was first used, and lives on if a provider's graph has a cycle;
    gradients would then go to that stream in the middle of a capture.
    """
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    return Inputs(q, k, v, inputs.dout)


def _queued_ms(attention: Attention, inputs: Sequence[Inputs], mode: str, repeats: int, calls: int) -> float:
    """Milliseconds per call of `repeats` times `calls` calls issued without a pause."""

    def some_calls() -> None:
        for i in range(calls):
            run_once(attention, inputs[i % len(inputs)], mode)

    some_calls()
    return _between_events(some_calls, repeats) / calls


def _between_events(work: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `work`, queued `repeats` times behind what the device has to do already."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(events[:-1], events[1:], strict=True))


def _call_ms(attention: Attention, inputs: Sequence[Inputs], mode: str, calls: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        run_once(attention, inputs[i % len(inputs)], mode)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls
