"""The sparse update rules for tables that every rank holds whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer

from recsys.embeddings import SparseOptimizerConfig, SparseOptimizerName


class ReplicatedTableOptimizer(KeyedOptimizer):
    """Updates replicated tables from all-reduced dense gradients by the rule that sharded tables follow.

    A dense optimizer would move every row at every step, once Adam's moments aren't zero. The fused ones
    move the rows that were looked up; so does this one, taking a row with any gradient other than zero for
    a row that was looked up. State has the names and shapes of the fused optimizers' (`<table>.momentum1`,
    `<table>.exp_avg_sq`), so that a checkpoint can be read under another plan.

    Args:
        tables: by table name, its name in the model's state dict and its weight `(rows, dim)`.
        config: the rule.
    """

    def __init__(self, tables: Mapping[str, tuple[str, nn.Parameter]], config: SparseOptimizerConfig) -> None:
        self.config = config
        self.num_steps = 0
        params = dict(tables.values())
        state = {weight: _initial_state(name, weight, config) for name, (_, weight) in tables.items()}
        super().__init__(params, state, [{"params": list(params.values()), "lr": config.lr}])
        self._state_names = {weight: name for name, (_, weight) in tables.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for weight in self.params.values():
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Apply the gradients; tables without one are left alone."""
        if all(weight.grad is None for weight in self.params.values()):
            return  # the backward was left out, and so were the fused optimizers, which count steps there
        self.num_steps += 1
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight.detach(), weight.grad, self._state_of(weight), group["lr"])

    def set_optimizer_step(self, step: int) -> None:
        """Go on as after `step` steps, like the fused optimizers' method of this name; Adam counts them."""
        self.num_steps = step

    def _state_of(self, weight: Tensor) -> list[Tensor]:
        return list(self.state[weight].values())

    def _update(self, w: Tensor, g: Tensor, state: list[Tensor], lr: float) -> None:
        """The equations of `SparseOptimizerConfig` over a whole table; rows without a gradient stay."""
        c = self.config
        if c.name is SparseOptimizerName.sgd:
            w.sub_(lr * g)
        elif c.name is SparseOptimizerName.adagrad:
            s = state[0].addcmul_(g, g)
            w.sub_(lr * g / (s.sqrt() + c.eps))
        elif c.name is SparseOptimizerName.rowwise_adagrad:
            s = state[0].add_(g.square().mean(dim=1))
            w.sub_(lr * g / (s.sqrt() + c.eps).unsqueeze(1))
        else:
            m, v = state
            looked_up = (g != 0).any(dim=1, keepdim=True)
            beta1, beta2 = c.betas
            m.copy_(torch.where(looked_up, beta1 * m + (1 - beta1) * g, m))
            v.copy_(torch.where(looked_up, beta2 * v + (1 - beta2) * g.square(), v))
            m_hat = m / (1 - beta1**self.num_steps)
            v_hat = v / (1 - beta2**self.num_steps)
            update = lr * (m_hat / (v_hat.sqrt() + c.eps) + c.weight_decay * w)
            w.sub_(torch.where(looked_up, update, 0.0))


def _initial_state(table: str, weight: Tensor, config: SparseOptimizerConfig) -> dict[str, Tensor]:
    like = weight.detach()
    if config.name is SparseOptimizerName.sgd:
        return {}
    if config.name is SparseOptimizerName.rowwise_adagrad:
        return {f"{table}.momentum1": like.new_zeros(like.shape[0])}
    state = {f"{table}.momentum1": torch.zeros_like(like)}
    if config.name is SparseOptimizerName.adam:
        state[f"{table}.exp_avg_sq"] = torch.zeros_like(like)
    return state
