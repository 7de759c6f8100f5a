"""Initial weights, the state of replicated tables' optimizer, and the printed plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.embeddings import SparseOptimizerConfig, SparseOptimizerName
from recsys.sharding import (
    ComputeKernel,
    ReplicatedTableOptimizer,
    ShardingConfig,
    ShardingKind,
    TableSharding,
    shard,
)
from tests.distributed import run_distributed
from tests.sharding.model import DIMS, SCHEMA, TinyModel, batch_of, make_users
from tests.sharding.test_equivalence import load_plan
from tests.sharding.workers import gather_tables

CPU = torch.device("cpu")


def initial_weights(rank: int, world_size: int, plans: dict[str, ShardingConfig], seed: int) -> Any:
    weights = {}
    for name, plan in plans.items():
        sharded = shard(TinyModel(), plan, device=CPU, batch_size=4, seed=seed)
        weights[name] = gather_tables(sharded.model)[0]
    return weights


def test_initial_weights_depend_on_the_seed_only() -> None:
    plans = {name: load_plan(name) for name in ("table_wise", "row_wise", "column_wise", "data_parallel")}
    on_two = run_distributed(initial_weights, plans, 5)
    on_one = run_distributed(initial_weights, plans, 5, world_size=1)
    other = run_distributed(initial_weights, {"table_wise": plans["table_wise"]}, 6, world_size=1)
    expected = on_one[0]["table_wise"]
    for seen in (*on_two, *on_one):
        for plan in plans:
            for table, weight in expected.items():
                assert torch.equal(seen[plan][table], weight), (plan, table)
    for table, weight in expected.items():
        assert not torch.equal(other[0]["table_wise"][table], weight)
    everything = torch.cat([weight.flatten() for weight in expected.values()])
    assert everything.unique().numel() == everything.numel()
    assert everything.std().item() == pytest.approx(0.02, rel=0.05)
    assert everything.abs().max() <= 0.02 * 3**0.5
    assert abs(everything.mean().item()) < 0.002


def optimizer_states(rank: int, world_size: int, optimizer: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    """State by parameter name after three steps, fused and replicated."""
    users = [make_users(3, seed=20 + step) for step in range(3)]
    states: dict[str, dict[str, dict[str, Tensor]]] = {}
    for plan in ("table_wise", "data_parallel"):
        config = SparseOptimizerConfig(name=SparseOptimizerName(optimizer), lr=0.1)
        sharded = shard(TinyModel(), load_plan(plan), device=CPU, batch_size=4, sparse_optimizer=config)
        replicated = sharded.replicated_optimizer
        for step in users:
            sharded.model(batch_of(step))[0].backward()
            if replicated is not None:
                replicated.step()
                replicated.zero_grad()
        keyed = replicated if replicated is not None else sharded.model.fused_optimizer
        states[plan] = {
            key: {name: _whole(value) for name, value in state.items()}
            for key, state in keyed.state_dict()["state"].items()
        }
    return states


def _whole(value: Tensor | ShardedTensor) -> Tensor:
    if isinstance(value, ShardedTensor):
        (part,) = value.local_shards()
        return part.tensor.clone()
    return value.clone()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_replicated_state_has_the_fused_names_shapes_and_values(optimizer: str) -> None:
    (states,) = run_distributed(optimizer_states, optimizer, world_size=1)
    fused, replicated = states["table_wise"], states["data_parallel"]
    assert len(fused) == len(SCHEMA.tables)
    torch.testing.assert_close(replicated, fused, rtol=1e-5, atol=1e-9)


def adam(weight: torch.nn.Parameter) -> ReplicatedTableOptimizer:
    config = SparseOptimizerConfig(name=SparseOptimizerName.adam, lr=0.1)
    return ReplicatedTableOptimizer({"item": ("embeddings.item.weight", weight)}, config)


def test_adam_goes_on_after_a_restart() -> None:
    """Bias correction counts steps, which are not part of the saved state."""
    gradients = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = adam(whole)
    for i, gradient in enumerate(gradients):
        if i == 2:
            saved_weight, saved_state = whole.detach().clone(), optimizer.state_dict()
            saved_state = {"state": {k: {n: t.clone() for n, t in s.items()} for k, s in saved_state["state"].items()}}
        whole.grad = gradient
        optimizer.step()
    resumed = torch.nn.Parameter(saved_weight)
    restarted = adam(resumed)
    restarted.load_state_dict(saved_state)
    restarted.set_optimizer_step(2)
    for gradient in gradients[2:]:
        resumed.grad = gradient
        restarted.step()
    assert torch.equal(resumed, whole)


def test_adam_leaves_rows_without_a_gradient_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = adam(weight)
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    optimizer.step()
    assert torch.equal(weight[0], before[0])
    assert torch.equal(weight[2], before[2])
    assert not torch.equal(weight[1], before[1])


def print_plans(rank: int, world_size: int) -> dict[str, str]:
    printed = {}
    config = ShardingConfig(
        sequence=TableSharding(ShardingKind.row_wise),
        pooled=TableSharding(ShardingKind.table_wise, ComputeKernel.fused),
        tables={"action": TableSharding(ShardingKind.data_parallel)},
    )
    for optimizer in ("sgd", "adagrad"):
        sparse = SparseOptimizerConfig(name=SparseOptimizerName(optimizer))
        sharded = shard(TinyModel(), config, device=CPU, batch_size=4, sparse_optimizer=sparse)
        printed[optimizer] = sharded.format_plan()
        assert dist.get_world_size() == world_size
    return printed


def test_the_printed_plan() -> None:
    printed = run_distributed(print_plans)[0]
    lines = printed["sgd"].splitlines()
    assert lines[0].split() == [
        "table",
        "kind",
        "rows",
        "dim",
        "sharding",
        "ranks",
        "MiB",
        "per",
        "rank",
        "kernel",
    ]
    assert [line.split()[0] for line in lines[2:-1]] == sorted(SCHEMA.tables)
    cells = {line.split()[0]: line.split() for line in lines[2:-1]}
    action = f"{5 * DIMS['action'] * 4 / 2**20:.3g}"
    assert cells["action"] == ["action", "sequence", "5", "8", "data_parallel", "0,1", action, "dense"]
    # 37 rows over two ranks: 19 and 18.
    least, most = (f"{rows * DIMS['item'] * 4 / 2**20:.3g}" for rows in (18, 19))
    assert cells["item"][5:] == ["0,1", least, "to", most, "fused"]
    assert cells["country"][:5] == ["country", "pooled", "13", "8", "table_wise"]
    kernels = [line.rindex(line.split()[-1]) for line in lines[2:-1]]
    assert len(set(kernels)) == 1, "columns are aligned"
    assert lines[-1].startswith("weights and optimizer state: ")
    twice = {line.split()[0]: line.split() for line in printed["adagrad"].splitlines()[2:-1]}
    assert twice["action"][6] == f"{2 * 5 * DIMS['action'] * 4 / 2**20:.3g}"
