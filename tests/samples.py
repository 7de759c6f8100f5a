"""Small batches and models that several test modules share."""

from collections.abc import Sequence

import torch
from torch import nn

from data.batch import Batch, make_batch
from data.config import CandidatesConfig, ContextFeatureConfig, HistoryConfig, SyntheticConfig
from data.schema import Feature, Schema
from recsys.attention import AttentionBackend, MaskSpec, resolve
from recsys.embeddings import PooledEmbeddings, SequenceEmbeddings
from recsys.models.config import ModelConfig
from recsys.models.ranking import RankingModel, RankingTask, table_dims

SCHEMA = Schema(
    history=(Feature("item_id", "item"), Feature("action", "action")),
    candidates=(Feature("candidate_item_id", "item"),),
    context=(Feature("country", "country"),),
    tables={"item": 50, "action": 4, "country": 5},
    num_dense=3,
    tasks=("click", "like"),
)


def batch_of(history_lengths: Sequence[int], candidate_lengths: Sequence[int], seed: int = 0) -> Batch:
    """A batch of `SCHEMA` with these lengths and random everything else."""
    generator = torch.Generator().manual_seed(seed)

    def ids(table: str, count: int) -> torch.Tensor:
        return torch.randint(SCHEMA.tables[table], (count,), generator=generator)

    lengths = torch.tensor(history_lengths, dtype=torch.int64)
    num_history, num_candidates, num_users = int(lengths.sum()), sum(candidate_lengths), len(history_lengths)
    gaps = torch.randint(1, 5000, (num_history,), generator=generator)
    time = 1_000_000 + gaps.cumsum(0)
    context_lengths = torch.randint(0, 3, (num_users,), generator=generator)
    return make_batch(
        SCHEMA,
        history={"item_id": ids("item", num_history), "action": ids("action", num_history)},
        history_lengths=lengths,
        history_time=time,
        request_time=torch.full((num_users,), 1_000_000 + int(gaps.sum()) + 60),
        candidates={"candidate_item_id": ids("item", num_candidates)},
        candidate_lengths=torch.tensor(candidate_lengths, dtype=torch.int64),
        context={"country": (ids("country", int(context_lengths.sum())), context_lengths)},
        dense=torch.randn(num_users, SCHEMA.num_dense, generator=generator),
        labels=torch.randint(0, 2, (num_candidates, 2), generator=generator).float(),
        true_probs=torch.rand(num_candidates, 2, generator=generator),
    )


def small_model(
    config: ModelConfig,
    backend: AttentionBackend | None = None,
    *,
    mask: MaskSpec | None = None,
    schema: Schema = SCHEMA,
    seed: int = 0,
) -> RankingTask:
    """An unsharded model with its tables on the CPU."""
    torch.manual_seed(seed)
    dims = table_dims(config, schema)
    model = RankingModel(
        config,
        schema,
        backend=backend or resolve("dense", "cpu"),
        attention_dropout=0.0,
        mask=mask or MaskSpec(),
        autocast_dtype=None,
        sequence_embeddings=SequenceEmbeddings(schema, dims),
        context_embeddings=PooledEmbeddings(schema, dims),
    )
    for tables in (model.sequence_embeddings, model.context_embeddings):
        tables.to_empty(device="cpu")
        for parameter in tables.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return RankingTask(model)


def small_model_config(**changes: object) -> ModelConfig:
    """A model that takes milliseconds."""
    sizes: dict[str, object] = {
        "embedding_dim": 8,
        "width": 16,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 16,
        "ffn_width": 24,
        "max_history": 32,
        "context_width": 8,
        "cross_layers": 1,
        "cross_rank": 4,
        "head_widths": [8],
    }
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def small_data(**changes: object) -> SyntheticConfig:
    """Synthetic users that take milliseconds."""
    sizes: dict[str, object] = {
        "batch_size": 8,
        "num_items": 60,
        "num_categories": 6,
        "num_train_users": 10_000,
        "num_eval_users": 21,
        "history": HistoryConfig(mean=6, max=12, sigma=0.7, empty_fraction=0.1),
        "candidates": CandidatesConfig(min=1, max=3),
        "context": [ContextFeatureConfig("country", 5, 0, 2)],
        "num_dense": 3,
    }
    return SyntheticConfig(**{**sizes, **changes})  # type: ignore[arg-type]
