"""A small model of sharded, replicated and dense parts, and an independent look at its state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.embeddings import SparseOptimizerConfig, SparseOptimizerName
from recsys.sharding.optimizer import ReplicatedTableOptimizer
from recsys.training.checkpoint import TrainState

DIM, BATCH = 8, 6
SEQUENCE_TABLES = {"item": 13, "category": 6}
POOLED_TABLES = {"country": 5, "browser": 7}
PLANS = ["table_wise", "row_wise", "column_wise", "replicated"]
REPLICATED_BY_TORCH = "replicated_torch"
"""Like `replicated`, with an optimizer of torch's instead of ours."""
CUDA_PLANS = [*PLANS, "uvm_caching"]
SPARSE: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-8}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-8}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
}


class SmallModel(nn.Module):
    """Tables, dropout and a linear layer: `(tokens of 2 features, bags of 2 features) -> loss`."""

    def __init__(self, item_rows: int = SEQUENCE_TABLES["item"]) -> None:
        super().__init__()
        rows = {**SEQUENCE_TABLES, "item": item_rows}
        self.ec = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name=name, num_embeddings=n, embedding_dim=DIM, feature_names=[name])
                for name, n in rows.items()
            ]
        )
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=n, embedding_dim=DIM, feature_names=[name])
                for name, n in POOLED_TABLES.items()
            ]
        )
        self.dropout = nn.Dropout(0.3)
        self.over = nn.Linear(4 * DIM, 1)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, sequences: KeyedJaggedTensor, context: KeyedJaggedTensor) -> Tensor:
        """Mean squared distance of the output from 1."""
        tokens = self.ec(sequences)
        pooled = self.ebc(context).values()
        joined = torch.cat([tokens["item"].values(), tokens["category"].values(), pooled], dim=1)
        self.seen.add_(1)
        return (self.over(self.dropout(joined)) - 1).square().mean()


def seed(value: int) -> None:
    """All generators of this process, as a run would."""
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    torch.manual_seed(value)


def batch(step: int, rank: int, device: torch.device) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
    """One id per user and feature; a function of (step, rank) alone."""
    generator = torch.Generator().manual_seed(1000 * step + rank)

    def features(tables: dict[str, int]) -> KeyedJaggedTensor:
        ids = [torch.randint(rows, (BATCH,), generator=generator) for rows in tables.values()]
        lengths = torch.ones(len(tables) * BATCH, dtype=torch.int64)
        return KeyedJaggedTensor(keys=list(tables), values=torch.cat(ids), lengths=lengths).to(device)

    return features(SEQUENCE_TABLES), features(POOLED_TABLES)


def build(plan: str, sparse: str, device: torch.device, *, seed_of_run: int = 0, item_rows: int = 13) -> TrainState:
    """A model under `plan` with optimizers and a schedule. Under `table_wise`, rank 0 owns every table."""
    seed(seed_of_run)
    model = SmallModel(item_rows)
    world = dist.get_world_size()
    last = world - 1
    optimizer, options = SPARSE[sparse]
    replicated = plan in ("replicated", REPLICATED_BY_TORCH)
    if not replicated:
        for collection in (model.ec, model.ebc):
            apply_optimizer_in_backward(optimizer, collection.parameters(), dict(options))
    how: dict[str, Any] = {
        "table_wise": {name: table_wise(rank=0) for name in (*SEQUENCE_TABLES, *POOLED_TABLES)},
        # row-wise bags are not offered on a CPU
        "row_wise": {
            **{name: row_wise() for name in SEQUENCE_TABLES},
            **{name: table_wise(rank=last) for name in POOLED_TABLES},
        },
        # both shards on rank 0 in a world of one
        "column_wise": {name: column_wise(ranks=[last, 0]) for name in (*SEQUENCE_TABLES, *POOLED_TABLES)},
        "uvm_caching": {
            name: table_wise(rank=last, compute_kernel="fused_uvm_caching")
            for name in (*SEQUENCE_TABLES, *POOLED_TABLES)
        },
    }.get(plan, {name: data_parallel() for name in POOLED_TABLES})
    kwargs = {"local_size": world, "world_size": world, "device_type": device.type}
    bags = construct_module_sharding_plan(
        model.ebc,
        {name: how[name] for name in POOLED_TABLES},
        sharder=EmbeddingBagCollectionSharder(),
        **kwargs,
    )
    plans: dict[str, Any] = {"ebc": bags}
    if not replicated:  # EC data_parallel is broken upstream: such tables stay in the DDP part
        plans["ec"] = construct_module_sharding_plan(
            model.ec,
            {name: how[name] for name in SEQUENCE_TABLES},
            sharder=EmbeddingCollectionSharder(),
            **kwargs,
        )
    sharded = DistributedModelParallel(
        model.to(device),
        device=device,
        plan=ShardingPlan(plans),
        sharders=[EmbeddingCollectionSharder(), EmbeddingBagCollectionSharder()],
    )
    named = dict(sharded.named_parameters())
    dense = torch.optim.AdamW([named["over.weight"], named["over.bias"]], lr=0.05)
    optimizers: list[torch.optim.Optimizer] = [dense]
    if replicated:
        tables = {name.split(".")[-2]: (name, p) for name, p in named.items() if not name.startswith("over")}
        if plan == REPLICATED_BY_TORCH:
            optimizers.append(optimizer([p for _, p in tables.values()], **options))
        else:
            rule = SparseOptimizerConfig(name=SparseOptimizerName(sparse), **options)
            optimizers.append(ReplicatedTableOptimizer(tables, rule))
    schedule = torch.optim.lr_scheduler.LambdaLR(dense, lambda step: 1 / (1 + step))
    seed(100 * seed_of_run + dist.get_rank())  # dropout differs between ranks
    return TrainState(model=sharded, optimizers=optimizers, stateful={"schedule": schedule})


