"""What can't be had is refused by every rank, in plain words, before any rank waits for another."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from recsys.embeddings import SparseOptimizerConfig, SparseOptimizerName
from recsys.sharding import ComputeKernel, ShardingConfig, ShardingKind, TableSharding, check_sharding, shard
from tests.distributed import outcomes_of
from tests.sharding.model import TinyModel


def asked(kind: str, kernel: str = "auto") -> TableSharding:
    return TableSharding(ShardingKind(kind), ComputeKernel(kernel))


REFUSALS: dict[str, tuple[ShardingConfig, str, str]] = {
    "unknown_table": (
        ShardingConfig(tables={"itme": asked("row_wise")}),
        "cpu",
        r"unknown tables \['itme'\]: there are \['action', 'category', 'country', 'device', 'item'\]",
    ),
    "pooled_rows_on_cpu": (
        ShardingConfig(pooled=asked("row_wise")),
        "cpu",
        r"pooled table 'country' on cpu: sharding_type=row_wise.*allowed are \['auto', 'data_parallel', ",
    ),
    "sequence_table_row_wise": (
        ShardingConfig(sequence=asked("table_row_wise")),
        "cuda",
        r"sequence table 'item' on cuda: sharding_type=table_row_wise.*'row_wise'",
    ),
    "one_table_of_a_kind_that_is_not_offered": (
        ShardingConfig(tables={"action": asked("table_row_wise")}),
        "cpu",
        "'action' on cpu: sharding_type=table_row_wise",
    ),
    "uvm_on_cpu": (
        ShardingConfig(sequence=asked("table_wise", "fused_uvm")),
        "cpu",
        r"compute_kernel=fused_uvm can't be had with.*table_wise; allowed are \['auto', 'fused'\]",
    ),
    "uvm_on_cpu_whatever_the_type": (
        ShardingConfig(sequence=asked("auto", "fused_uvm_caching")),
        "cpu",
        r"sharding_type=auto; allowed are \['auto', 'dense', 'fused'\]",
    ),
    "replicas_are_not_fused": (
        ShardingConfig(pooled=asked("data_parallel", "fused")),
        "cuda",
        r"compute_kernel=fused.*allowed are \['auto', 'dense'\]",
    ),
    "columns_that_do_not_divide": (
        ShardingConfig(sequence=asked("column_wise"), column_shard_dim=12),
        "cpu",
        r"'item' has dimension 16, which column_shard_dim=12 doesn't divide; .*null and \[4, 8, 16\]",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_locally(name: str) -> None:
    config, device_type, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        check_sharding(TinyModel(), config, device_type, world_size=2)


def test_too_few_rows_to_cut() -> None:
    with pytest.raises(ValueError, match=r"table 'action' has 5 rows, too few for row_wise over 8 ranks"):
        check_sharding(TinyModel(), ShardingConfig(sequence=asked("row_wise")), "cuda", world_size=8)


def test_adam_is_fused_on_gpus_only() -> None:
    adam = SparseOptimizerConfig(name=SparseOptimizerName.adam)
    plan = ShardingConfig(sequence=asked("row_wise"), pooled=asked("table_wise"))
    with pytest.raises(ValueError, match=r"adam isn't fused on a CPU.*allowed are \['rowwise_adagrad', "):
        check_sharding(TinyModel(), plan, "cpu", 2, adam)
    check_sharding(TinyModel(), plan, "cuda", 2, adam)
    replicated = ShardingConfig(sequence=asked("data_parallel"), pooled=asked("data_parallel"))
    check_sharding(TinyModel(), replicated, "cpu", 2, adam)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("column_shard_dim", 6, "multiples of 4"),
        ("host_memory_gib_per_rank", 0.0, "values > 0"),
        ("device_memory_gib_per_rank", -1.0, "values > 0"),
        ("reserved_memory_fraction", 1.0, "0 <= fraction < 1"),
    ],
)
def test_impossible_values(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"sharding.{field} is {value}.*{message}"):
        ShardingConfig(**{field: value})


def try_to_shard(rank: int, world_size: int, configs: dict[str, ShardingConfig]) -> dict[str, str]:
    """The error of each config; the last one has none, so the group is still in step after the refusals."""
    errors = {}
    for name, config in configs.items():
        try:
            shard(TinyModel(), config, device=torch.device("cpu"), batch_size=4)
            errors[name] = ""
        except ValueError as error:
            errors[name] = str(error)
    return errors


def test_every_rank_refuses_and_none_hangs() -> None:
    configs = {name: config for name, (config, device_type, _) in REFUSALS.items() if device_type == "cpu"}
    configs["memory_too_small"] = ShardingConfig(host_memory_gib_per_rank=1e-6)
    configs["fine"] = ShardingConfig()
    outcomes = outcomes_of(try_to_shard, configs, timeout=60)
    assert all(outcome.ok for outcome in outcomes), [outcome.describe() for outcome in outcomes]
    first, second = (outcome.value for outcome in outcomes)
    assert first == second
    for name in configs.keys() & REFUSALS.keys():
        assert re.search(REFUSALS[name][2], first[name]), (name, first[name])
    assert first["memory_too_small"].startswith("no sharding plan fits: PlannerError")
    assert first["fine"] == ""


def test_a_group_is_needed() -> None:
    with pytest.raises(ValueError, match="needs a process group"):
        shard(TinyModel(), ShardingConfig(), device=torch.device("cpu"), batch_size=4)
