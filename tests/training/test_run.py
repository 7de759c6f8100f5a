"""Whole runs: what they write, that ranks and backends agree, what happens when something is not finite."""

import importlib.metadata
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from recsys.attention import AttentionConfig, BackendName
from recsys.training.metrics import TaskQuality
from recsys.training.pipeline import NonFinite, PipelineKind
from tests.conftest import INTERPRETED
from tests.distributed import outcomes_of, run_distributed
from tests.samples import small_data, small_model_config
from tests.training.runs import losses, plan, records, small_run, train, train_on_spoilt_data

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
RANKS = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="gloo"), pytest.param("cuda", marks=pytest.mark.multi_gpu, id="nccl")]
)


def backend_of(device: str) -> str:
    return "nccl" if device == "cuda" else "gloo"


@DEVICES
def test_a_run_writes_everything_down(tmp_path: Path, device: str) -> None:
    config = small_run(tmp_path, device, max_steps=8, log_every_steps=3, eval_every_steps=5, checkpoint_every_steps=4)
    config.model.max_history = 4  # shorter than the data's longest history
    (summary,) = run_distributed(train, config, world_size=1, backend=backend_of(device), init=False)

    assert {p.name for p in tmp_path.iterdir()} == {
        "config.yaml",
        "plan.txt",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "checkpoints",
    }
    assert list((tmp_path / "tensorboard").iterdir())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000008"]
    assert "item" in (tmp_path / "plan.txt").read_text()
    assert [record["step"] for record in records(tmp_path)] == [3, 6, 8]  # the last step is always logged
    assert [record["step"] for record in records(tmp_path, "eval")] == [5, 8]

    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["samples"] == summary.samples == 8 * 8
    assert written["samples_per_second"] > 0
    assert written["tokens_per_second"] > written["candidates_per_second"] > 0
    assert written["step_ms_p90"] >= written["step_ms_p50"] > 0
    assert written["peak_host_mib_per_rank"][0] > 100
    assert (written["peak_device_mib_per_rank"][0] > 0) == (device == "cuda")
    assert written["truncated_users"] > 0
    assert written["truncated_events"] >= written["truncated_users"]
    assert written["environment"]["torch"] == importlib.metadata.version("torch")
    assert set(written["eval"]) == {"click", "like"}
    for quality in summary.eval.values():
        assert isinstance(quality, TaskQuality)
        assert 0 < quality.best_ne < quality.ne
    table = summary.table()
    for word in ("QPS", "held-out", "best AUC", "click"):
        assert word in table


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, each with half the batch of a run on one."""
    run_dir = tmp_path_factory.mktemp("two")
    config = small_run(run_dir)
    config.model.dropout = 0.0  # ranks draw different masks
    config = replace(config, data=small_data(batch_size=4), sharding=plan("row_wise"))
    first, second = run_distributed(train, config, world_size=2, init=False)
    assert first.samples_per_second == second.samples_per_second  # global figures
    assert first.eval == second.eval
    return run_dir


def test_two_ranks_learn_what_one_learns(two_ranks: Path, tmp_path: Path) -> None:
    config = small_run(tmp_path)
    config.model.dropout = 0.0
    run_distributed(train, config, world_size=1, init=False)
    assert losses(tmp_path) == pytest.approx(losses(two_ranks), rel=1e-4)
    # 21 held-out users in batches of 8, or twice 4: the last batches are short on one rank and empty on the other.
    (alone,), (together,) = records(tmp_path, "eval"), records(two_ranks, "eval")
    assert alone["samples"] == together["samples"] == 21
    for task in ("click", "like"):
        for name, value in alone["tasks"][task].items():
            assert together["tasks"][task][name] == pytest.approx(value, rel=2e-3), (task, name)


@DEVICES
def test_backends_agree_on_the_first_losses(tmp_path: Path, device: str) -> None:
    names = ["dense", "sdpa"]
    if device == "cuda":
        names += ["varlen", "jagged", "jagged_flash"]
    elif INTERPRETED:
        names += ["jagged", "jagged_flash"]
    by_backend = {}
    for name in names:
        config = small_run(tmp_path / name, device, max_steps=3, final_eval=False, final_checkpoint=False)
        config = replace(
            config,
            model=small_model_config(),
            data=small_data(batch_size=4),
            attention=AttentionConfig(backend=BackendName(name)),
        )
        run_distributed(train, config, world_size=1, backend=backend_of(device), init=False)
        by_backend[name] = losses(tmp_path / name)
    for name in names:
        tolerance = 5e-3 if device == "cuda" else 1e-5  # bf16 autocast on CUDA
        assert by_backend[name] == pytest.approx(by_backend["dense"], rel=tolerance), name


@DEVICES
def test_compiled_blocks_learn_the_same(tmp_path: Path, device: str) -> None:
    by_compiled = {}
    for compiled in (False, True):
        run_dir = tmp_path / str(compiled)
        config = small_run(run_dir, device, max_steps=4, final_eval=False, final_checkpoint=False, timeout_minutes=5.0)
        config = replace(config, model=small_model_config(compiled=compiled))
        run_distributed(train, config, world_size=1, backend=backend_of(device), init=False)
        by_compiled[compiled] = losses(run_dir)
    assert len(by_compiled[True]) == 4
    assert by_compiled[True] == pytest.approx(by_compiled[False], rel=5e-3 if device == "cuda" else 1e-5)


@DEVICES
def test_the_pipelines_agree(tmp_path: Path, device: str) -> None:
    for kind in PipelineKind:
        config = small_run(tmp_path / kind.value, device, pipeline=kind, eval_every_steps=2, final_checkpoint=False)
        run_distributed(train, config, world_size=1, backend=backend_of(device), init=False)
    tolerance = 1e-3 if device == "cuda" else 1e-12
    assert losses(tmp_path / "base") == pytest.approx(losses(tmp_path / "sparse_dist"), rel=tolerance)


@RANKS
def test_a_loss_that_is_not_finite_stops_every_rank_and_says_where(tmp_path: Path, device: str) -> None:
    config = small_run(tmp_path, device, max_steps=9, log_every_steps=5)
    outcomes = outcomes_of(train_on_spoilt_data, config, "nan", 3, world_size=2, backend=backend_of(device), init=False)
    for outcome in outcomes:
        assert outcome.error_type == "NonFiniteLossError", outcome.describe()
        assert "first not finite at step 3 on rank 1" in str(outcome.error_message)
    assert not list((tmp_path / "checkpoints").glob("step_*"))


@RANKS
def test_a_loss_that_is_not_finite_can_be_skipped(tmp_path: Path, device: str) -> None:
    config = small_run(tmp_path, device, non_finite=NonFinite.skip)
    summaries = run_distributed(
        train_on_spoilt_data, config, "nan", 3, world_size=2, backend=backend_of(device), init=False
    )
    assert [summary.skipped_steps for summary in summaries] == [1, 1]
    seen = losses(tmp_path)
    assert [loss is not None for loss in seen] == [True, True, False, True, True, True]
    assert all(math.isfinite(quality.auc) for quality in summaries[0].eval.values())


def test_skipping_ends_when_nothing_else_happens(tmp_path: Path) -> None:
    """A model whose every loss is NaN is lost: the run must not go on to its end and save it."""
    config = small_run(tmp_path, max_steps=20, non_finite=NonFinite.skip, max_skipped_in_a_row=3)
    for outcome in outcomes_of(train_on_spoilt_data, config, "nan", 0, world_size=2, init=False, timeout=60):
        assert outcome.error_type == "NonFiniteLossError", outcome.describe()
        assert "in 4 steps in a row, up to step 4" in str(outcome.error_message)
    assert not list((tmp_path / "checkpoints").glob("step_*"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail)["loss"] is None  # JSON has no NaN


def test_the_operation_behind_a_nan_gradient_is_named(tmp_path: Path) -> None:
    config = small_run(tmp_path, detect_anomaly=True)
    (outcome,) = outcomes_of(train_on_spoilt_data, config, "inf", 2, world_size=1, init=False, timeout=60)
    assert "returned nan values" in str(outcome.error_message), outcome.describe()
    assert "Backward" in str(outcome.error_message)


def test_a_bad_id_on_one_rank_ends_the_run_and_names_it(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    outcomes = outcomes_of(train_on_spoilt_data, config, "id", 2, world_size=2, init=False, timeout=60)
    message = str(outcomes[1].error_message)
    assert "item_id" in message
    assert "1000000000" in message
    assert "60" in message  # rows of the table
    assert not outcomes[0].ok  # it must not go on alone


def test_what_cant_be_had_is_refused_on_every_rank(tmp_path: Path) -> None:
    config = replace(small_run(tmp_path), attention=AttentionConfig(backend=BackendName.varlen))
    bad_plan = replace(small_run(tmp_path), sharding=plan("table_wise", pooled="row_wise"))
    for wrong, words in ((config, "'varlen' can't run on cpu"), (bad_plan, "sharding_type=row_wise can't be had")):
        for outcome in outcomes_of(train, wrong, world_size=2, init=False, timeout=60):
            assert outcome.error_type == "ConfigMistake", outcome.describe()
            assert words in str(outcome.error_message)
            assert "sdpa" in str(outcome.error_message) or "table_wise" in str(outcome.error_message)
