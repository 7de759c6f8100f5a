"""The two-process harness itself: values, errors, deaths and hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import WorkerFailure, outcomes_of, run_distributed


def sum_of_ranks(rank: int, world_size: int, scale: float) -> torch.Tensor:
    total = torch.tensor([scale * (rank + 1)])
    dist.all_reduce(total)
    return total


def fail_on_rank_one(rank: int, world_size: int) -> str:
    if rank == 1:
        raise ValueError("no such table")
    return "fine"


def die_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)


def hang_on_rank_one(rank: int, world_size: int) -> str:
    if rank == 1:
        time.sleep(600)
    return "fine"


def environment(rank: int, world_size: int) -> tuple[str, str, bool]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], dist.is_initialized()


def test_values_come_back_by_rank() -> None:
    first, second = run_distributed(sum_of_ranks, 2.0)
    assert first.item() == second.item() == 6.0


def test_one_process_is_a_group_too() -> None:
    assert run_distributed(sum_of_ranks, 1.0, world_size=1)[0].item() == 1.0


def test_an_error_names_its_rank_and_type() -> None:
    with pytest.raises(WorkerFailure, match=r"rank 1: ValueError: no such table"):
        run_distributed(fail_on_rank_one)
    first, second = outcomes_of(fail_on_rank_one)
    assert first.ok
    assert first.value == "fine"
    assert (second.error_type, second.error_message) == ("ValueError", "no such table")


def test_a_death_is_an_error() -> None:
    first, second = outcomes_of(die_on_rank_one)
    assert first.ok
    assert second.error_type == "Died"
    assert "exit code 3" in (second.error_message or "")


def test_a_hang_ends_at_the_timeout() -> None:
    start = time.monotonic()
    first, second = outcomes_of(hang_on_rank_one, timeout=5.0)
    assert time.monotonic() - start < 30
    assert first.value == "fine"
    assert second.error_type == "Hung"


def test_the_environment_is_torchruns() -> None:
    assert run_distributed(environment, init=False) == [("0", "2", False), ("1", "2", False)]
