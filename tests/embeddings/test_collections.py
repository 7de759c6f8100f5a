"""How a schema becomes collections, and the config of their optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import PoolingType

from recsys.embeddings import (
    PooledEmbeddings,
    SequenceEmbeddings,
    SparseOptimizerConfig,
    SparseOptimizerName,
    apply_sparse_optimizer,
    merge_features,
    tables_of,
)
from recsys.embeddings.collections import Pooling
from tests.sharding.model import DIMS, SCHEMA, TinyModel, batch_of, make_users


@torch.no_grad()
def on_cpu(module: nn.Module) -> nn.Module:
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    return module


def test_one_collection_per_dimension_and_stable_names() -> None:
    module = SequenceEmbeddings(SCHEMA, DIMS)
    assert set(module.state_dict()) == {
        "collections.dim_8.embeddings.action.weight",
        "collections.dim_16.embeddings.item.weight",
        "collections.dim_16.embeddings.category.weight",
    }
    assert all(parameter.is_meta for parameter in module.parameters())


def test_history_and_candidates_share_tables() -> None:
    tables = tables_of(TinyModel())
    assert tables["item"].features == ("item_id", "candidate_item_id")
    assert (tables["item"].rows, tables["item"].dim, tables["item"].pooled) == (37, 16, False)
    assert tables["country"].pooled
    assert set(tables) == set(SCHEMA.tables)


def test_sequence_features_come_back_one_row_per_token() -> None:
    module = on_cpu(SequenceEmbeddings(SCHEMA, DIMS))
    users = make_users(3, seed=1)
    features = merge_features(module(batch_of(users).sequences))
    assert set(features) == {feature.name for feature in SCHEMA.sequences}
    for feature in SCHEMA.sequences:
        dim = DIMS[feature.table]
        ids = torch.tensor([i for user in users for i in user[feature.name]])
        expected = ids.unsqueeze(1) * dim + torch.arange(dim)
        assert torch.equal(features[feature.name], expected.float())


@pytest.mark.parametrize("pooling", list(Pooling))
def test_pooled_features_come_back_one_row_per_user(pooling: Pooling) -> None:
    module = on_cpu(PooledEmbeddings(SCHEMA, DIMS, pooling=pooling))
    users = make_users(4, seed=2)
    features = merge_features(module(batch_of(users).context))
    for feature in SCHEMA.context:
        dim = DIMS[feature.table]
        table = torch.arange(SCHEMA.tables[feature.table] * dim).view(-1, dim).float()
        for user, row in zip(users, features[feature.name], strict=True):
            rows = table[user[feature.name]]
            expected = rows.sum(0) / (max(1, len(rows)) if pooling is Pooling.mean else 1)
            torch.testing.assert_close(row, expected)


def test_a_schema_without_context_has_no_pooled_collection() -> None:
    schema = type(SCHEMA)(SCHEMA.history, SCHEMA.candidates, (), SCHEMA.tables, 0, SCHEMA.tasks)
    module = PooledEmbeddings(schema, DIMS)
    assert module(batch_of(make_users(1, seed=1)).context) == []
    assert module.tables == ()


def test_pooling_reaches_the_tables() -> None:
    module = PooledEmbeddings(SCHEMA, DIMS, pooling=Pooling.sum)
    bags: Any = module.collections["bags"]
    assert {config.pooling for config in bags.embedding_bag_configs()} == {PoolingType.SUM}


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"item": 16}, r"no embedding dimension for table 'category'.*\['item'\]"),
        (DIMS | {"category": 6}, r"'category' has embedding dimension 6: allowed are multiples of 4"),
        (DIMS | {"item": 0}, "'item' has embedding dimension 0"),
    ],
)
def test_bad_dimensions(dims: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceEmbeddings(SCHEMA, dims)


def test_bad_init_std() -> None:
    with pytest.raises(ValueError, match=r"init_std is -1.0"):
        SequenceEmbeddings(SCHEMA, DIMS, init_std=-1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -0.1}, "optimizer.sparse.lr is -0.1"),
        ({"eps": -1.0}, "optimizer.sparse.eps"),
        ({"betas": (0.9, 1.0)}, "betas holds 1.0"),
        ({"weight_decay": 0.1}, "only adam decays weights"),
    ],
)
def test_bad_optimizer(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseOptimizerConfig(**values)


@pytest.mark.parametrize("name", list(SparseOptimizerName))
def test_every_table_is_marked_and_nothing_else(name: SparseOptimizerName) -> None:
    model = TinyModel()
    apply_sparse_optimizer(model, SparseOptimizerConfig(name=name))
    marked = {key for key, p in model.named_parameters() if hasattr(p, "_in_backward_optimizers")}
    assert marked == {key for key, p in model.named_parameters() if p.is_meta}
