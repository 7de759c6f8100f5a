"""Where a run stands: what a checkpoint saves, and what a log line reports."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from recsys.models.ranking import Predictions
from recsys.training.metrics import QualityMeter
from recsys.training.throughput import Counts


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    users_consumed: int = 0
    """Of all ranks; where the data goes on."""
    truncated_users: int = 0
    """Of this rank, like the following ones; in a checkpoint, of all ranks."""
    truncated_events: int = 0
    repaired_ids: int = 0
    skipped_steps: int = 0
    """Left out because a loss was not finite; alike on every rank."""

    @classmethod
    def sum(cls, ranks: list["Progress"]) -> "Progress":
        """What all ranks counted, at the step that they share."""
        return cls(
            ranks[0].step,
            ranks[0].users_consumed,
            sum(p.truncated_users for p in ranks),
            sum(p.truncated_events for p in ranks),
            sum(p.repaired_ids for p in ranks),
            ranks[0].skipped_steps,
        )


@dataclass
class Window:
    """The steps since the last log line. Only keeps references: nothing is computed before the line is due."""

    meter: QualityMeter
    losses: list[Tensor] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    """The run's counts when the window began."""

    def add(self, predictions: Predictions) -> None:
        """Keep what a step predicted."""
        self.losses.append(predictions.loss)
        self.meter.add(predictions.logits, predictions.batch.labels, predictions.batch.true_probs)

    def mean_loss(self) -> Tensor:
        """Mean loss of this rank's steps, on the device; NaN if all were left out."""
        if not self.losses:
            return torch.full((), torch.nan, device=self.meter.device)
        return torch.stack(self.losses).mean()

    def restart(self, counts: Counts) -> None:
        """Begin the next window."""
        self.meter.reset()
        self.losses = []
        self.counts = replace(counts)

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last line, for a checkpoint in the middle of a window."""
        return {"losses": [loss.cpu() for loss in self.losses], "meter": self.meter.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on in the middle of a window."""
        self.losses = [loss.to(device) for loss in state["losses"]]
        self.meter.load_state_dict(state["meter"])
