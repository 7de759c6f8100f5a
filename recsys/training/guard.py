"""Finds the first step whose loss was not finite, without waiting for the device in a step."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recsys.training.distributed import Ranks


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass
class FiniteGuard:
    """Remembers, on the device, the first step with a non-finite loss on this rank; `check` reads it for all ranks."""

    ranks: Ranks
    tasks: tuple[str, ...]
    _first_bad: Tensor = field(init=False)
    _bad_logits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self.ranks.device)
        self._bad_logits = torch.zeros(len(self.tasks), dtype=torch.int64, device=self.ranks.device)

    def watch(self, step: int, loss: Tensor, logits: Tensor) -> None:
        """Note a step; three small kernels, no synchronisation."""
        is_first = ~torch.isfinite(loss) & (self._first_bad < 0)
        self._first_bad = torch.where(is_first, step, self._first_bad)
        self._bad_logits = torch.where(is_first, (~torch.isfinite(logits)).sum(dim=0), self._bad_logits)

    def check(self, model: nn.Module) -> None:
        """Raise on every rank if any rank saw a non-finite loss since the start; synchronises.

        Raises:
            NonFiniteLossError: names step, rank and tasks, and the parameters that are not finite by now.
        """
        mine = (int(self._first_bad), self._bad_logits.tolist())
        bad = [(step, rank, logits) for rank, (step, logits) in enumerate(self.ranks.gather(mine)) if step >= 0]
        if not bad:
            return
        step, rank, logits = min(bad)
        tasks = [f"{count} logits of task '{task}'" for task, count in zip(self.tasks, logits, strict=True) if count]
        where = " and ".join(tasks) if tasks else "no logit, so labels or the sum over candidates"
        names = not_finite(model.named_parameters())
        raise NonFiniteLossError(
            f"the loss was first not finite at step {step} on rank {rank}: {where} were NaN or infinite. "
            f"Parameters of this rank that are not finite by now: {', '.join(names[:8]) or 'none'}"
            f"{' ...' if len(names) > 8 else ''}. No checkpoint was written since. Lower optimizer.dense.lr or "
            "optimizer.sparse.lr, look for the operation with trainer.detect_anomaly=true, or leave such steps out "
            "with trainer.non_finite=skip."
        )

    def check_parameters(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Raise on every rank if any rank holds a parameter that is not finite; synchronises.

        Raises:
            NonFiniteLossError: names rank and parameters.
        """
        for rank, names in enumerate(self.ranks.gather(not_finite(named_parameters))):
            if names:
                raise NonFiniteLossError(
                    f"parameters of rank {rank} are not finite: {', '.join(names[:8])}"
                    f"{' ...' if len(names) > 8 else ''}. No checkpoint was written. "
                    "Lower optimizer.dense.lr or optimizer.sparse.lr."
                )


def not_finite(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity."""
    return [name for name, p in named_parameters if not bool(torch.isfinite(p.detach()).all())]
