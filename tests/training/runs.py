"""Small training runs, as functions that a worker process can be given."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from data.batch import Batch
from data.sources import build_source
from data.synthetic import SyntheticSource
from recsys.attention import AttentionConfig, BackendName
from recsys.config import TrainConfig
from recsys.models.ranking import RankingTask
from recsys.sharding import ShardingConfig, ShardingKind, TableSharding
from recsys.training.config import PathsConfig, TrainerConfig
from recsys.training.distributed import DeviceKind
from recsys.training.optimizer import DenseOptimizerConfig, OptimizerConfig
from recsys.training.run import run
from recsys.training.summary import Summary
from recsys.training.trainer import Trainer
from tests.samples import small_data, small_model, small_model_config


def small_run(run_dir: Path, device: str = "cpu", **trainer: Any) -> TrainConfig:
    """A run of a second or two that logs every step."""
    settings: dict[str, Any] = {"max_steps": 6, "log_every_steps": 1, "warmup_steps": 1, "timeout_minutes": 1.0}
    return TrainConfig(
        name="test",
        model=small_model_config(dropout=0.1),
        attention=AttentionConfig(backend=BackendName.auto if device == "cuda" else BackendName.sdpa),
        data=small_data(),
        optimizer=OptimizerConfig(dense=DenseOptimizerConfig(warmup_steps=3)),
        trainer=TrainerConfig(**{**settings, "device": DeviceKind(device), **trainer}),
        paths=PathsConfig(run_dir=str(run_dir)),
    )


def small_task(config: TrainConfig) -> RankingTask:
    """The unsharded model of a run, to look at what a checkpoint holds."""
    source = build_source(config.data)
    return small_model(config.model, schema=source.schema)


def plan(sequence: str, pooled: str = "table_wise") -> ShardingConfig:
    """A plan by the names of its sharding types."""
    return ShardingConfig(
        name=sequence,
        sequence=TableSharding(ShardingKind(sequence)),
        pooled=TableSharding(ShardingKind(pooled)),
    )


def train(rank: int, world_size: int, config: TrainConfig) -> Summary:
    """A run on this rank."""
    return run(config)


def train_and_die(rank: int, world_size: int, config: TrainConfig, last_step: int) -> None:
    """A run that the operating system kills right after it logged `last_step`."""
    log_window = Trainer.log_window

    def log_and_die(self: Trainer) -> None:
        log_window(self)
        if self.progress.step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.log_window = log_and_die  # type: ignore[method-assign]
    run(config)


def train_on_spoilt_data(rank: int, world_size: int, config: TrainConfig, spoil: str, call: int) -> Summary:
    """A run whose last rank gets something bad in its `call`-th batch: a NaN feature or an id outside its table."""
    make_batch, calls = SyntheticSource.batch, [0]

    def spoilt(self: SyntheticSource, split: str, users: Any) -> Batch:
        batch = make_batch(self, split, users)
        calls[0] += split == "train" and len(users) == config.data.batch_size
        if rank == world_size - 1 and (calls[0] == call or (call == 0 and split == "train")):
            if spoil == "nan":
                batch.labels[0, 1] = float("nan")
            elif spoil == "inf":
                batch.dense[0, 0] = float("inf")
            else:
                batch.sequences.values()[0] = 10**9
        return batch

    SyntheticSource.batch = spoilt  # type: ignore[method-assign]
    return run(config)


def records(run_dir: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def losses(run_dir: Path) -> list[float]:
    """The training loss of every logged step."""
    return [record["loss"] for record in records(run_dir)]


def cuda_count() -> int:
    """GPUs of this machine."""
    return torch.cuda.device_count()
