"""TorchRec's train pipelines, with a say in what happens when a loss is not finite."""

from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from recsys.training.optimizer import Optimizers


class PipelineKind(Enum):
    """How a step is overlapped with the next batch."""

    sparse_dist = "sparse_dist"
    base = "base"


class NonFinite(Enum):
    """What to do when a loss is NaN or infinite."""

    stop = "stop"
    skip = "skip"


class _MaySkip:
    """With `skips`, leaves the backward out, on every rank, in a step in which any rank's loss is not finite.

    Sparse optimizers run inside the backward, so the step has to be given up before it, which takes one host
    synchronisation a step; without `skips` there is none. The dense optimizer finds no gradients and does nothing.
    """

    skips = False
    last_skipped = False

    def _backward(self, losses: Tensor) -> None:
        self.last_skipped = self.skips and not _finite_on_all_ranks(losses)
        if not self.last_skipped:
            super()._backward(losses)  # type: ignore[misc]


def _finite_on_all_ranks(losses: Tensor) -> bool:
    finite = torch.isfinite(losses.detach()).all().float()
    if dist.get_world_size() > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return finite.item() == 1.0


class _SparseDist(_MaySkip, TrainPipelineSparseDist):
    pass


class _Base(_MaySkip, TrainPipelineBase):
    def detach(self) -> nn.Module:
        """The model; nothing was rewritten."""
        return self._model


def build_pipeline(
    kind: PipelineKind, non_finite: NonFinite, model: nn.Module, optimizers: Optimizers, device: torch.device
) -> Any:
    """A TorchRec pipeline over `model(batch) -> (loss, predictions)`.

    `sparse_dist` copies batch i+2 to the device and exchanges the ids of batch i+1 while batch i trains;
    `base` only copies ahead. `progress(iterator)` runs one step, `detach()` gives the plain model for an evaluation in
    between, `last_skipped` tells whether the last step was left out.
    """
    pipeline: Any
    if kind is PipelineKind.sparse_dist:
        pipeline = _SparseDist(model, optimizers, device, execute_all_batches=True)
    else:
        pipeline = _Base(model, optimizers, device)
    pipeline.skips = non_finite is NonFinite.skip
    return pipeline
