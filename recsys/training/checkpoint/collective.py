"""The few collectives a checkpoint needs: every rank raises the same error, and nobody waits for ever."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """Writing or reading failed: a full disk, a file that can't be opened, an unsupported kernel."""


class CheckpointRefused(ValueError):
    """A checkpoint is torn (not whole) or foreign (of another model or format); the message says why."""


class Team:
    """The ranks that save and load together; without a process group, a team of one.

    Args:
        group: a group that carries Python objects; `None` is the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.is_distributed else 0
        self.world_size = dist.get_world_size(group) if self.is_distributed else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def locally(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank; this rank's result or, if it fails anywhere, the first error everywhere.

        Raises:
            ValueError: (or `CheckpointRefused`) when the failing rank raised that, in its own words.
            CheckpointError: for any other failure, naming the rank and `what` it was doing.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except CheckpointRefused as error:
            failure = error
        except ValueError as error:  # a subclass may not pickle
            failure = ValueError(str(error))
        except (Exception, CheckpointException) as error:  # DCP's own error is a BaseException
            failure = CheckpointError(f"rank {self.rank} could not {what}: {type(error).__name__}: {error}")
        for failure_of_rank in self.gather(failure):
            if failure_of_rank is not None:
                raise failure_of_rank
        return result

    def on_first(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only; its result, or its error, on every rank."""
        result = self.locally(what, work if self.rank == 0 else lambda: None)
        return self.gather(result)[0]  # type: ignore[return-value]
