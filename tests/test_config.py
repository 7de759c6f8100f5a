"""Every configuration composes, and a mistake ends with what is allowed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.training import BenchmarkRun, register_benchmark
from recsys.attention import BackendName
from recsys.config import ConfigMistake, TrainConfig, describe, load
from recsys.models.config import MixerKind
from recsys.sharding import ShardingKind
from recsys.training.build import build_parts
from recsys.training.distributed import choose_device

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
GROUPS = ["attention", "data", "debug", "experiment", "model", "optimizer", "sharding", "trainer"]
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]


def composed(*overrides: str, root: str = "train") -> TrainConfig:
    register_benchmark()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return load(compose(root, list(overrides)))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_survives_its_own_checks(choice: str) -> None:
    config = composed(choice)
    group, name = choice.split("=")
    if group in ("model", "sharding"):
        assert getattr(config, group).name == name
    if group == "attention":
        assert config.attention.backend is BackendName(name)
    if group == "optimizer":
        assert config.optimizer.sparse.name.value == name


@pytest.mark.parametrize(
    "choice", [c for c in CHOICES if c.split("=")[0] in ("model", "data", "experiment", "debug", "sharding")]
)
def test_every_choice_makes_a_model_here(choice: str) -> None:
    """Tables are on the meta device, so that even `large` is cheap; the dense part is cut to two layers."""
    layers = [] if "mean" in choice else ["model.num_layers=2"]
    config = composed(choice, *layers, "data.batch_size=2")
    parts = build_parts(config, choose_device(config.trainer.device), world_size=2)
    assert parts.schema.tasks == ("click", "like")


def test_compiled_blocks_without_a_compiler_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = composed("model=tiny", "model.compiled=true", "data.batch_size=2")
    with pytest.raises(ValueError, match=r"compiled=true needs a C\+\+ compiler .* no-such-compiler can't be found"):
        build_parts(config, torch.device("cpu"), world_size=2)
    build_parts(config, torch.device("cuda" if torch.cuda.is_available() else "meta"), world_size=2)


def test_the_root_of_the_benchmark_composes() -> None:
    config = composed("benchmark.attention=[sdpa]", "model=tiny", root="benchmark")
    assert isinstance(config, BenchmarkRun)
    assert config.benchmark.attention == ["sdpa"]
    assert config.data.cycle_batches > 0  # its default experiment measures throughput


def test_overrides_from_the_readme_reach_their_place() -> None:
    config = composed(
        "model=small",
        "attention=jagged_flash",
        "sharding=row_wise",
        "data.history.mean=500",
        "trainer.max_steps=200",
        "model.mixer=mean_pool",
        "+model.embedding_dims.item=64",
        "+sharding.tables.item={sharding_type: column_wise}",
        "+sharding.tables.action.sharding_type=table_wise",
    )
    assert config.model.width == 256
    assert config.model.mixer is MixerKind.mean_pool
    assert config.model.embedding_dims == {"item": 64}
    assert config.attention.backend is BackendName.jagged_flash
    assert config.sharding.sequence.sharding_type is ShardingKind.row_wise
    assert config.sharding.tables["item"].sharding_type is ShardingKind.column_wise
    assert config.sharding.tables["action"].sharding_type is ShardingKind.table_wise
    assert config.data.history.mean == 500  # type: ignore[attr-defined]
    assert config.trainer.max_steps == 200


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=3", ["did you mean 'width'", "allowed keys are: name, embedding_dim"]),
        ("data.history.men=3", ["did you mean 'mean'", "mean, max, sigma, empty_fraction"]),
        ("tranier.max_steps=3", ["allowed keys are: name, seed, model"]),
        ("model.width=wide", ["'wide'", "Integer", "model.width"]),
        ("model.mixer=max", ["expected one of [attention, target, mean_pool]"]),
        ("attention=flash", ["auto", "dense", "jagged", "jagged_flash", "sdpa", "varlen"]),
        ("sharding.sequence.sharding_type=rows", ["table_wise, row_wise, column_wise"]),
        ("+sharding.tables.item.sharding_type=rows", ["sharding.tables.item.sharding_type is rows", "row_wise"]),
        ("+sharding.tables.item.type=row_wise", ["allowed are the keys sharding_type, compute_kernel"]),
        ("model.width=0", ["model.width is 0: allowed are values >= 1"]),
        ("data.batch_size=0", ["data.batch_size is 0", "1 or more"]),
        ("trainer.profile_steps=[3]", ["trainer.profile_steps is [3]", "[first, last]"]),
        ("trainer.eval_every_steps=0", ["trainer.eval_every_steps is 0: allowed are null and values >= 1"]),
        ("optimizer.sparse.name=lamb", ["rowwise_adagrad, adagrad, adam, sgd"]),
        ("optimizer.dense.clip_norm=0", ["optimizer.dense.clip_norm is 0"]),
        ("trainer.profile_steps=[90,700]", ["2 <= first <= last <= trainer.max_steps"]),
        ("trainer.resume=Auto", ["trainer.resume is 'Auto'", "never, auto and the path of a checkpoint"]),
        ("model.head_widths=[-1]", ["model.head_widths is -1: allowed are values >= 1"]),
        ("optimizer.dense.lr=nan", ["optimizer.dense.lr is nan: allowed are values >= 0"]),
        ("optimizer.dense.betas=[1.0,0.9]", ["betas holds 1.0: allowed are 0 <= beta < 1"]),
        ("attention.window=0", ["attention.window is 0: allowed are null and integers >= 1"]),
    ],
)
def test_a_mistake_is_answered_with_what_is_allowed(override: str, words: list[str]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra, OmegaConf and our own checks each have theirs
        composed(override)
    message = describe(caught.value)  # type: ignore[arg-type]
    for word in words:
        assert word in message


def test_mean_pooling_refuses_what_only_attention_has() -> None:
    with pytest.raises(ConfigMistake, match="mean_pool has neither window nor dropout"):
        composed("model.mixer=mean_pool", "attention.window=4")


def test_target_attention_has_no_window() -> None:
    assert composed("experiment=target_attention").model.mixer is MixerKind.target
    with pytest.raises(ConfigMistake, match="target has no window"):
        composed("model.mixer=target", "attention.window=4")


def run_train(*overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "train.py", *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_train_py_ends_on_a_mistake_with_one_message() -> None:
    done = run_train("model.widht=3")
    assert done.returncode == 1
    assert "configuration error" in done.stderr
    assert "did you mean 'width'" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_py_shows_the_composed_config() -> None:
    done = run_train("model=small", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    shown = OmegaConf.create(done.stdout)
    assert shown.model.width == 256
