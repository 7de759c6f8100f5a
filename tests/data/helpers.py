"""Small synthetic sources and plain-Python views of batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from data.batch import Batch
from data.config import CandidatesConfig, HistoryConfig, SyntheticConfig
from data.synthetic import SyntheticSource


def small_config(**changes: Any) -> SyntheticConfig:
    """A config of short histories; `changes` replace fields."""
    settings: dict[str, Any] = {
        "batch_size": 4,
        "num_items": 500,
        "num_train_users": 1000,
        "num_eval_users": 50,
        "history": HistoryConfig(mean=10, max=30, empty_fraction=0.1),
        "candidates": CandidatesConfig(1, 4),
    }
    return SyntheticConfig(**(settings | changes))


def small_source(**changes: Any) -> SyntheticSource:
    return SyntheticSource(small_config(**changes))


def rows(batch: Batch) -> list[dict[str, Any]]:
    """Everything a batch says of each user, as plain Python: what must not depend on how users are put together."""
    users: list[dict[str, Any]] = [{} for _ in range(batch.num_users)]

    def put(name: str, values: torch.Tensor, lengths: torch.Tensor) -> None:
        pieces = torch.split(values, lengths.tolist())
        for user, piece in zip(users, pieces, strict=True):
            user[name] = piece.tolist()

    for jagged in (batch.sequences, batch.context):
        pieces = torch.split(jagged.values(), jagged.length_per_key())
        lengths = jagged.lengths().view(len(jagged.keys()), -1)
        for i, key in enumerate(jagged.keys()):
            put(key, pieces[i], lengths[i][: batch.num_users])
    put("history_time", batch.history_time, batch.history_lengths)
    put("labels", batch.labels, batch.candidate_lengths)
    if batch.true_probs is not None:
        put("true_probs", batch.true_probs, batch.candidate_lengths)
    for user, time, dense in zip(users, batch.request_time, batch.dense, strict=True):
        user |= {"request_time": int(time), "dense": dense.tolist()}
    return users


def assert_equal(one: Batch, other: Batch) -> None:
    """Two batches hold the same tensors and counts."""
    for field in dataclasses.fields(Batch):
        x, y = getattr(one, field.name), getattr(other, field.name)
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), field.name
        elif field.name in ("sequences", "context"):
            assert x.keys() == y.keys()
            assert torch.equal(x.values(), y.values()), field.name
            assert torch.equal(x.lengths(), y.lengths()), field.name
            assert x.length_per_key() == y.length_per_key()
        else:
            assert x == y, field.name


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve by ranks; ties share their mean rank."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = labels > 0.5
    n, p = len(labels), positive.sum()
    return float((mean_rank[positive].sum() - p * (p + 1) / 2) / (p * (n - p)))
