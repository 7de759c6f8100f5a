"""What a checkpoint holds besides tensors, and the random number generators of a rank."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


class Stateful(Protocol):
    """Anything with a state of plain values that is the same on every rank: an LR scheduler, a counter."""

    def state_dict(self) -> dict[str, Any]:
        """The state: tensors, numbers, strings, and lists, tuples and dicts of them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state over."""


@dataclass
class TrainState:
    """A training run at a step boundary. `restore` writes into the live objects."""

    model: nn.Module
    """A `DistributedModelParallel`, or any module. Optimizers fused into lookups are found through it."""

    optimizers: Sequence[torch.optim.Optimizer] = ()
    """Optimizers that step outside the lookups: of the dense part and of replicated tables."""

    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    """LR schedulers and the like, by name."""

    users_consumed: int = 0
    """Users of all ranks that the run has trained on; where the data goes on."""

    extras: dict[str, Any] = field(default_factory=dict)
    """Anything else that is the same on every rank (rank 0's is saved): plain values and tensors."""

    rank_extras: dict[str, Any] = field(default_factory=dict)
    """Anything else of this rank alone. Given back only under the same world size."""


@dataclass
class RestoreInfo:
    """What `restore` found. Weights, optimizers, `stateful` and random generators are already in place."""

    path: Path
    step: int
    users_consumed: int
    extras: dict[str, Any]
    rank_extras: dict[str, Any] | None
    """This rank's own, or `None` when the checkpoint is of another world size."""
    world_size: int
    """Ranks of the run that saved."""
    messages: list[str]
    """What a user should know: checkpoints passed over, conversions, generators seeded anew."""


def rng_state() -> dict[str, Any]:
    """The generators of this process: torch (CPU and current CUDA device), numpy's global one, python's."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
        "numpy": _to_tensors(np.random.get_state(legacy=False)),  # noqa: NPY002 - libraries draw from this one
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any] | None, step: int, rank: int) -> str | None:
    """Set this process's generators to `state`.

    A generator that the checkpoint doesn't hold is seeded from (step, rank), alike in every attempt; the
    returned message says so.
    """
    digest = hashlib.sha256(f"step {step} rank {rank}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    if state is None:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        return f"the checkpoint has no random state of rank {rank}: its generators start from seed {seed}"
    torch.set_rng_state(state["torch"])
    np.random.set_state(_to_arrays(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])
    if not torch.cuda.is_available():
        return None
    if state["cuda"] is None:
        torch.cuda.manual_seed(seed)
        return f"the checkpoint has no CUDA generator of rank {rank}: it starts from seed {seed}"
    torch.cuda.set_rng_state(state["cuda"])
    return None


def _to_tensors(value: Any) -> Any:
    """Numpy arrays as int64 tensors, so that a file needs no pickled numpy classes."""
    if isinstance(value, dict):
        return {key: _to_tensors(item) for key, item in value.items()}
    return torch.from_numpy(value.astype(np.int64)) if isinstance(value, np.ndarray) else value


def _to_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_arrays(item) for key, item in value.items()}
    return value.numpy().astype(np.uint32) if isinstance(value, torch.Tensor) else value
