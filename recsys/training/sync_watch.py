"""Finds host synchronisations inside CUDA training steps, with torch's sync debug mode."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import torch

_EXCHANGE_OF_SIZES = ("torchrec/distributed/dist_data.py", "torchrec/distributed/train_pipeline/")
"""Where TorchRec exchanges the sizes of the next batch's ids."""


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
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [_site(w) for w in caught if "synchronizing CUDA operation" in str(w.message)]
        self.sites.update(found)
        own = [site for site in found if not site.startswith(_EXCHANGE_OF_SIZES)]
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


def _site(warning: warnings.WarningMessage) -> str:
    """File, from its package on, and line."""
    parts = Path(warning.filename).parts
    roots = [i for i, part in enumerate(parts) if part in ("torchrec", "torch", "recsys", "data", "kernels")]
    return f"{'/'.join(parts[roots[-1] if roots else -1 :])}:{warning.lineno}"
