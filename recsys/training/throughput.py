"""Step times, rates and memory of a run.

Vocabulary: a sample is one user row; QPS is samples per second over all ranks; tokens are real tokens (history events
and candidates), never padding.
"""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from data.batch import Batch


@dataclass
class Counts:
    """What passed through the model, on this rank; as `per_second`, rates."""

    steps: float = 0
    samples: float = 0
    tokens: float = 0
    candidates: float = 0
    flops: float = 0

    def add(self, batch: Batch, flops: float) -> None:
        """Count one batch, from its host-side integers."""
        self.steps += 1
        self.samples += batch.num_users
        self.tokens += batch.num_history + batch.num_candidates
        self.candidates += batch.num_candidates
        self.flops += flops

    def minus(self, other: "Counts") -> "Counts":
        """What was counted since `other`."""
        return self._each(lambda name: getattr(self, name) - getattr(other, name))

    def per_second(self, seconds: float) -> "Counts":
        """Rates; NaN where no time was measured."""
        return self._each(lambda name: getattr(self, name) / seconds if seconds > 0 else float("nan"))

    @classmethod
    def sum(cls, counts: list["Counts"]) -> "Counts":
        """What all of them counted."""
        return cls()._each(lambda name: sum(getattr(c, name) for c in counts))

    def _each(self, value: Callable[[str], float]) -> "Counts":
        return Counts(**{f.name: value(f.name) for f in fields(self)})


@dataclass
class StepTimer:
    """Time between the ends of consecutive training steps, without waiting for the device in a step.

    On CUDA an event marks the end of every step and is read at the next logging step; on a CPU the clock is read.
    `interrupt` keeps what happens between two steps (evaluation, a checkpoint) out of the figures.
    """

    device: torch.device
    step_seconds: list[float] = field(default_factory=list)
    _marks: list[tuple[torch.cuda.Event | float, bool]] = field(default_factory=list)

    def interrupt(self) -> None:
        """Start timing afresh from here."""
        self._marks.append((self._now(), False))

    def step_done(self) -> None:
        """Mark the end of a step."""
        self._marks.append((self._now(), True))

    def collect(self) -> float:
        """Read the marks (waits for the device); returns the seconds of the steps since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = len(self.step_seconds)
        for (start, _), (end, is_step) in zip(self._marks, self._marks[1:], strict=False):
            if is_step:
                self.step_seconds.append(_seconds(start, end))
        self._marks = self._marks[-1:]
        return sum(self.step_seconds[before:])

    def _now(self) -> "torch.cuda.Event | float":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: "torch.cuda.Event | float", end: "torch.cuda.Event | float") -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    return start.elapsed_time(end) / 1000.0  # type: ignore[union-attr, arg-type]


def percentile(values: list[float], percent: int) -> float:
    """The `percent`-th percentile, 1 to 99; NaN without values."""
    if not values:
        return float("nan")
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def peak_device_mib(device: torch.device) -> float:
    """Most device memory that tensors of this rank held at once, in MiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def peak_host_mib() -> float:
    """Largest resident set of this process so far, in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
