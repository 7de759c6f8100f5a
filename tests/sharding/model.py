"""A model small enough to check by hand, its batches, and the same training written out without TorchRec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from data.schema import Feature, Schema
from recsys.embeddings import (
    PooledEmbeddings,
    SequenceEmbeddings,
    SparseOptimizerConfig,
    SparseOptimizerName,
    merge_features,
)

SCHEMA = Schema(
    history=(Feature("item_id", "item"), Feature("category_id", "category"), Feature("action", "action")),
    candidates=(Feature("candidate_item_id", "item"), Feature("candidate_category_id", "category")),
    context=(Feature("country", "country"), Feature("device", "device")),
    tables={"item": 37, "category": 11, "action": 5, "country": 13, "device": 6},
    num_dense=0,
    tasks=("click",),
)
DIMS = {"item": 16, "category": 16, "action": 8, "country": 8, "device": 4}
User = dict[str, list[int]]
"""Ids by key."""
TOKENS_PER_STEP = 64.0
"""What the summed loss is divided by; any constant will do."""


@dataclass
class TinyBatch(Pipelineable):
    """Only the sparse part of a batch."""

    sequences: KeyedJaggedTensor
    context: KeyedJaggedTensor

    def to(self, device: torch.device, non_blocking: bool = False) -> TinyBatch:
        return TinyBatch(self.sequences.to(device, non_blocking), self.context.to(device, non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.sequences.record_stream(stream)
        self.context.record_stream(stream)

    def pin_memory(self) -> TinyBatch:
        return TinyBatch(self.sequences.pin_memory(), self.context.pin_memory())


class Head(nn.Module):
    """A sum over all looked-up rows of something that isn't linear, with dense parameters."""

    def __init__(self, dims: dict[str, int]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                feature.name: nn.Parameter(torch.linspace(-1.0, 1.5, dims[feature.table]) * (0.5 + 0.1 * i))
                for i, feature in enumerate((*SCHEMA.sequences, *SCHEMA.context))
            }
        )

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [torch.tanh(features[name] @ weight + 0.3).sum() for name, weight in self.weights.items()]
        ).sum()


