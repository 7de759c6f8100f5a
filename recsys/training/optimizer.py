"""Optimizers: sparse ones inside the lookup's backward, AdamW with warm-up, decay and clipping for the dense part."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from recsys.checks import at_least, between, decay_rates
from recsys.embeddings import SparseOptimizerConfig


class Decay(Enum):
    """Shape of the learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class DenseOptimizerConfig:
    """AdamW for everything that is not a table."""

    lr: float = 1e-3
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the moments."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.01
    """Decoupled decay of matrices; vectors (norms, biases) are not decayed."""

    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""

    decay: Decay = Decay.cosine
    """Shape after the warm-up, until `trainer.max_steps`."""

    final_lr_ratio: float = 0.1
    """Learning rate at the last step over the peak."""

    clip_norm: float | None = 1.0
    """Largest norm of the dense gradient over all dense parameters; `null` clips nothing."""

    def __post_init__(self) -> None:
        at_least("optimizer.dense.lr", self.lr, 0.0)
        decay_rates("optimizer.dense.betas", self.betas)
        at_least("optimizer.dense.eps", self.eps, 0.0)
        at_least("optimizer.dense.weight_decay", self.weight_decay, 0.0)
        at_least("optimizer.dense.warmup_steps", self.warmup_steps, 0)
        between("optimizer.dense.final_lr_ratio", self.final_lr_ratio, 0.0, 1.0)
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.dense.clip_norm is {self.clip_norm}: allowed are null and values > 0")


@dataclass
class OptimizerConfig:
    """Both optimizers."""

    sparse: SparseOptimizerConfig = field(default_factory=SparseOptimizerConfig)
    """Of the embedding tables; runs inside the lookup's backward, at a constant learning rate."""

    dense: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    """Of everything else."""


def learning_rate_factor(step: int, config: DenseOptimizerConfig, max_steps: int) -> float:
    """Learning rate at `step` (from 0) over the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay is Decay.constant:
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    remaining = 1 - progress if config.decay is Decay.linear else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining


class DenseOptimizer(torch.optim.AdamW):
    """AdamW that clips the gradient before it steps; TorchRec's pipelines call `zero_grad` and `step`.

    Args:
        named_parameters: the dense parameters.
        config: see `DenseOptimizerConfig`.
        max_steps: steps of the run, for the decay.
        skip_non_finite: leave a step with a gradient that is not finite out, at one host synchronisation a step. DDP
            gives every rank the same gradient, so all ranks leave it out together.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: DenseOptimizerConfig,
        *,
        max_steps: int = 1,
        skip_non_finite: bool = False,
    ) -> None:
        parameters = [p for _, p in named_parameters]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        # One kernel for all parameters; elsewhere torch decides, so that a run on a CPU goes on to the last bit.
        fused = True if all(p.is_cuda for p in parameters) else None
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        self.config, self.max_steps, self.skip_non_finite = config, max_steps, skip_non_finite

    def set_learning_rate(self, step: int) -> float:
        """Set the rate of `step` (from 0). It follows from the config alone, so a resumed run obeys its own config."""
        lr = self.config.lr * learning_rate_factor(step, self.config, self.max_steps)
        for group in self.param_groups:
            group["lr"] = lr
        return lr

    def step(self, closure: Any = None) -> Any:
        """Clip over all dense parameters, then AdamW."""
        if self.config.clip_norm is not None or self.skip_non_finite:
            parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)
            if self.skip_non_finite and not torch.isfinite(norm):
                return None
        return super().step(closure)


class Optimizers:
    """What steps outside the lookups, as the one optimizer that a TorchRec pipeline drives.

    Args:
        dense: clipped AdamW of the dense part.
        replicated: optimizer of tables that are replicated instead of sharded, or `None`.
    """

    def __init__(self, dense: DenseOptimizer, replicated: torch.optim.Optimizer | None) -> None:
        self.dense = dense
        self.replicated = replicated

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.all():
            optimizer.zero_grad()

    def step(self) -> None:
        """Apply the gradients."""
        for optimizer in self.all():
            optimizer.step()

    def all(self) -> list[torch.optim.Optimizer]:
        """The optimizers that there are."""
        return [self.dense] if self.replicated is None else [self.dense, self.replicated]
