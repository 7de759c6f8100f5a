"""Training steps don't wait for the GPU."""

from pathlib import Path

import pytest
import torch

from recsys.training.sync_watch import SyncDebug, SynchronisationError, SyncWatch
from tests.distributed import run_distributed
from tests.training.runs import small_run, train


def test_nothing_is_watched_on_a_cpu() -> None:
    watch = SyncWatch(SyncDebug.error, torch.device("cpu"), first_steps=0)
    with watch.step():
        torch.ones(2).sum().item()
    assert watch.report() == "host synchronisations are looked for on CUDA only"
    assert SyncWatch(SyncDebug.off, torch.device("cpu"), first_steps=0).report() == ""


@pytest.mark.gpu
def test_a_synchronisation_is_found_where_it_is() -> None:
    device = torch.device("cuda")
    x = torch.ones(4, device=device)
    watch = SyncWatch(SyncDebug.error, device, first_steps=1)
    with watch.step():
        x.sum().item()  # not watched yet
    with watch.step():
        x.sum()
    with pytest.raises(SynchronisationError, match=r"test_sync_watch\.py:\d+"), watch.step():
        x.sum().item()
    listing = SyncWatch(SyncDebug.report, device, first_steps=0)
    for _ in range(3):
        with listing.step():
            x.sum().item()
    assert "3 x " in listing.report()
    assert "in 3 steps" in listing.report()


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multi_gpu)]
)
def test_a_training_step_waits_for_nothing(tmp_path: Path, world_size: int) -> None:
    config = small_run(tmp_path, "cuda", max_steps=12, log_every_steps=6, warmup_steps=3, sync_debug=SyncDebug.error)
    run_distributed(train, config, world_size=world_size, backend="nccl", init=False)
