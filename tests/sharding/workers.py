"""What the processes of a sharding test run, on a CPU with gloo or on GPUs with NCCL."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recsys.embeddings import SparseOptimizerConfig, SparseOptimizerName, tables_of
from recsys.sharding import ShardedModel, ShardingConfig, shard
from recsys.sharding.report import placements
from recsys.sharding.weights import local_shards
from tests.sharding.model import TinyModel, Trained, batch_of, initial_tables, step_users

DENSE_LR = 0.05
LR = {"sgd": 0.5, "adagrad": 0.1, "rowwise_adagrad": 0.1, "adam": 0.05}


@dataclass
class Case:
    """One training under one plan."""

    name: str
    config: ShardingConfig
    optimizer: str = "rowwise_adagrad"
    pipeline: bool = False
    """Through TorchRec's sparse-dist pipeline instead of a plain loop."""


@dataclass
class Result:
    """What one rank saw of a case."""

    trained: Trained
    replicas: dict[str, Tensor]
    blocks: dict[str, list[int]]
    sharding: dict[str, tuple[str, str]]
    printed: str
    pipelined: list[str] = field(default_factory=list)
    collections: list[str] = field(default_factory=list)


def optimizer_config(name: str) -> SparseOptimizerConfig:
    decay = 0.01 if name == "adam" else 0.0
    return SparseOptimizerConfig(
        name=SparseOptimizerName(name), lr=LR[name], eps=1e-3, betas=(0.8, 0.9), weight_decay=decay
    )


def device_of(rank: int, device_type: str) -> torch.device:
    return torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")


def train_cases(rank: int, world_size: int, cases: list[Case], device_type: str = "cpu") -> dict[str, Result]:
    """Train every case for the steps of `step_users`, one process group for all."""
    return {case.name: train_case(rank, world_size, case, device_of(rank, device_type)) for case in cases}


def train_case(rank: int, world_size: int, case: Case, device: torch.device) -> Result:
    model = TinyModel(loss_scale=float(world_size))  # gradients are averaged over ranks, the reference sums
    collections = [
        f"{name}.collections.{key}"
        for name in ("sequence_embeddings", "context_embeddings")
        for key in getattr(model, name).collections
    ]
    sharded = shard(
        model,
        case.config,
        device=device,
        batch_size=4,
        sparse_optimizer=optimizer_config(case.optimizer),
        seed=3,
    )
    load_tables(sharded.model, initial_tables())
    dense = torch.optim.SGD([p for _, p in sharded.dense_parameters()], lr=DENSE_LR)
    steps = [ranks if world_size == 2 else [ranks[0] + ranks[1]] for ranks in step_users()]
    batches = [batch_of(ranks[rank]) for ranks in steps]
    pipelined: list[str] = []
    forward = []
    if case.pipeline:
        pipeline = TrainPipelineSparseDist(sharded.model, Both(dense, sharded), device, execute_all_batches=True)
        iterator = iter(batches)
        for _ in batches:
            forward.append(_detached(pipeline.progress(iterator)))
        pipelined = [module.forward.name for module in pipeline._pipelined_modules]
    else:
        for batch in batches:
            both = Both(dense, sharded)
            both.zero_grad()
            loss, features = sharded.model(batch.to(device))
            loss.backward()
            both.step()
            forward.append(_detached(features))
    tables, replicas = gather_tables(sharded.model)
    trained = Trained(
        tables,
        {name.split("head.")[1]: p.detach().cpu() for name, p in sharded.dense_parameters()},
        forward,
    )
    return Result(
        trained,
        replicas,
        column_blocks(sharded, world_size),
        {t: (s.sharding_type, s.compute_kernel) for m in sharded.plan.plan.values() for t, s in m.items()},
        sharded.format_plan(),
        pipelined,
        collections,
    )


class Both:
    """Dense optimizer and, where there is one, that of the replicated tables."""

    def __init__(self, dense: torch.optim.Optimizer, sharded: ShardedModel) -> None:
        self.optimizers: list[torch.optim.Optimizer] = [
            dense,
            *([sharded.replicated_optimizer] if sharded.replicated_optimizer else []),
        ]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def _detached(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in features.items()}


@torch.no_grad()
def load_tables(model: nn.Module, tables: dict[str, Tensor]) -> None:
    """Write the same global weights into any plan."""
    for part in local_shards(model):
        rows, columns = part.weight.shape
        whole = tables[part.table.name]
        part.weight.copy_(whole[part.row : part.row + rows, part.column : part.column + columns])


def gather_tables(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole tables, put together from all ranks; and this rank's own copies of replicated ones."""
    whole, copies, replicas = {}, {}, {}
    for name, table in tables_of(model).items():
        whole[name] = torch.zeros(table.rows, table.dim)
        copies[name] = torch.zeros(table.rows, table.dim)
    for part in local_shards(model):
        rows, columns = part.weight.shape
        where = (slice(part.row, part.row + rows), slice(part.column, part.column + columns))
        whole[part.table.name][where] = part.weight.cpu()
        copies[part.table.name][where] += 1
        if part.replicated:
            replicas[part.table.name] = part.weight.cpu().clone()
    for name in whole:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        both = torch.stack([whole[name], copies[name]]).to(device)
        dist.all_reduce(both)
        total, count = both.cpu()
        assert (count > 0).all(), f"some of {name} is on no rank"
        whole[name] = total / count
    return whole, replicas


def column_blocks(sharded: ShardedModel, world_size: int) -> dict[str, list[int]]:
    """Column widths of a table's shards, in one row of shards."""
    tables = tables_of(sharded.model)
    blocks = {}
    for module_plan in sharded.plan.plan.values():
        for name, sharding in module_plan.items():
            width = placements(tables[name], sharding, world_size)[0].columns
            blocks[name] = [width] * (tables[name].dim // width)
    return blocks
