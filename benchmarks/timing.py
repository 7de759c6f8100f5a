"""How long a call takes, and how much memory.

Device time is that of calls captured in a CUDA graph, so that the host plays no part. The inputs rotate over
several sets that together are past the L2 cache, as the tensors of a model are when its next layer comes.

Providers take turns. A GPU that is limited by power gives whoever comes after a pause a higher clock: measured one
after the other, the same kernel differed by 15 % (docs/lab_log.md). So all of them are made ready first, and then
replayed again and again, in an order in which everyone comes equally often behind every other.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CALLS_PER_REPLAY = 10
QUEUED_CALLS = 50
ORDER_SEED = 0

# A call of this length hides the host's work behind the device's, so a graph would tell nothing new; it is queued,
# and a few times only, since the padding providers take a tenth of a second. They don't take turns with the others.
SLOW_CALL_MS = 20.0
SLOW_REPEATS = 3
SLOW_QUEUED_CALLS = 2

LEAST_COPIES = 2
L2_CACHES_TO_PASS = 2  # the sets of inputs together are at least so many times the L2 cache

MODES = ("forward", "forward_backward")

Calls = Callable[[int], object]
"""Issues the i-th call, on one of several sets of inputs."""


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


def sets_past_cache(num_bytes: int, device: torch.device) -> int:
    """How many sets of inputs of so many bytes one replay has to rotate over to be past the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    needed = -(-L2_CACHES_TO_PASS * cache // max(num_bytes, 1))
    return min(max(needed, LEAST_COPIES), CALLS_PER_REPLAY)


@dataclass(frozen=True)
class Ready:
    """Calls that wait for their turn."""

    calls: Callable[[], object]
    """Issues some of them."""

    num_calls: int
    method: str
    call_ms: float
    peak_mib: float | None


def prepare(make_calls: Callable[[], Calls], device: torch.device, repeats: int, pool: Any = None) -> Ready | Timing:
    """Make calls that have run before (and so are compiled) ready to be timed.

    What is so slow that it can't compete, and all on a CPU, is timed at once.

    Args:
        make_calls: gives calls whose leaves of autograd nobody has used yet. A leaf's node belongs to the stream on
            which it was first used, and lives on if a provider's graph has a cycle; gradients would then go to that
            stream in the middle of a capture.
        device: where they run.
        repeats: of what is timed at once.
        pool: see `capture`.
    """
    call = make_calls()
    if device.type != "cuda":
        return _measure_on_cpu(call, repeats)
    peak_mib = _peak_mib(call)
    if _queued_ms(call, repeats=1, calls=1) > SLOW_CALL_MS:
        device_ms = _queued_ms(call, SLOW_REPEATS, calls=1)
        return Timing(device_ms, _call_ms(call, SLOW_QUEUED_CALLS), "queued", peak_mib)
    replay = _capture_or_none(make_calls(), pool) if _fits_again(peak_mib) else None
    call_ms = _call_ms(call, QUEUED_CALLS)
    if replay is not None:
        return Ready(replay, CALLS_PER_REPLAY, "graph", call_ms, peak_mib)
    return Ready(_some_calls(call, CALLS_PER_REPLAY), CALLS_PER_REPLAY, "queued", call_ms, peak_mib)


def time_in_turns(ready: Sequence[Ready], repeats: int) -> list[Timing | Exception]:
    """The median of `repeats` turns of each; of whose calls fail, the error instead."""
    times = ms_in_turns([one.calls for one in ready], repeats)
    return [
        ms if isinstance(ms, Exception) else Timing(ms / one.num_calls, one.call_ms, one.method, one.peak_mib)
        for one, ms in zip(ready, times, strict=True)
    ]


def ms_in_turns(functions: Sequence[Callable[[], object]], repeats: int) -> list[float | Exception]:
    """Median milliseconds on the device of each; see `turns_in_order`.

    What fails has no further turns, and the error instead of a time.
    """
    if not functions:
        return []
    failed: dict[int, Exception] = {}
    turns: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
    for i_round, i in turns_in_order(len(functions), repeats + 1):
        if i in failed:
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            functions[i]()
        except Exception as error:  # of a provider that runs instead of being replayed
            failed[i] = error
            continue
        end.record()
        if i_round > 0:  # the first warms up
            turns[i].append((start, end))
    torch.cuda.synchronize()
    return [
        failed[i] if i in failed else statistics.median(start.elapsed_time(end) for start, end in turns[i])
        for i in range(len(functions))
    ]


def turns_in_order(num_functions: int, rounds: int) -> Iterator[tuple[int, int]]:
    """`(round, function)`: all have one turn a round, and come about equally often behind every other.

    The same from run to run.
    """
    generator = random.Random(ORDER_SEED)
    # Behind itself only where there is no other.
    times_behind = Counter[tuple[int | None, int]]({(i, i): rounds for i in range(num_functions)})
    last: int | None = None
    for i_round in range(rounds):
        waiting = list(range(num_functions))
        while waiting:
            i = min(waiting, key=lambda i: (times_behind[last, i], generator.random()))
            times_behind[last, i] += 1
            waiting.remove(i)
            last = i
            yield i_round, i


def _measure_on_cpu(call: Calls, repeats: int) -> Timing:
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(i)
        times.append(1e3 * (time.perf_counter() - start))
    return Timing(statistics.median(times), sum(times) / len(times), "wall", None)


def _peak_mib(call: Calls) -> float:
    """Memory that one call needs beyond what was allocated before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _fits_again(peak_mib: float) -> bool:
    """Whether a graph, which has memory of its own, can have as much as a call needs; a failed capture keeps it."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return free > 1.5 * peak_mib * 2**20


def _capture_or_none(call: Calls, pool: Any) -> Callable[[], None] | None:
    """As `capture`; None where the calls can't be captured."""
    try:
        return capture(call, pool)
    except Exception:  # whatever a call did that a capture forbids, in its own library's words; or no memory for a copy
        torch.cuda.synchronize()
        return None


def capture(call: Calls, pool: Any) -> Callable[[], None]:
    """Replays calls 0 ... `CALLS_PER_REPLAY` - 1, captured in a CUDA graph after one that isn't.

    `pool` is the graph's memory; graphs that share it write over each other's results, which nobody reads.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles; libraries set up their workspaces per stream, which a capture forbids
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for i in range(CALLS_PER_REPLAY):
                call(i)
    except Exception:
        _end_allocating(pool)
        raise

    # The graph reads what the call does, inputs, masks and lists: they have to live as long as it.
    def replay(_reads: object = call) -> None:
        graph.replay()

    return replay


def _end_allocating(pool: Any) -> None:
    """After a capture that failed: torch ends its allocations to the pool only after one that didn't.

    Until then the allocator gives no cached memory back, and a comparison soon has none left.
    """
    torch.cuda.synchronize()
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it has ended: the call failed, not the capture
        return
    torch._C._cuda_releasePool(device, pool)


def _some_calls(call: Calls, calls: int) -> Callable[[], None]:
    def some_calls() -> None:
        for i in range(calls):
            call(i)

    return some_calls


def _queued_ms(call: Calls, repeats: int, calls: int) -> float:
    """Milliseconds per call of `repeats` times `calls` calls issued without a pause."""
    some_calls = _some_calls(call, calls)
    some_calls()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        some_calls()
        event.record()
    torch.cuda.synchronize()
    times = (start.elapsed_time(end) for start, end in itertools.pairwise(events))
    return statistics.median(times) / calls


def _call_ms(call: Calls, calls: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        call(i)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls
