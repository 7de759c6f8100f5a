"""Checkpoints on two processes: exact resumption, other plans and other world sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from recsys.training.checkpoint import Checkpointer
from tests.distributed import run_distributed
from tests.training.checkpoint_model import (
    CUDA_PLANS,
    DIM,
    PLANS,
    POOLED_TABLES,
    REPLICATED_BY_TORCH,
    SEQUENCE_TABLES,
    build,
    global_state,
    train,
)

TABLES = (*SEQUENCE_TABLES, *POOLED_TABLES)
BACKENDS = ["gloo", pytest.param("nccl", marks=pytest.mark.multi_gpu)]
CUDA_ONLY_OPTIMIZERS = ["adam"]
"""FBGEMM has no fused Adam for a CPU."""


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")


def resume_exactly(rank: int, world_size: int, directory: str, plan: str, sparse: str) -> None:
    device = device_of(rank)
    uninterrupted = build(plan, sparse, device)
    expected = train(uninterrupted, 0, 6, device)
    truth = global_state(uninterrupted)

    first = build(plan, sparse, device)
    first.extras = {"best": 0.5, "window": torch.arange(3)}
    first.rank_extras = {"who": rank}
    begun = train(first, 0, 3, device)
    checkpointer = Checkpointer(directory)
    path = checkpointer.save(3, first)
    assert begun + train(first, 3, 6, device) == expected, "saving changed the run"

    second = build(plan, sparse, device, seed_of_run=7)
    info = checkpointer.restore(second)
    assert info is not None
    assert info.path == path == checkpointer.latest()
    assert (info.step, info.users_consumed, info.messages) == (3, 3 * 6 * world_size, [])
    assert info.extras["best"] == 0.5
    assert info.extras["window"].tolist() == [0, 1, 2]
    assert info.rank_extras == {"who": rank}
    assert train(second, 3, 6, device) == expected[3:]
    after = global_state(second)
    assert after.keys() == truth.keys()
    for name in truth:
        assert torch.equal(after[name], truth[name]), name


@pytest.mark.parametrize(
    ("backend", "world_size"),
    [
        ("gloo", 2),
        pytest.param("nccl", 1, marks=pytest.mark.gpu),
        pytest.param("nccl", 2, marks=pytest.mark.multi_gpu),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, backend: str, world_size: int) -> None:
    run_distributed(resume_all, str(tmp_path), backend=backend, world_size=world_size)


def resume_all(rank: int, world_size: int, directory: str) -> None:
    cuda = device_of(rank).type == "cuda"
    for plan in [*(CUDA_PLANS if cuda else PLANS), REPLICATED_BY_TORCH]:
        any_optimizer = cuda or plan.startswith("replicated")
        sparse = ["rowwise_adagrad", "adagrad", "sgd"]
        for optimizer in [*sparse, *CUDA_ONLY_OPTIMIZERS] if any_optimizer else sparse:
            resume_exactly(rank, world_size, f"{directory}/{plan}_{optimizer}", plan, optimizer)


def save_all(rank: int, world_size: int, directory: str, sparse: list[str]) -> None:
    """Train and save under every plan and optimizer, with the true global state beside the checkpoint."""
    device = device_of(rank)
    for plan in PLANS:
        for optimizer in sparse:
            state = build(plan, optimizer, device)
            train(state, 0, 2, device)
            home = Path(directory) / f"{plan}_{optimizer}_{world_size}"
            Checkpointer(home).save(2, state)
            truth = global_state(state)
            if rank == 0:
                torch.save(truth, home / "truth.pt")
    dist.barrier()


def load_all(rank: int, world_size: int, directory: str, saved_world: int, sparse: list[str]) -> None:
    """Load each checkpoint under every plan, into a model of another seed, and compare with the truth."""
    device = device_of(rank)
    for before in PLANS:
        for optimizer in sparse:
            home = Path(directory) / f"{before}_{optimizer}_{saved_world}"
            truth = torch.load(home / "truth.pt")
            for now in [*PLANS, REPLICATED_BY_TORCH]:
                state = build(now, optimizer, device, seed_of_run=5)
                info = Checkpointer(home).restore(state)
                assert info is not None
                assert (info.world_size, info.rank_extras) == (
                    saved_world,
                    {} if world_size == saved_world else None,
                )
                seeded_anew = [message for message in info.messages if "random state" in message]
                assert len(seeded_anew) == max(0, world_size - saved_world)
                same_states(truth, global_state(state), f"{before} -> {now}, {optimizer}")
                assert torch.tensor(train(state, 2, 3, device)).isfinite().all()


def same_states(truth: dict[str, torch.Tensor], found: dict[str, torch.Tensor], case: str) -> None:
    """Equal to the bit, except that row-wise states convert between column shards as documented."""
    assert found.keys() == truth.keys(), case
    for name, expected in truth.items():
        table, _, key = name.partition("/")
        row_wise = table in TABLES and key and expected.shape[-1] != DIM
        if row_wise and len(found[name]) < len(expected):  # equally wide shards: the mean of their means
            torch.testing.assert_close(
                found[name], expected.mean(0, keepdim=True), rtol=1e-6, atol=0, msg=f"{case}: {name}"
            )
        elif row_wise:
            assert torch.equal(found[name], expected.expand_as(found[name])), f"{case}: {name}"
        else:
            assert torch.equal(found[name], expected), f"{case}: {name}"
        if table in TABLES and key:
            assert expected.abs().sum() > 0, f"{name} tests nothing"


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_plan_and_world_size_loads_any_other(tmp_path: Path, backend: str) -> None:
    sparse = ["rowwise_adagrad", "adagrad", *(CUDA_ONLY_OPTIMIZERS if backend == "nccl" else [])]
    for world_size in (1, 2):
        run_distributed(save_all, str(tmp_path), sparse, world_size=world_size, backend=backend)
    for saved_world, world_size in ((2, 2), (2, 1), (1, 2)):
        run_distributed(load_all, str(tmp_path), saved_world, sparse, world_size=world_size, backend=backend)
