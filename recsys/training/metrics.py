"""Normalised entropy, AUC and calibration per task, global over ranks, beside the best reachable values."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC

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
        super().__init__()
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
        super().__init__()
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

    `add` only keeps references, so it costs nothing in a training step; `compute` is a collective, for all ranks together.
    The AUC is exact, from all predictions added since the last `reset`.
    """

    tasks: tuple[str, ...]
    device: torch.device
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
        """Quality per task over all ranks; synchronises with the device."""
        empty = torch.zeros(0, len(self.tasks), device=self.device)
        probs = torch.cat([empty, *self._logits]).sigmoid()
        labels = torch.cat([empty, *self._labels])
        knows_truth = bool(self._true_probs)
        true_probs = torch.cat([empty, *self._true_probs])
        quality = {}
        for i, task in enumerate(self.tasks):
            ne, auc, calibration = self._measure(probs[:, i], labels[:, i])
            best_ne, best_auc = math.nan, math.nan
            if knows_truth:
                best_ne, best_auc, _ = self._measure(true_probs[:, i], labels[:, i])
            quality[task] = TaskQuality(ne, auc, calibration, best_ne, best_auc)
        return quality

    def _measure(self, probs: Tensor, labels: Tensor) -> tuple[float, float, float]:
        values = []
        for metric in (NormalizedEntropy(), BinaryAUROC(validate_args=False), Calibration()):
            metric = metric.to(self.device)
            metric.update(probs, labels.long())
            values.append(float(metric.compute()))
        return values[0], values[1], values[2]