class TinyModel(nn.Module):
    """Tables at the top, as TorchRec's pipelines want it; returns the loss and the looked-up rows."""

    def __init__(self, dims: dict[str, int] | None = None, loss_scale: float = 1.0) -> None:
        super().__init__()
        dims = dims or DIMS
        self.sequence_embeddings = SequenceEmbeddings(SCHEMA, dims)
        self.context_embeddings = PooledEmbeddings(SCHEMA, dims)
        self.readout = Readout(dims, loss_scale)

    def forward(self, batch: TinyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = self.sequence_embeddings(batch.sequences)
        context = self.context_embeddings(batch.context)
        return self.readout(sequences, context, batch.context.stride())


class Readout(nn.Module):
    def __init__(self, dims: dict[str, int], loss_scale: float) -> None:
        super().__init__()
        self.head = Head(dims)
        self.loss_scale = loss_scale

    def forward(self, sequences: list, context: list, num_users: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = merge_features(sequences) | merge_features(context, num_users)
        return self.head(features) * self.loss_scale / TOKENS_PER_STEP, features


def jagged(features: tuple[Feature, ...], per_user: list[User]) -> KeyedJaggedTensor:
    """A host KJT from ids by user and key, with stride 0 for no users."""
    keys = [feature.name for feature in features]
    ids = [user[key] for key in keys for user in per_user]
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.tensor([i for row in ids for i in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for row in ids], dtype=torch.int64),
        stride=len(per_user),
    )


def make_users(num_users: int, seed: int, max_history: int = 6) -> list[User]:
    """Histories of 0 to `max_history` events, 1 to 3 candidates, context features of 0 to 2 ids."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    users = []
    for _ in range(num_users):
        num_events, num_candidates = draw(max_history + 1, 1)[0], 1 + draw(3, 1)[0]
        user = {f.name: draw(SCHEMA.tables[f.table], num_events) for f in SCHEMA.history}
        user |= {f.name: draw(SCHEMA.tables[f.table], num_candidates) for f in SCHEMA.candidates}
        user |= {f.name: draw(SCHEMA.tables[f.table], draw(3, 1)[0]) for f in SCHEMA.context}
        users.append(user)
    return users


def step_users() -> list[list[list[User]]]:
    """Users by step and rank, of two ranks: even, empty, one-user and history-less batches."""
    return [
        [make_users(3, seed=1), make_users(2, seed=2)],
        [make_users(4, seed=3), []],
        [make_users(1, seed=4), make_users(3, seed=5, max_history=0)],
        [[], make_users(2, seed=6)],
        [[], []],
        [make_users(2, seed=7), make_users(2, seed=8)],
    ]


def batch_of(users: list[User]) -> TinyBatch:
    return TinyBatch(jagged(SCHEMA.sequences, users), jagged(SCHEMA.context, users))


def initial_tables() -> dict[str, Tensor]:
    """Weights to start every plan from."""
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(rows, DIMS[name], generator=generator) * 0.3 for name, rows in SCHEMA.tables.items()}


@dataclass
class Trained:
    """What a training leaves: tables, dense parameters, and the rows looked up at every step."""

    tables: dict[str, Tensor]
    dense: dict[str, Tensor]
    forward: list[dict[str, Tensor]]


def train_reference(
    optimizer: SparseOptimizerConfig, blocks: dict[str, list[int]], dense_lr: float, pooling: str = "mean"
) -> Trained:
    """Train on the union of all ranks' batches in plain PyTorch.

    `blocks`: column widths of a table's shards. Row-wise Adagrad keeps one number per row and shard, so
    they matter.
    """
    weights = {name: table.clone().requires_grad_() for name, table in initial_tables().items()}
    head = Head(DIMS)
    update = _Updater(optimizer, weights, blocks)
    forward = []
    for ranks in step_users():
        users = [user for rank in ranks for user in rank]
        features = _look_up(weights, users, pooling)
        forward.append({key: value.detach().clone() for key, value in features.items()})
        loss = head(features) / TOKENS_PER_STEP
        loss.backward()
        update(users)
        with torch.no_grad():
            for parameter in head.parameters():
                assert parameter.grad is not None
                parameter.sub_(dense_lr * parameter.grad)
                parameter.grad = None
    tables = {name: weight.detach() for name, weight in weights.items()}
    return Trained(tables, {name: p.detach() for name, p in head.named_parameters()}, forward)


def _look_up(weights: dict[str, Tensor], users: list[User], pooling: str) -> dict[str, Tensor]:
    features = {}
    for feature in SCHEMA.sequences:
        ids = torch.tensor([i for user in users for i in user[feature.name]], dtype=torch.int64)
        features[feature.name] = F.embedding(ids, weights[feature.table])
    pool: Callable[[Tensor], Tensor] = (lambda x: x.mean(0)) if pooling == "mean" else (lambda x: x.sum(0))
    for feature in SCHEMA.context:
        table = weights[feature.table]
        rows = [
            pool(F.embedding(torch.tensor(user[feature.name]), table))
            if user[feature.name]
            else torch.zeros(table.shape[1])
            for user in users
        ]
        features[feature.name] = torch.stack(rows) if rows else table[:0]
    return features


class _Updater:
    """Each rule once more, row by row over the ids that were looked up."""

    def __init__(self, config: SparseOptimizerConfig, weights: dict[str, Tensor], blocks: dict[str, list[int]]) -> None:
        self.config, self.weights, self.blocks = config, weights, blocks
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.step = 0

    @torch.no_grad()
    def __call__(self, users: list[User]) -> None:
        self.step += 1
        for name, weight in self.weights.items():
            readers = [f.name for f in (*SCHEMA.sequences, *SCHEMA.context) if f.table == name]
            gradient = weight.grad
            for row in sorted({i for user in users for key in readers for i in user[key]}):
                assert gradient is not None
                weight[row] -= self._delta(name, row, gradient[row])
            weight.grad = None

    def _delta(self, name: str, row: int, g: Tensor) -> Tensor:
        c, m, v = self.config, self.first[name][row], self.second[name][row]
        if c.name is SparseOptimizerName.sgd:
            return c.lr * g
        if c.name is SparseOptimizerName.adam:
            m.mul_(c.betas[0]).add_(g, alpha=1 - c.betas[0])
            v.mul_(c.betas[1]).addcmul_(g, g, value=1 - c.betas[1])
            m_hat, v_hat = m / (1 - c.betas[0] ** self.step), v / (1 - c.betas[1] ** self.step)
            return c.lr * (m_hat / (v_hat.sqrt() + c.eps) + c.weight_decay * self.weights[name][row])
        if c.name is SparseOptimizerName.adagrad:
            v.add_(g * g)
        else:
            for part, part_v in zip(g.split(self.blocks[name]), v.split(self.blocks[name]), strict=True):
                part_v.add_(part.square().mean())
        return c.lr * g / (v.sqrt() + c.eps)
