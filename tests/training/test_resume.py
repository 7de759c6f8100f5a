"""Going on where a run stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recsys.training.checkpoint import Checkpointer, TrainState
from tests.distributed import outcomes_of, run_distributed
from tests.samples import small_data
from tests.training.runs import losses, plan, records, small_run, small_task, train, train_and_die


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Dropout masks, data, Adam moments, row-wise Adagrad sums, learning rate, half a metrics window: all come back."""
    settings = {"max_steps": 11, "log_every_steps": 1, "checkpoint_every_steps": 4}
    run_distributed(train, small_run(tmp_path / "whole", **settings), world_size=1, init=False)

    killed = small_run(tmp_path / "killed", **settings)
    (outcome,) = outcomes_of(train_and_die, killed, 7, world_size=1, init=False)
    assert not outcome.ok
    killed.trainer.resume = "auto"
    (summary,) = run_distributed(train, killed, world_size=1, init=False)

    assert summary.steps == 11
    assert summary.samples == 11 * 8
    resumed = records(tmp_path / "killed")
    assert [record["step"] for record in resumed] == list(range(1, 12))  # steps 5 to 7 of the killed run are dropped
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")  # to the last bit
    assert records(tmp_path / "killed", "eval")[-1]["tasks"] == records(tmp_path / "whole", "eval")[-1]["tasks"]


def test_a_metrics_window_survives_a_checkpoint_in_its_middle(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "log_every_steps": 6, "checkpoint_every_steps": 4, "final_eval": False}
    run_distributed(train, small_run(tmp_path / "whole", **settings), world_size=1, init=False)
    shorter = small_run(tmp_path / "resumed", **{**settings, "checkpoint_every_steps": 4})
    (outcome,) = outcomes_of(train_and_die, shorter, 6, world_size=1, init=False)
    assert not outcome.ok
    shorter.trainer.resume = "auto"
    run_distributed(train, shorter, world_size=1, init=False)
    whole, resumed = records(tmp_path / "whole")[-1], records(tmp_path / "resumed")[-1]
    assert resumed["loss"] == whole["loss"]
    assert resumed["tasks"] == whole["tasks"]


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "row_wise"), (1, "table_wise")), ((1, "table_wise"), (2, "data_parallel"))],
    ids=["two-to-one", "one-to-two"],
)
def test_a_run_goes_on_under_another_plan_and_number_of_ranks(
    tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    def config(ranks: int, sharding: str, steps: int, resume: str):
        c = small_run(tmp_path / "run", max_steps=steps, resume=resume, checkpoint_every_steps=3)
        c.model.dropout = 0.0  # the number of ranks decides over the masks
        c.optimizer.dense.warmup_steps = 0
        c.optimizer.dense.final_lr_ratio = 1.0  # the schedule must not depend on where the run stops
        return replace(c, data=small_data(batch_size=8 // ranks), sharding=plan(sharding))

    whole = replace(config(1, "table_wise", 6, "never"), paths=small_run(tmp_path / "whole").paths)
    run_distributed(train, whole, world_size=1, init=False)
    run_distributed(train, config(*before, 3, "never"), world_size=before[0], init=False)
    summaries = run_distributed(train, config(*after, 6, "auto"), world_size=after[0], init=False)
    assert summaries[0].samples == 6 * 8  # the data went on where it stopped
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_resumed_run_obeys_its_own_learning_rates(tmp_path: Path) -> None:
    config = small_run(tmp_path, max_steps=2, checkpoint_every_steps=2, final_eval=False)
    run_distributed(train, config, world_size=1, init=False)
    config.trainer.max_steps, config.trainer.resume = 4, "auto"
    config.optimizer.dense.lr = config.optimizer.sparse.lr = 0.0
    run_distributed(train, config, world_size=1, init=False)
    assert [record["lr"] > 0 for record in records(tmp_path)] == [True, True, False, False]
    before, after = (TrainState(model=small_task(config)) for _ in range(2))
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    for state, step in ((before, 2), (after, 4)):
        checkpointer.restore(state, tmp_path / "checkpoints" / f"step_{step:08d}", strict_optimizer=False)
    moved = [
        name
        for (name, old), new in zip(before.model.named_parameters(), after.model.parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert moved == []  # neither tables nor dense parameters move at a rate of zero


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    config = small_run(tmp_path, max_steps=2, final_eval=False)
    run_distributed(train, config, world_size=1, init=False)
    summary, metrics = (tmp_path / "summary.json").read_text(), (tmp_path / "metrics.jsonl").read_text()
    config.trainer.resume = "auto"
    assert run_distributed(train, config, world_size=2, init=False) == [None, None]
    assert (tmp_path / "summary.json").read_text() == summary
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    config = small_run(tmp_path, max_steps=2, resume="auto", final_eval=False)
    (summary,) = run_distributed(train, config, world_size=1, init=False)
    assert summary.steps == 2
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_a_run_directory_in_use_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    for outcome in outcomes_of(train, small_run(tmp_path), world_size=2, init=False, timeout=60):
        assert outcome.error_type == "ConfigMistake", outcome.describe()
        assert "already holds a run: go on with it (trainer.resume=auto)" in str(outcome.error_message)


def test_a_checkpoint_that_isnt_there_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "nothing_here").mkdir()
    config = small_run(tmp_path / "run", resume=str(tmp_path / "nothing_here"))
    for outcome in outcomes_of(train, config, world_size=2, init=False, timeout=60):
        assert outcome.error_type == "ConfigMistake", outcome.describe()
        assert "nothing_here" in str(outcome.error_message)
