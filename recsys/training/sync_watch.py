"""Finds host synchronisations inside CUDA training steps, with torch's sync debug mode."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_MESSAGE = "synchronizing CUDA operation"


class SyncDebug(Enum):
    """What a host synchronisation inside a training step does."""

    off = "off"
    report = "report"
    error = "error"


class SynchronisationError(RuntimeError):
    """A training step waited for the device."""


class SyncWatch:
    """Counts synchronisations by the line of Python that caused them.

    TorchRec copies the sizes of its exchange of ids between host and device, a batch ahead and on a stream of its own,
    which doesn't wait for the training step: those lines are counted, but they are no error.

    Args:
        mode: `report` collects, `error` raises at the end of a step that synchronised outside TorchRec.
        device: only CUDA has something to watch.
        first_steps: not watched; TorchRec sets its exchanges up there, and kernels are compiled.
    """

    def __init__(self, mode: SyncDebug, device: torch.device, first_steps: int) -> None:
        self.asked = mode
        self.mode = mode if device.type == "cuda" else SyncDebug.off
        self.first_steps = first_steps
        self.num_steps = 0
        self.sites: Counter[str] = Counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watch one step."""
        self.num_steps += 1
        if self.mode is SyncDebug.off or self.num_steps <= self.first_steps:
            yield
            return
        found: list[_Site] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("always", message=f".*{_MESSAGE}")
                warnings.showwarning = _collector(found, warnings.showwarning)
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self.sites.update(str(site) for site in found)
        own = [str(site) for site in found if not site.is_exchange]
        if own and self.mode is SyncDebug.error:
            raise SynchronisationError(f"a training step waited for the GPU at {', '.join(dict.fromkeys(own))}")

    def report(self) -> str:
        """How often which line synchronised."""
        if self.asked is not self.mode:
            return "host synchronisations are looked for on CUDA only"
        num_watched = max(0, self.num_steps - self.first_steps)
        if self.mode is SyncDebug.off or not num_watched:
            return ""
        lines = [f"  {count:>5} x {site}" for site, count in self.sites.most_common()] or ["  none"]
        return f"host synchronisations in {num_watched} steps:\n" + "\n".join(lines)


@dataclass(frozen=True)
class _Site:
    """Where a synchronisation was asked for."""

    line: str
    """File, from its package on, and line."""

    is_exchange: bool
    """Called from TorchRec's exchange of the next batch's sizes."""

    def __str__(self) -> str:
        return f"{self.line} (TorchRec's exchange of sizes)" if self.is_exchange else self.line


def _collector(found: list[_Site], show: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for `warnings.showwarning`: keeps the site of a synchronisation, shows any other warning."""

    def collect(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if _MESSAGE in str(message):
            found.append(_Site(f"{_from_package(filename)}:{lineno}", _in_exchange()))
        else:
            show(message, category, filename, lineno, *rest)

    return collect


def _in_exchange() -> bool:
    """Is TorchRec's exchange of sizes, or its pipeline's part of it, among the callers?"""
    return any(_exchanges(frame) for frame, _ in traceback.walk_stack(None))


def _exchanges(frame: FrameType) -> bool:
    file = _from_package(frame.f_code.co_filename)
    in_pipeline = file.startswith("torchrec/distributed/train_pipeline/") and "data_dist" in frame.f_code.co_name
    return in_pipeline or file == "torchrec/distributed/dist_data.py"


def _from_package(filename: str) -> str:
    parts = Path(filename).parts
    roots = [i for i, part in enumerate(parts) if part in ("torchrec", "torch", "recsys", "data", "kernels")]
    return "/".join(parts[roots[-1] if roots else -1 :])
