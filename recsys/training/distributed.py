"""Ranks, devices and process groups, for one process as for many."""

import datetime
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class DeviceKind(Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run.

    Attributes:
        rank, world_size: as in `torch.distributed`.
        device: this rank's device.
        host_group: a gloo group over all ranks, for objects and host tensors.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0

    def agree(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank, in rank order."""
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.host_group)
        return box

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks of a device tensor."""
        value = value.clone()
        dist.all_reduce(value)
        return value / self.world_size


def choose_device(kind: DeviceKind) -> torch.device:
    """The device of this process; a `ValueError` when it has none of the kind asked for."""
    if kind is DeviceKind.cpu or (kind is DeviceKind.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("trainer.device=cuda, but torch sees no CUDA device: allowed here is trainer.device=cpu")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this host has {num_gpus}; start at most --nproc-per-node={num_gpus}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(device: torch.device, timeout_minutes: float) -> Iterator[Ranks]:
    """Join the process group that `torchrun` describes in the environment, or a group of one.

    Args:
        device: this rank's device; NCCL carries device tensors on CUDA, gloo on a CPU.
        timeout_minutes: a collective that waits longer ends the run with an error.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        host_group = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD
        assert host_group is not None
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, host_group)
        dist.barrier(group=host_group)  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch, alike on every rank; `diverge_seed` sets the ranks apart for dropout."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that draw from numpy draw from the global state
    torch.manual_seed(seed)


def diverge_seed(seed: int, rank: int) -> None:
    """After initialisation, give every rank its own stream of random numbers."""
    seed_everything(seed * 100_003 + rank + 1)
