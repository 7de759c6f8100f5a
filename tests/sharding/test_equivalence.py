"""Every plan trains as the unsharded model does: same rows out, same tables after a few steps of every
optimizer.

The steps include an empty batch on each rank, a batch of one user and users without history (`step_users`).
All cases of a group size share one group of processes.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from recsys.sharding import ComputeKernel, ShardingConfig, ShardingKind, TableSharding
from tests.distributed import run_distributed
from tests.sharding.model import SCHEMA, Trained, train_reference
from tests.sharding.workers import DENSE_LR, Case, Result, optimizer_config, train_cases

CONFIGS = Path(__file__).parents[2] / "configs" / "sharding"
NAMED_PLANS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
FUSED_ON_CPU = ("sgd", "rowwise_adagrad", "adagrad")
OPTIMIZERS = (*FUSED_ON_CPU, "adam")


def load_plan(name: str) -> ShardingConfig:
    merged = OmegaConf.merge(OmegaConf.structured(ShardingConfig), OmegaConf.load(CONFIGS / f"{name}.yaml"))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ShardingConfig)
    return config


def asked(kind: str, kernel: str = "auto") -> TableSharding:
    return TableSharding(ShardingKind(kind), ComputeKernel(kernel))


def mixed_plans() -> dict[str, ShardingConfig]:
    """Several ways within one collection (item and category have one dimension), and what no file names."""
    return {
        "rows_beside_replicated": ShardingConfig(
            sequence=asked("row_wise"),
            pooled=asked("data_parallel"),
            tables={"category": asked("data_parallel"), "country": asked("table_column_wise")},
        ),
        "columns_beside_replicated": ShardingConfig(
            sequence=asked("column_wise"),
            pooled=asked("column_wise"),
            tables={"category": asked("data_parallel"), "device": asked("table_wise")},
            column_shard_dim=4,
        ),
        "rows_beside_columns_beside_whole": ShardingConfig(
            sequence=asked("table_wise"),
            pooled=asked("table_column_wise"),
            tables={"category": asked("row_wise"), "item": asked("column_wise")},
        ),
    }


def plans_on_cpu() -> dict[str, ShardingConfig]:
    return {name: load_plan(name) for name in NAMED_PLANS} | mixed_plans()


def plans_on_gpu() -> dict[str, ShardingConfig]:
    """The same, and what only a GPU can do."""
    plans = plans_on_cpu() | {
        f"{kernel}_{kind}": ShardingConfig(sequence=asked(kind, kernel), pooled=asked(kind, kernel))
        for kernel in ("fused_uvm", "fused_uvm_caching")
        for kind in ("table_wise", "row_wise", "column_wise")
    }
    for kind in ("row_wise", "table_row_wise"):
        plans[f"pooled_{kind}"] = ShardingConfig(sequence=asked("table_wise"), pooled=asked(kind))
    return plans


def cpu_cases() -> list[Case]:
    cases = [
        Case(f"{name}-{optimizer}", plan, optimizer)
        for name, plan in plans_on_cpu().items()
        for optimizer in FUSED_ON_CPU
    ]
    cases.append(Case("data_parallel-adam", load_plan("data_parallel"), "adam"))
    return cases + [
        Case(f"{name}-pipelined", plan, "rowwise_adagrad", pipeline=True) for name, plan in plans_on_cpu().items()
    ]


def one_process_cases() -> list[Case]:
    return [
        Case(f"{name}-{'pipelined' if pipeline else 'plain'}", plan, "adagrad", pipeline)
        for name, plan in plans_on_cpu().items()
        for pipeline in (False, True)
    ]


def gpu_cases() -> list[Case]:
    cases = [
        Case(f"{name}-{optimizer}", plan, optimizer)
        for name, plan in plans_on_gpu().items()
        for optimizer in OPTIMIZERS
    ]
    return cases + [
        Case(f"{name}-pipelined", plan, "rowwise_adagrad", pipeline=True) for name, plan in plans_on_gpu().items()
    ]


@pytest.fixture(scope="module")
def on_two_processes() -> list[dict[str, Result]]:
    return run_distributed(train_cases, cpu_cases(), timeout=240)


@pytest.fixture(scope="module")
def on_one_process() -> list[dict[str, Result]]:
    return run_distributed(train_cases, one_process_cases(), world_size=1, timeout=120)


@pytest.fixture(scope="module")
def on_two_gpus() -> list[dict[str, Result]]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return run_distributed(train_cases, gpu_cases(), "cuda", backend="nccl", timeout=480)


@functools.cache
def reference(optimizer: str, blocks: tuple[tuple[str, tuple[int, ...]], ...]) -> Trained:
    widths = {table: list(parts) for table, parts in blocks}
    return train_reference(optimizer_config(optimizer), widths, DENSE_LR)


def assert_like_unsharded(results: list[dict[str, Result]], case: Case) -> None:
    ranks = [rank[case.name] for rank in results]
    blocks = tuple((table, tuple(parts)) for table, parts in sorted(ranks[0].blocks.items()))
    expected = reference(case.optimizer, blocks)
    close = functools.partial(torch.testing.assert_close, rtol=2e-5, atol=2e-6)
    for step, features in enumerate(expected.forward):
        for key, rows in features.items():
            seen = torch.cat([rank.trained.forward[step][key] for rank in ranks])
            close(seen, rows, msg=f"rows of {key} at step {step} differ")
    for result in ranks:
        for table in SCHEMA.tables:
            close(result.trained.tables[table], expected.tables[table])
        for table, replica in result.replicas.items():
            close(replica, expected.tables[table])
        for name, parameter in expected.dense.items():
            close(result.trained.dense[name], parameter)
        if case.pipeline:
            assert set(result.collections) <= set(result.pipelined)


def assert_as_asked(result: Result, config: ShardingConfig) -> None:
    """The plan in force is the plan asked for, and no table is missing from the print."""
    for table in SCHEMA.tables:
        kind, kernel = result.sharding[table]
        pooled = table in {feature.table for feature in SCHEMA.context}
        wanted = config.tables.get(table, config.pooled if pooled else config.sequence)
        assert wanted.sharding_type.value in (kind, "auto")
        assert wanted.compute_kernel.value in (kernel, "auto")
        (line,) = [line for line in result.printed.splitlines() if line.split()[0] == table]
        assert kind in line
        assert kernel in line


@pytest.mark.parametrize("case", cpu_cases(), ids=lambda case: case.name)
def test_two_processes(on_two_processes: list[dict[str, Result]], case: Case) -> None:
    assert_like_unsharded(on_two_processes, case)
    assert_as_asked(on_two_processes[0][case.name], case.config)


@pytest.mark.parametrize("case", one_process_cases(), ids=lambda case: case.name)
def test_one_process(on_one_process: list[dict[str, Result]], case: Case) -> None:
    assert_like_unsharded(on_one_process, case)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", gpu_cases(), ids=lambda case: case.name)
def test_two_gpus(on_two_gpus: list[dict[str, Result]], case: Case) -> None:
    assert_like_unsharded(on_two_gpus, case)
    assert_as_asked(on_two_gpus[0][case.name], case.config)


@pytest.mark.gpu
def test_one_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cases = [Case(name, plan, "adam", pipeline=True) for name, plan in plans_on_gpu().items()]
    results = run_distributed(train_cases, cases, "cuda", world_size=1, backend="nccl", timeout=240)
    for case in cases:
        assert_like_unsharded(results, case)


def test_columns_are_really_cut(on_two_processes: list[dict[str, Result]]) -> None:
    blocks = on_two_processes[0]["column_wise-sgd"].blocks
    assert blocks == {"item": [8, 8], "category": [8, 8], "action": [4, 4], "country": [4, 4], "device": [4]}
    assert on_two_processes[0]["columns_beside_replicated-sgd"].blocks["item"] == [4, 4, 4, 4]
