"""Which users a rank gets at a step, made ready for the device: ids checked, long histories cut, pinned.

Global step i of `W` ranks with batches of `B` users covers the users `[i·W·B, (i + 1)·W·B)` after `position`,
and rank r the r-th `B` of them. A run that stops after some users goes on from there with any other `W` or `B`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import Batch
from data.config import DataConfig
from data.sources import SPLITS, Source


@dataclass(frozen=True)
class Shard:
    """The users of one rank of a split, step by step."""

    split: str
    """`train` or `eval`."""
    num_users: int
    """Users of the split, over all ranks."""
    batch_size: int
    """Users per rank and step."""
    rank: int
    world_size: int
    position: int = 0
    """Users of all ranks that came before step 0; train only."""

    @property
    def users_per_step(self) -> int:
        """Users of all ranks in one step: what `position` grows by."""
        return self.batch_size * self.world_size

    @property
    def num_steps(self) -> int | None:
        """Steps of the eval split, the same on every rank; None for train, which never ends."""
        return None if self.split == "train" else -(-self.num_users // self.users_per_step)

    def users(self, step: int) -> npt.NDArray[np.int64]:
        """User indices of a step: `batch_size`, wrapping around in train; fewer or none at the end of eval."""
        first = self.position + step * self.users_per_step + self.rank * self.batch_size
        if self.split == "train":
            return np.arange(first, first + self.batch_size, dtype=np.int64) % self.num_users
        return np.arange(first, min(first + self.batch_size, self.num_users), dtype=np.int64)


class _Batches(Dataset[Batch]):
    """Whole batches by step. Runs in the workers: everything that looks at the data on the host is here."""

    def __init__(self, source: Source, config: DataConfig, shard: Shard, max_history: int | None) -> None:
        self.source, self.config, self.shard, self.max_history = source, config, shard, max_history

    def __getitem__(self, step: int) -> Batch:
        batch = self.source.batch(self.shard.split, self.shard.users(step))
        if self.max_history is not None:
            batch = batch.truncate_history(self.max_history)
        return batch.check_ids(self.source.schema, self.config.out_of_range_ids)


class _Steps(Sampler[int]):
    """0, 1, 2, … to the end of eval, or for ever."""

    def __init__(self, num_steps: int | None) -> None:
        self.num_steps = num_steps

    def __iter__(self) -> Iterator[int]:
        return itertools.count() if self.num_steps is None else iter(range(self.num_steps))

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("training goes on for ever: it has no number of steps")
        return self.num_steps


class CycledBatches:
    """The first batches of a rank, made once and served again and again: no input side to wait for.

    A resumed run goes on in the middle of the cycle, with the batches that the run before had.
    """

    def __init__(self, batches: _Batches, count: int, first_step: int, *, pin: bool) -> None:
        made = (batches[step] for step in range(count))
        self.batches = [batch.pin_memory() if pin else batch for batch in made]
        self.first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(itertools.cycle(self.batches), self.first_step % len(self.batches), None)


def build_loader(
    source: Source,
    config: DataConfig,
    *,
    split: str,
    rank: int,
    world_size: int,
    max_history: int | None = None,
    position: int = 0,
    device_type: str = "cpu",
) -> DataLoader[Batch] | CycledBatches:
    """The batches of one rank, in order.

    Train never ends: it wraps around the users of the split. Eval gives every user exactly once over all ranks,
    and every rank the same number of batches; the last ones may be short, or empty on some ranks.

    Args:
        source: makes the batches; travels to the workers.
        config: loader settings (batch size, workers, prefetching, id policy, cycling).
        split: `train` or `eval`.
        rank: this rank, 0 to `world_size` - 1.
        world_size: ranks that share the split.
        max_history: most events the model takes; older ones are cut and counted in the batch. None keeps all.
        position: users of the train split, over all ranks, that an earlier run has had. After s steps of this
            loader it is `position + s · world_size · batch_size`.
        device_type: `cuda` turns on page-locked memory (with `config.pin_memory`).

    Raises:
        ValueError: an argument is out of range; while iterating, an id is outside its table and the policy is
            `error`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; allowed: 0 to {world_size - 1}")
    if position < 0 or (position and split != "train"):
        raise ValueError(f"position is {position} for {split}; allowed: 0 or more users for train, 0 for eval")
    if max_history is not None and max_history < 0:
        raise ValueError(f"max_history is {max_history}; allowed: 0 or more events, or None")
    shard = Shard(split, source.num_users(split), config.batch_size, rank, world_size, position)
    batches = _Batches(source, config, shard, max_history)
    pin = config.pin_memory and device_type == "cuda"
    if config.cycle_batches and split == "train":
        from_start = _Batches(source, config, replace(shard, position=0), max_history)
        return CycledBatches(from_start, config.cycle_batches, position // shard.users_per_step, pin=pin)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_Steps(shard.num_steps),
        pin_memory=pin,
        # The loader draws a seed for its workers: not from the random numbers of the model.
        generator=torch.Generator().manual_seed(config.seed),
        **_worker_options(config),
    )


def _worker_options(config: DataConfig) -> dict[str, Any]:
    if not config.num_workers:
        return {}
    return {
        "num_workers": config.num_workers,
        "prefetch_factor": config.prefetch_batches,
        # A fork of a process that has CUDA, NCCL or OpenMP threads may hang on a lock one of them held. The fork
        # server is clean, and imports torch once for all workers.
        "multiprocessing_context": _fork_server(),
        "worker_init_fn": _one_thread,
        "persistent_workers": True,
    }


def _fork_server() -> Any:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.loader"])
    return context


def _one_thread(worker: int) -> None:
    """Workers run side by side; threads inside them would only fight for the cores."""
    torch.set_num_threads(1)
