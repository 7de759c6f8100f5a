"""`shard`: from a model with tables on the meta device to one that trains on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan

from recsys.embeddings import SparseOptimizerConfig, apply_sparse_optimizer, tables_of
from recsys.sharding.check import check_sharding
from recsys.sharding.config import ShardingConfig, ShardingKind
from recsys.sharding.optimizer import ReplicatedTableOptimizer
from recsys.sharding.plan import make_plan
from recsys.sharding.replicated import PooledSharder, SequenceSharder
from recsys.sharding.report import format_plan
from recsys.sharding.weights import init_tables


@dataclass
class ShardedModel:
    """A model whose tables are laid out over ranks.

    Attributes:
        model: forward and backward as before; sharded tables are updated within the backward, the dense
            part is wrapped in DDP.
        plan: where each table is.
        replicated_optimizer: to be stepped with the dense optimizer, for tables that every rank holds
            whole; `None` where there are none.
        sparse_optimizer: what updates the tables.
    """

    model: DistributedModelParallel
    plan: ShardingPlan
    replicated_optimizer: ReplicatedTableOptimizer | None
    sparse_optimizer: SparseOptimizerConfig

    def dense_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything that is not a table, for the dense optimizer."""
        suffixes = _table_suffixes(self.model)
        for name, parameter in self.model.named_parameters():
            if not name.endswith(suffixes):
                yield name, parameter

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all tables, sharded and replicated."""
        optimizers = [self.model.fused_optimizer, self.replicated_optimizer]
        for optimizer in [o for o in optimizers if o is not None]:
            for group in optimizer.param_groups:
                group["lr"] = lr
        self.model.fused_optimizer.step()  # updates no weight: it hands the rate to FBGEMM's kernels

    def format_plan(self) -> str:
        """The plan as a table to print."""
        return format_plan(
            self.plan, self.model, dist.get_world_size(self.model._env.process_group), self.sparse_optimizer
        )


def shard(
    model: nn.Module,
    config: ShardingConfig,
    *,
    device: torch.device,
    batch_size: int,
    sparse_optimizer: SparseOptimizerConfig | None = None,
    mean_lengths: Mapping[str, float] | None = None,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> ShardedModel:
    """Check, plan, place and initialise the tables of `model`, and wrap the rest in DDP.

    A collective call: every rank of the group makes it with the same arguments. A group of one rank is fine.

    Args:
        model: tables on the meta device, in `SequenceEmbeddings` and `PooledEmbeddings` anywhere inside;
            the rest on any device, initialised alike on every rank (DDP sends rank 0's anyway). It is
            changed in place.
        config: the plan asked for.
        device: this rank's device.
        batch_size: users per rank and step, for the planner's estimates.
        sparse_optimizer: of the tables.
        mean_lengths: ids per user by feature, for the planner's estimates.
        seed: of the tables' weights, which depend on nothing else.
        group: ranks to lay tables out over; all ranks by default.

    Raises:
        ValueError: on every rank, if the config asks for what can't be had or nothing fits.
    """
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise ValueError("shard needs a process group: call torch.distributed.init_process_group first")
    sparse_optimizer = sparse_optimizer if sparse_optimizer is not None else SparseOptimizerConfig()
    check_sharding(model, config, device.type, dist.get_world_size(group), sparse_optimizer)
    apply_sparse_optimizer(model, sparse_optimizer)
    sharders: list[ModuleSharder[Any]] = [SequenceSharder(), PooledSharder()]
    plan = make_plan(
        model,
        config,
        sharders,
        device=device,
        group=group,
        batch_size=batch_size,
        mean_lengths=mean_lengths or {},
    )
    dmp = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan,
        sharders=sharders,
    )
    init_tables(dmp, seed)
    return ShardedModel(dmp, plan, _replicated_optimizer(dmp, plan, sparse_optimizer), sparse_optimizer)


def _replicated_optimizer(
    dmp: DistributedModelParallel, plan: ShardingPlan, config: SparseOptimizerConfig
) -> ReplicatedTableOptimizer | None:
    parameters = dict(dmp.named_parameters())
    tables: dict[str, tuple[str, nn.Parameter]] = {}
    for module_plan in plan.plan.values():
        for table, sharding in module_plan.items():  # type: ignore[attr-defined]
            if sharding.sharding_type == ShardingKind.data_parallel.value:
                (key,) = [name for name in parameters if name.endswith(_suffixes_of(table))]
                tables[table] = (key, parameters[key])
    return ReplicatedTableOptimizer(tables, config) if tables else None


def _suffixes_of(table: str) -> tuple[str, str]:
    return f".embeddings.{table}.weight", f".embedding_bags.{table}.weight"


def _table_suffixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(suffix for table in tables_of(model) for suffix in _suffixes_of(table))
