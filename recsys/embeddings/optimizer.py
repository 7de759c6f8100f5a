"""Optimizers of embedding tables, fused into the backward of the lookup."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torchrec.optim
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from recsys.checks import at_least, decay_rates


class SparseOptimizerName(Enum):
    """Update rules that FBGEMM fuses and that replicated tables have here too."""

    rowwise_adagrad = "rowwise_adagrad"
    adagrad = "adagrad"
    adam = "adam"
    sgd = "sgd"


@dataclass
class SparseOptimizerConfig:
    """The optimizer of all embedding tables. Only rows that a batch looked up change, whichever the rule.

    With `g` the gradient of a row, averaged over ranks:

        sgd               w -= lr g
        adagrad           s += g²;         w -= lr g / (√s + eps)
        rowwise_adagrad   s += mean(g²);   w -= lr g / (√s + eps)      one number s per row
        adam              m, v as usual;   w -= lr (m̂ / (√v̂ + eps) + weight_decay w)
    """

    name: SparseOptimizerName = SparseOptimizerName.rowwise_adagrad
    """The rule. State per row of dimension D, in float32: sgd 0, rowwise_adagrad 1, adagrad D, adam 2 D."""

    lr: float = 0.02
    """Learning rate."""

    eps: float = 1e-8
    """Added to the root of the second moment; sgd has none."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's moments."""

    weight_decay: float = 0.0
    """Decoupled decay of the rows looked up; Adam only."""

    def __post_init__(self) -> None:
        at_least("optimizer.sparse.lr", self.lr, 0.0)
        at_least("optimizer.sparse.eps", self.eps, 0.0)
        at_least("optimizer.sparse.weight_decay", self.weight_decay, 0.0)
        decay_rates("optimizer.sparse.betas", self.betas)
        if self.weight_decay and self.name is not SparseOptimizerName.adam:
            raise ValueError(
                f"optimizer.sparse.weight_decay is {self.weight_decay} with {self.name.value}: "
                "only adam decays weights; allowed here is 0"
            )

    def state_floats_per_row(self, dim: int) -> int:
        """Numbers of optimizer state that a row of `dim` weights carries."""
        return {
            SparseOptimizerName.sgd: 0,
            SparseOptimizerName.rowwise_adagrad: 1,
            SparseOptimizerName.adagrad: dim,
            SparseOptimizerName.adam: 2 * dim,
        }[self.name]


def apply_sparse_optimizer(model: nn.Module, config: SparseOptimizerConfig) -> None:
    """Mark every table of `model`, before it is sharded, to be updated in the backward of its lookup."""
    optimizer: type[torch.optim.Optimizer] = {
        SparseOptimizerName.rowwise_adagrad: torchrec.optim.RowWiseAdagrad,
        SparseOptimizerName.adagrad: torchrec.optim.Adagrad,
        SparseOptimizerName.adam: torchrec.optim.Adam,
        SparseOptimizerName.sgd: torchrec.optim.SGD,
    }[config.name]
    # The names are those of FBGEMM's table-batched embedding, which these end up in.
    kwargs: dict[str, Any] = {"lr": config.lr}
    if config.name is not SparseOptimizerName.sgd:
        kwargs["eps"] = config.eps
    if config.name is SparseOptimizerName.adam:
        kwargs.update(beta1=config.betas[0], beta2=config.betas[1], weight_decay=config.weight_decay)
    for parameter in _table_parameters(model):
        _apply_optimizer_in_backward(optimizer, [parameter], dict(kwargs))


def _table_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, EmbeddingCollection | EmbeddingBagCollection):
            yield from module.parameters()
