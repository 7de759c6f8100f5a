"""From a config to a model, checked on every rank before any of them waits for another."""

import os
import shutil
from dataclasses import dataclass

import numpy as np
import torch

from data.schema import Schema
from data.sources import Source, build_source
from recsys.attention import resolve
from recsys.attention.interface import AttentionBackend, MaskSpec, Request, usable_backends
from recsys.config import TrainConfig
from recsys.embeddings import PooledEmbeddings, SequenceEmbeddings
from recsys.models.config import MixerKind, Precision
from recsys.models.ranking import RankingModel, RankingTask, table_dims
from recsys.sharding import check_sharding


@dataclass(frozen=True)
class Parts:
    """What a run is made of before anything is distributed.

    Attributes:
        source: makes or reads users.
        task: model and loss; dense parameters are real, tables are on the meta device.
        backend: computes attention.
        mask: who sees whom, without the candidates of a batch.
    """

    source: Source
    task: RankingTask
    backend: AttentionBackend
    mask: MaskSpec

    @property
    def schema(self) -> Schema:
        """Features, tables and tasks of the data."""
        return self.source.schema


def build_parts(config: TrainConfig, device: torch.device, world_size: int) -> Parts:
    """Build source and model and check every choice against this device; no collective.

    Raises:
        ValueError: an attention backend, a precision, a compiler, a sharding or an embedding that can't be had here;
            every rank raises the same one.
    """
    source = build_source(config.data)
    autocast_dtype = _autocast_dtype(config.model.precision, device)
    backend = resolve(config.attention.backend, device)
    mask = MaskSpec(causal=config.attention.causal, window=config.attention.window)
    if config.model.mixer is not MixerKind.mean_pool:
        _check_attention(config, backend, mask, device, autocast_dtype or torch.float32)
    if config.model.compiled:
        _check_compiler(device)
    dims = table_dims(config.model, source.schema)
    with torch.device(device):
        model = RankingModel(
            config.model,
            source.schema,
            backend=backend,
            attention_dropout=config.attention.dropout,
            mask=mask,
            autocast_dtype=autocast_dtype,
            sequence_embeddings=SequenceEmbeddings(source.schema, dims),
            context_embeddings=PooledEmbeddings(source.schema, dims),
        )
    check_sharding(model, config.sharding, device.type, world_size, config.optimizer.sparse)
    return Parts(source, RankingTask(model), backend, mask)


def _autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    if precision is Precision.bf16 or (precision is Precision.auto and device.type == "cuda"):
        return torch.bfloat16
    return None


def _check_compiler(device: torch.device) -> None:
    """torch.compile looks for one in the first step, when other ranks may already be waiting for this one."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise ValueError(
            f"model.compiled=true needs a C++ compiler on a CPU, and {' or '.join(names)} can't be found (CXX names "
            "another); without one set model.compiled=false"
        )


def _check_attention(
    config: TrainConfig, backend: AttentionBackend, mask: MaskSpec, device: torch.device, dtype: torch.dtype
) -> None:
    """Ask the backend for the hardest call that training will make: with candidates at the end, or across."""
    if config.model.mixer is MixerKind.target:
        hardest = MaskSpec(causal=False)
    else:
        hardest = MaskSpec(mask.causal, mask.window, torch.ones(1, dtype=torch.int64), total_targets=1)
    request = Request(device, dtype, config.model.head_dim, hardest, config.attention.dropout)
    reason = backend.refuses(request)
    if reason is not None:
        raise ValueError(
            f"attention={backend.name} can't serve this configuration on {device.type}: {reason}. "
            f"Backends that can: {', '.join(usable_backends(request)) or 'none'}"
        )


def mean_lengths(source: Source, num_users: int = 256) -> dict[str, float]:
    """Ids per user by feature in the first users, for the sharding planner; alike on every rank."""
    count = min(num_users, source.num_users("train"))
    batch = source.batch("train", np.arange(count))
    return {
        key: length / count
        for jagged in (batch.sequences, batch.context)
        for key, length in zip(jagged.keys(), jagged.length_per_key(), strict=True)
    }