def train(state: TrainState, first: int, last: int, device: torch.device) -> list[float]:
    """Steps `first` (inclusive) to `last` (exclusive); the losses of this rank."""
    losses = []
    for step in range(first, last):
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        loss = state.model(*batch(step, dist.get_rank(), device))
        loss.backward()
        for optimizer in state.optimizers:
            optimizer.step()
        state.stateful["schedule"].step()  # type: ignore[attr-defined]
        state.users_consumed += BATCH * dist.get_world_size()
        losses.append(loss.item() + random.random() + np.random.rand())  # noqa: NPY002 - all generators count
    return losses


def global_state(state: TrainState) -> dict[str, Tensor]:
    """Whole weights and optimizer states by name, on every rank, as TorchRec's own state dicts tell them.

    Tables: `item` (R, D), `item/first` (R, D) or, row-wise, (C, R); dense: `over.weight`, `over.bias/step`.
    """
    whole: dict[str, Tensor] = {}
    for name, value in state.model.state_dict().items():
        short = name.split(".")[-2] if name.endswith("weight") and "embedding" in name else name
        whole[short] = _gather(value)
    fused = state.model.fused_optimizer.state_dict()["state"]  # type: ignore[union-attr, operator]
    for table in _all_keys([k for states in fused.values() for k in states]):
        value = next((states[table] for states in fused.values() if table in states), None)
        full = _gather(value)
        name, key = table.split(".")
        if full.dim() == 1:
            full = full.view(-1, whole[name].shape[0])
        whole[f"{name}/{ {'momentum1': 'first', 'exp_avg_sq': 'second'}[key] }"] = full
    names = {id(p): n for n, p in state.model.named_parameters()}
    for optimizer in state.optimizers:
        for parameter, states in optimizer.state.items():
            name = names[id(parameter)]
            is_table = "embedding" in name
            short = name.split(".")[-2] if is_table else name
            for key, value in states.items():
                if is_table and key == "step":
                    continue
                if is_table:
                    first_or_second = {"exp_avg_sq": "second", "momentum_buffer": "momentum_buffer"}
                    key = first_or_second.get(key.split(".")[-1], "first")
                if value is None:  # SGD without momentum
                    continue
                value = value.detach().clone()
                row_wise = is_table and value.numel() == len(parameter)
                whole[f"{short}/{key}"] = value.view(1, -1) if row_wise else value
    return {name: value.cpu() for name, value in whole.items()}


def _all_keys(keys: list[str]) -> list[str]:
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, keys)
    return sorted({key for of_rank in lists for key in of_rank})


def _gather(value: Any) -> Tensor:
    """Put the shards of all ranks together; a rank may hold none: `value` is `None` or has no shards."""
    if isinstance(value, Tensor) and not isinstance(value, ShardedTensor):
        return value.detach().clone()
    shards = (
        [] if value is None else [(s.metadata.shard_offsets, s.tensor.detach().cpu()) for s in value.local_shards()]
    )
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, (shards, None if value is None else tuple(value.metadata().size)))
    size = next(size for _, size in lists if size is not None)
    full = torch.full(size, float("nan"))
    for of_rank, _ in lists:
        for offsets, tensor in of_rank:
            full[tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))] = tensor
    assert not full.isnan().any()
    return full
