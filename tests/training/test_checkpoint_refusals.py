"""Torn, foreign and half-written checkpoints: refused on every rank, and the last good one used."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from recsys.training.checkpoint import Checkpointer, CheckpointError, CheckpointRefused, TrainState
from recsys.training.checkpoint import manifest as manifest_module
from recsys.training.checkpoint.state import restore_rng, rng_state
from recsys.training.checkpoint.tables import convert_columns
from tests.distributed import run_distributed
from tests.training.checkpoint_model import build, global_state, train

CPU = torch.device("cpu")


def cut_in_half(path: Path) -> None:
    file = next(path.glob("__0_*.distcp"))
    os.truncate(file, file.stat().st_size // 2)


def flip_a_byte(path: Path) -> None:
    file = next(path.glob("__0_*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_a_shard(path: Path) -> None:
    next(path.glob("__1_*.distcp")).unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_the_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 100)


def change_the_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**content, **changes}))

    return change


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_in_half, "bytes, "),
    (flip_a_byte, "checksum"),
    (lose_a_shard, "is missing"),
    (lose_the_manifest, "no manifest.json"),
    (cut_the_manifest, "not valid JSON"),
    (change_the_manifest(format="other"), "isn't of the format recsys.checkpoint"),
    (change_the_manifest(format_version=99), "format version is 99"),
]


def refused(checkpointer: Checkpointer, state: TrainState, path: Path | None = None, **options: Any) -> str:
    """The message of a refusal, which is the same on every rank."""
    with pytest.raises(CheckpointRefused) as caught:
        checkpointer.restore(state, path, **options)
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(caught.value))
    assert len(set(messages)) == 1
    return messages[0]


def on_rank_zero(work: Callable[[], Any]) -> None:
    if dist.get_rank() == 0:
        work()
    dist.barrier()


def damages(rank: int, world_size: int, directory: str) -> None:
    state = build("row_wise", "rowwise_adagrad", CPU)
    home = Path(directory) / "runs"
    checkpointer = Checkpointer(home)
    assert checkpointer.restore(state) is None
    assert checkpointer.latest() is None
    train(state, 0, 1, CPU)
    good = checkpointer.save(1, state)
    truth = global_state(state)
    train(state, 1, 2, CPU)
    newest = checkpointer.save(2, state)
    whole = Path(directory) / "whole"
    on_rank_zero(lambda: shutil.copytree(newest, whole))
    for damage, words in DAMAGES:
        on_rank_zero(partial(damage, newest))
        assert words in refused(checkpointer, state, newest)
        fresh = build("table_wise", "rowwise_adagrad", CPU, seed_of_run=3)
        info = checkpointer.restore(fresh)
        assert info is not None
        assert (info.path, info.step) == (good, 1)
        assert words in info.messages[0]
        assert all(torch.equal(value, truth[name]) for name, value in global_state(fresh).items())
        on_rank_zero(lambda: shutil.rmtree(newest))
        on_rank_zero(lambda: shutil.copytree(whole, newest))
    on_rank_zero(lambda: cut_in_half(newest))
    on_rank_zero(lambda: lose_the_manifest(good))
    message = refused(checkpointer, state)
    assert "bytes" in message
    assert "no manifest.json" in message
    assert "step_00000009: there is no such checkpoint" in refused(checkpointer, state, home / "step_00000009")
    # the torn checkpoint's step is reached again
    train(state, 2, 3, CPU)
    assert checkpointer.save(2, state) == newest
    info = checkpointer.restore(state)
    assert info is not None
    assert info.path == newest


def foreign(rank: int, world_size: int, directory: str) -> None:
    state = build("table_wise", "rowwise_adagrad", CPU)
    train(state, 0, 1, CPU)
    checkpointer = Checkpointer(directory)
    path = checkpointer.save(1, state)

    wider = build("table_wise", "rowwise_adagrad", CPU, item_rows=14)
    message = refused(checkpointer, wider, path)
    assert "table item has shape (13, 8) in the checkpoint and (14, 8) in the model" in message
    assert "category" not in message

    smaller = nn.ModuleDict({"over": nn.Linear(3, 1)})
    message = refused(checkpointer, TrainState(model=smaller), path)
    assert "table country is in the checkpoint only" in message
    assert "parameter over.weight has shape (1, 32) in the checkpoint and (1, 3) in the model" in message

    for plan in ("row_wise", "replicated", "replicated_torch"):
        other = build(plan, "adagrad", CPU, seed_of_run=2)
        before = global_state(other)
        message = refused(checkpointer, other, path)
        assert "table item was trained by rowwise_adagrad with sum, here by adagrad with sum" in message
        assert "strict_optimizer=False" in message
        info = checkpointer.restore(other, path, strict_optimizer=False)
        assert info is not None
        assert "table item: its optimizer starts afresh" in " ".join(info.messages)
        truth, after = global_state(state), global_state(other)
        assert torch.equal(after["item"], truth["item"])
        assert torch.equal(after["item/first"], before["item/first"])

    without_schedule = build("row_wise", "rowwise_adagrad", CPU)
    without_schedule.stateful = {}
    assert "schedule is in one of them only" in refused(checkpointer, without_schedule, path)


def crashes(rank: int, world_size: int, directory: str) -> None:
    state = build("table_wise", "sgd", CPU)
    checkpointer = Checkpointer(directory, keep=2)
    first = checkpointer.save(1, state)
    train(state, 0, 1, CPU)

    publish = checkpointer._publish
    if rank == 0:

        def crash(temporary: Path, path: Path) -> None:
            raise OSError("the machine went down")

        checkpointer._publish = crash  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="rank 0 could not finish the checkpoint: OSError: the machine went"):
        checkpointer.save(2, state)
    assert (Path(directory) / "step_00000002.tmp").is_dir()
    assert checkpointer.latest() == first
    info = checkpointer.restore(build("table_wise", "sgd", CPU, seed_of_run=2))
    assert info is not None
    assert (info.path, info.messages) == (first, [])

    # a crash between the two renames that replace a checkpoint of the same step
    checkpointer._publish = publish  # type: ignore[method-assign]
    on_rank_zero(lambda: os.rename(first, first.with_name(first.name + ".replaced")))
    info = checkpointer.restore(state)
    assert info is not None
    assert info.path == first

    # what can't be pickled safely is refused on every rank, and so is a failure on one rank alone
    state.rank_extras = {"where": Path("x")} if rank == 1 else {}
    with pytest.raises(ValueError, match="rank_extras can't be saved: allowed are"):
        checkpointer.save(2, state)
    state.rank_extras = {}

    for step in (2, 3, 4):
        checkpointer.save(step, state)
    names = sorted(path.name for path in Path(directory).iterdir())
    assert names == ["step_00000003", "step_00000004"]
    dist.barrier()
    checkpointer.save(2, state)  # a run that went back: the later ones are not ours to drop
    assert len(list(Path(directory).iterdir())) == 3


@pytest.mark.parametrize("case", [damages, foreign, crashes])
def test_two_processes(tmp_path: Path, case: Callable[..., None]) -> None:
    run_distributed(case, str(tmp_path))


def test_without_a_process_group(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = TrainState(model=model, optimizers=[optimizer], users_consumed=9)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    Checkpointer(tmp_path).save(5, state)
    copy = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copied = torch.optim.SGD(copy.parameters(), lr=0.5, momentum=0.9)
    info = Checkpointer(tmp_path).restore(TrainState(model=copy, optimizers=[copied]))
    assert info is not None
    assert (info.step, info.users_consumed) == (5, 9)
    assert copied.param_groups[0]["lr"] == 0.1
    for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(copied.state[ours]["momentum_buffer"], optimizer.state[theirs]["momentum_buffer"])
    assert all(torch.equal(a, b) for a, b in zip(copy.buffers(), model.buffers(), strict=True))


def test_mistakes_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0: allowed are 1"):
        Checkpointer(tmp_path, keep=0)
    model, other = nn.Linear(2, 2), nn.Linear(3, 3)
    stray = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(3, 3\) that isn't the model's"):
        Checkpointer(tmp_path).save(1, TrainState(model=model, optimizers=[stray]))
    twice = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(ValueError, match="two optimizers train weight"):
        Checkpointer(tmp_path).save(1, TrainState(model=model, optimizers=twice))


def test_random_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002

    np.random.randn()  # noqa: NPY002 - leaves half a pair of normals in numpy's state
    saved = rng_state()
    expected = draw()
    assert restore_rng(saved, 3, 0) is None
    assert draw() == expected
    message = restore_rng(None, 3, 1)
    assert message is not None
    assert "rank 1" in message
    seeded = draw()
    restore_rng(None, 3, 2)
    assert draw() != seeded
    restore_rng(None, 3, 1)
    assert draw() == seeded


@pytest.mark.parametrize(
    ("bounds", "columns", "expected"),
    [
        ([0, 8], (0, 4), [1.0, 2.0]),
        ([0, 4, 8], (4, 8), [3.0, 4.0]),
        ([0, 4, 8], (0, 8), [2.0, 3.0]),
        ([0, 4, 16], (0, 16), [2.5, 3.5]),
        ([0, 4, 16], (2, 6), [2.0, 3.0]),
    ],
)
def test_column_ranges_convert_by_overlap(bounds: list[int], columns: tuple[int, int], expected: list[float]) -> None:
    saved = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[: len(bounds) - 1]
    assert convert_columns(saved, bounds, columns).tolist() == expected


def test_a_large_file_is_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "WHOLE_BYTES", 100)
    monkeypatch.setattr(manifest_module, "SAMPLE_BYTES", 2)
    file = tmp_path / "large"
    content = bytearray(range(256)) * 8
    file.write_bytes(content)
    whole = manifest_module.fingerprint(file)
    for position in (0, len(content) - 1):
        file.write_bytes(content[:position] + b"\xaa" + content[position + 1 :])
        assert manifest_module.fingerprint(file) != whole
    file.write_bytes(content)
    assert manifest_module.fingerprint(file) == whole
