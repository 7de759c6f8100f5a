"""Normalised entropy, AUC and calibration per task, global over ranks, beside the best reachable values."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc

from recsys.training.distributed import Ranks

_EPS = 1e-7


class NormalizedEntropy(Metric):
    """Mean cross-entropy over the entropy of the base rate (He et al. 2014, doi:10.1145/2648584.2648589).

    `NE = -mean(y log p + (1 - y) log(1 - p)) / H(mean y)`: below 1 is better than always predicting the base
    rate. NaN where all labels are alike. `p` and `y` are `(N,)`.
    """

    full_state_update = False
    cross_entropy: Tensor
    positives: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        for name in ("cross_entropy", "positives", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probs: Tensor, labels: Tensor) -> None:
        p, y = probs.double().clamp(_EPS, 1 - _EPS), labels.double()
        self.cross_entropy -= (y * p.log() + (1 - y) * torch.log1p(-p)).sum()
        self.positives += y.sum()
        self.count += y.numel()

    def compute(self) -> Tensor:
        rate = self.positives / self.count
        entropy = -(rate * rate.log() + (1 - rate) * torch.log1p(-rate))
        return self.cross_entropy / self.count / entropy


class Calibration(Metric):
    """Predicted over observed positives: `sum p / sum y`; 1 is calibrated, NaN without positives."""

    full_state_update = False
    predicted: Tensor
    observed: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        for name in ("predicted", "observed"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probs: Tensor, labels: Tensor) -> None:
        self.predicted += probs.double().sum()
        self.observed += labels.double().sum()

    def compute(self) -> Tensor:
        return torch.where(self.observed > 0, self.predicted / self.observed, math.nan)


@dataclass(frozen=True)
class TaskQuality:
    """Quality of one task; `best_*` is what the true probabilities reach, NaN where the source doesn't know them."""

    ne: float
    auc: float
    calibration: float
    best_ne: float = math.nan
    best_auc: float = math.nan

    @property
    def auc_closed(self) -> float:
        """Share of the distance from an AUC of 0.5 to the best reachable one."""
        return (self.auc - 0.5) / (self.best_auc - 0.5)


@dataclass
class QualityMeter:
    """Collects predictions and turns them into `TaskQuality` per task.

    `add` only keeps references, so it costs nothing in a training step; `compute` is a collective, for all ranks
    together. The AUC is exact, from all predictions added since the last `reset`.
    """

    tasks: tuple[str, ...]
    device: torch.device
    ranks: Ranks | None = None
    """Whose predictions count; `None`: this process alone."""
    _logits: list[Tensor] = field(default_factory=list)
    _labels: list[Tensor] = field(default_factory=list)
    _true_probs: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor, true_probs: Tensor | None) -> None:
        """Keep `(N, T)` logits, labels and, where known, true probabilities."""
        self._logits.append(logits)
        self._labels.append(labels)
        if true_probs is not None:
            self._true_probs.append(true_probs)

    def reset(self) -> None:
        """Forget what was added."""
        self._logits, self._labels, self._true_probs = [], [], []

    def state_dict(self) -> dict[str, list[Tensor]]:
        """What was added, on the host."""
        return {
            name: [tensor.cpu() for tensor in getattr(self, name)] for name in ("_logits", "_labels", "_true_probs")
        }

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take over what was added."""
        for name, tensors in state.items():
            setattr(self, name, [tensor.to(self.device) for tensor in tensors])

    def compute(self) -> dict[str, TaskQuality]:
        """Quality per task over all ranks, computed on the host; synchronises with the device."""
        probs, labels, true_probs = self._over_ranks()
        quality = {}
        for i, task in enumerate(self.tasks):
            ne, auc, calibration = measure(probs[:, i], labels[:, i])
            best_ne, best_auc = math.nan, math.nan
            if len(true_probs):
                best_ne, best_auc, _ = measure(true_probs[:, i], labels[:, i])
            quality[task] = TaskQuality(ne, auc, calibration, best_ne, best_auc)
        return quality

    def _over_ranks(self) -> tuple[Tensor, Tensor, Tensor]:
        """What all ranks added, on the host: `(N, T)` probabilities and labels, and true probabilities or none."""
        none = torch.zeros(0, len(self.tasks), device=self.device)
        mine = torch.cat([none, *self._logits]).sigmoid(), torch.cat([none, *self._labels])
        added = [tensor.cpu() for tensor in (*mine, torch.cat([none, *self._true_probs]))]
        by_rank = [added] if self.ranks is None else self.ranks.gather(added)
        probs, labels, true_probs = (torch.cat(tensors) for tensors in zip(*by_rank, strict=True))
        return probs, labels, true_probs


def measure(probs: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """NE, AUC and calibration of `(N,)` probabilities and labels, on this process alone; NaN where not defined."""
    if not torch.isfinite(probs).all():
        return math.nan, math.nan, math.nan
    ne, calibration = NormalizedEntropy(), Calibration()
    ne.update(probs, labels)
    calibration.update(probs, labels)
    auc = math.nan
    if 0 < labels.sum() < len(labels):  # with labels of one class torchmetrics warns and says 0
        auc = float(binary_auroc(probs, labels.long(), validate_args=False))
    return float(ne.compute()), auc, float(calibration.compute())
