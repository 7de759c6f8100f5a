"""How fast the input side is on its own: `python -m data.throughput --history-mean 100 --batch-size 512`.

Prints one line per setting: samples (users) and tokens (history events and candidates) per second. With workers it also
divides by the cores they ran on; without, CPU time is what counts, so that a busy machine does not blur the figure.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass

import torch

from data.batch import Batch
from data.config import CandidatesConfig, HistoryConfig, SyntheticConfig
from data.loader import build_loader
from data.sources import build_source


@dataclass
class Throughput:
    """What one measurement gave."""

    samples: int
    tokens: int
    wall_seconds: float
    cpu_seconds: float
    """Of this process; the workers' is not in it."""
    num_workers: int

    @property
    def samples_per_second(self) -> float:
        """Users per second of wall time, over all workers."""
        return self.samples / self.wall_seconds

    @property
    def samples_per_core_second(self) -> float:
        """Users per second of one core: CPU time without workers, else wall time of every worker."""
        return self.samples / self._core_seconds

    @property
    def tokens_per_core_second(self) -> float:
        """Real tokens (events and candidates) per second of one core."""
        return self.tokens / self._core_seconds

    @property
    def _core_seconds(self) -> float:
        return self.wall_seconds * self.num_workers if self.num_workers else self.cpu_seconds

    def __str__(self) -> str:
        return (
            f"{self.samples} samples of {self.tokens / self.samples:.1f} tokens in {self.wall_seconds:.2f} s: "
            f"{self.samples_per_second:,.0f} samples/s; per core {self.samples_per_core_second:,.0f} samples/s, "
            f"{self.tokens_per_core_second / 1e6:.2f} M tokens/s"
        )


def measure(
    config: SyntheticConfig, *, num_batches: int, warmup_batches: int = 4, max_history: int | None = None
) -> Throughput:
    """Take `num_batches` training batches as one rank would, after `warmup_batches` that don't count."""
    loader = build_loader(build_source(config), config, split="train", rank=0, world_size=1, max_history=max_history)
    batches = iter(loader)
    for batch in itertools.islice(batches, warmup_batches):
        _size(batch)
    wall, cpu = time.perf_counter(), time.process_time()
    sizes = [_size(batch) for batch in itertools.islice(batches, num_batches)]
    return Throughput(
        samples=sum(users for users, _ in sizes),
        tokens=sum(tokens for _, tokens in sizes),
        wall_seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        num_workers=0 if config.cycle_batches else config.num_workers,
    )


def _size(batch: Batch) -> tuple[int, int]:
    return batch.num_users, batch.num_history + batch.num_candidates


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=512, help="users per batch")
    parser.add_argument("--num-workers", type=int, default=0, help="worker processes")
    parser.add_argument("--num-batches", type=int, default=100, help="batches to time")
    parser.add_argument("--cycle-batches", type=int, default=0, help="make so many batches once and cycle; 0 is off")
    parser.add_argument("--history-mean", type=float, default=100.0, help="mean events of a user, before clamping")
    parser.add_argument("--history-max", type=int, default=512, help="most events of a user")
    parser.add_argument("--candidates", type=int, nargs=2, default=(4, 12), metavar=("MIN", "MAX"))
    parser.add_argument("--num-items", type=int, default=1_000_000, help="rows of the item table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = SyntheticConfig(
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        cycle_batches=options.cycle_batches,
        num_items=options.num_items,
        history=HistoryConfig(mean=options.history_mean, max=options.history_max),
        candidates=CandidatesConfig(*options.candidates),
    )
    print(measure(config, num_batches=options.num_batches))


if __name__ == "__main__":
    main()
