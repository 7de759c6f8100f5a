"""`Batch`: consistent parts, truncation, the id policies, empty and one-user batches, moving between devices."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from data.batch import Batch, make_batch, make_jagged
from data.config import HistoryConfig, OutOfRangeIds
from data.schema import Feature, Schema
from tests.data.helpers import assert_equal, rows, small_source

SCHEMA = Schema(
    history=(Feature("item_id", "item"), Feature("action", "action")),
    candidates=(Feature("candidate_item_id", "item"),),
    context=(Feature("country", "country"),),
    tables={"item": 10, "action": 3, "country": 5},
    num_dense=2,
    tasks=("click",),
)


def parts(**changes):
    """Arguments of `make_batch` for two users with 2 and 1 events, 1 and 2 candidates."""
    arguments = {
        "history": {"item_id": [1, 2, 3], "action": [0, 1, 2]},
        "history_lengths": [2, 1],
        "history_time": [5, 6, 7],
        "request_time": [8, 9],
        "candidates": {"candidate_item_id": [4, 5, 6]},
        "candidate_lengths": [1, 2],
        "context": {"country": ([0, 4], [1, 1])},
        "dense": [[0.0, 1.0], [2.0, 3.0]],
        "labels": [[0.0], [1.0], [1.0]],
    }
    return arguments | changes


def test_offsets_lengths_and_host_integers_agree():
    batch = small_source().batch("train", np.arange(50))
    assert batch.num_users == 50
    assert batch.num_history == int(batch.history_lengths.sum()) == int(batch.history_offsets[-1])
    assert batch.num_candidates == int(batch.candidate_lengths.sum()) == int(batch.candidate_offsets[-1])
    assert batch.max_history == int(batch.history_lengths.max())
    assert batch.max_candidates == int(batch.candidate_lengths.max())
    assert torch.equal(batch.history_offsets.diff(), batch.history_lengths)
    assert torch.equal(batch.candidate_offsets.diff(), batch.candidate_lengths)
    lengths = batch.sequences.lengths().view(5, 50)
    assert all(torch.equal(row, batch.history_lengths) for row in lengths[:3])
    assert all(torch.equal(row, batch.candidate_lengths) for row in lengths[3:])
    for jagged in (batch.sequences, batch.context):
        totals = jagged.lengths().view(len(jagged.keys()), -1).sum(1).tolist()
        assert jagged.length_per_key() == totals
        assert jagged.offset_per_key() == [0, *np.cumsum(totals).tolist()]
        assert jagged.to_dict().keys() == set(jagged.keys())


def test_values_land_under_their_keys():
    batch = make_batch(SCHEMA, **parts())
    assert batch.sequences.keys() == ["item_id", "action", "candidate_item_id"]
    assert rows(batch) == [
        {
            "item_id": [1, 2],
            "action": [0, 1],
            "candidate_item_id": [4],
            "country": [0],
            "history_time": [5, 6],
            "labels": [[0.0]],
            "request_time": 8,
            "dense": [0.0, 1.0],
        },
        {
            "item_id": [3],
            "action": [2],
            "candidate_item_id": [5, 6],
            "country": [4],
            "history_time": [7],
            "labels": [[1.0], [1.0]],
            "request_time": 9,
            "dense": [2.0, 3.0],
        },
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": {"item_id": [1, 2, 3]}}, r"history has the keys \['item_id'\]; the schema wants"),
        (
            {"history": {"item_id": [1, 2], "action": [0, 1, 2]}},
            r"item_id has the shape \(2,\).* want \(3,\)",
        ),
        ({"candidates": {"candidate_item_id": [4]}}, r"candidate_item_id has the shape \(1,\).* want \(3,\)"),
        ({"context": {"country": ([0, 4], [1])}}, r"country lengths has the shape \(1,\).* want \(2,\)"),
        ({"context": {"country": ([0], [1, 1])}}, r"country has the shape \(1,\).* want \(2,\)"),
        ({"context": {"country": ([0], [2, -1])}}, "country lengths hold -1; allowed: 0 or more"),
        ({"history_lengths": [4, -1]}, "history lengths hold -1; allowed: 0 or more"),
        ({"candidate_lengths": [4, -1]}, "candidate lengths hold -1; allowed: 0 or more"),
        ({"history_time": [5]}, r"history_time has the shape \(1,\).* want \(3,\)"),
        ({"request_time": [5]}, r"request_time has the shape \(1,\).* want \(2,\)"),
        ({"dense": [[0.0], [1.0]]}, r"dense has the shape \(2, 1\).* want \(2, 2\)"),
        ({"labels": [[0.0]]}, r"labels has the shape \(1, 1\).* want \(3, 1\)"),
        ({"true_probs": [[0.0]]}, r"true_probs has the shape \(1, 1\).* want \(3, 1\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_batch(SCHEMA, **parts(**changes))


@pytest.mark.parametrize("max_history", [0, 1, 5, 29, 30, 1000])
def test_truncation_keeps_the_newest_events_and_counts(max_history):
    batch = small_source().batch("train", np.arange(60))
    cut = batch.truncate_history(max_history)
    before, after = rows(batch), rows(cut)
    dropped = 0
    for old, new in zip(before, after, strict=True):
        for key in ("item_id", "category_id", "action", "history_time"):
            assert new[key] == old[key][max(0, len(old[key]) - max_history) :]
        assert {k: v for k, v in new.items() if k.startswith("candidate") or k in ("labels", "country", "dense")} == {
            k: v for k, v in old.items() if k.startswith("candidate") or k in ("labels", "country", "dense")
        }
        dropped += len(old["item_id"]) - len(new["item_id"])
    assert cut.num_truncated_events == dropped
    assert cut.num_truncated_users == int((batch.history_lengths > max_history).sum())
    assert torch.equal(cut.history_offsets.diff(), cut.history_lengths)
    assert cut.max_history == min(max_history, batch.max_history)
    assert cut.sequences.length_per_key()[0] == cut.num_history
    with pytest.raises(ValueError, match="max_history is -1; allowed: 0 or more"):
        batch.truncate_history(-1)


@pytest.mark.parametrize(
    ("changes", "key", "bad", "table", "rows_"),
    [
        ({"history": {"item_id": [1, 10, 3], "action": [0, 1, 2]}}, "item_id", 10, "item", 10),
        ({"history": {"item_id": [1, 2, 3], "action": [0, 1, -1]}}, "action", -1, "action", 3),
        ({"candidates": {"candidate_item_id": [4, 5, 2**40]}}, "candidate_item_id", 2**40, "item", 10),
        ({"context": {"country": ([0, 5], [1, 1])}}, "country", 5, "country", 5),
    ],
)
def test_an_id_outside_its_table(changes, key, bad, table, rows_):
    batch = make_batch(SCHEMA, **parts(**changes))
    with pytest.raises(ValueError, match="to clip or hash") as error:
        batch.check_ids(SCHEMA, OutOfRangeIds.error)
    message = str(error.value)
    assert f"feature {key!r} holds id {bad}, outside table {table!r} of {rows_} rows" in message
    assert f"allowed: 0 to {rows_ - 1}" in message

    good = rows(batch)
    for policy in (OutOfRangeIds.clip, OutOfRangeIds.hash):
        repaired = batch.check_ids(SCHEMA, policy)
        assert repaired.num_bad_ids == 1
        for old, new in zip(good, rows(repaired), strict=True):
            for name, ids in old.items():
                if name != key:
                    assert new[name] == ids
                    continue
                for was, now in zip(ids, new[name], strict=True):
                    assert 0 <= now < rows_
                    if was != bad:
                        assert now == was
                    elif policy is OutOfRangeIds.clip:
                        assert now == (0 if bad < 0 else rows_ - 1)
        assert_equal(repaired, batch.check_ids(SCHEMA, policy))


def test_good_ids_pass_untouched_and_hashing_spreads():
    batch = make_batch(SCHEMA, **parts())
    for policy in OutOfRangeIds:
        assert batch.check_ids(SCHEMA, policy) is batch
    many = make_batch(
        SCHEMA,
        **parts(
            history={"item_id": list(range(10, 2010)), "action": [0] * 2000},
            history_lengths=[1000, 1000],
            history_time=[0] * 2000,
        ),
    ).check_ids(SCHEMA, OutOfRangeIds.hash)
    assert many.num_bad_ids == 2000
    counts = torch.bincount(many.sequences["item_id"].values(), minlength=10)
    assert counts.min() > 140  # 200 each on average


@pytest.mark.parametrize("users", [0, 1])
def test_no_user_and_one_user(users):
    source = small_source()
    batch = source.batch("train", np.arange(users)).truncate_history(5).check_ids(source.schema, OutOfRangeIds.error)
    assert batch.num_users == users
    assert batch.history_offsets.shape == (users + 1,)
    assert batch.dense.shape == (users, 8)
    assert batch.labels.shape == (batch.num_candidates, 2)
    assert (batch.max_history, batch.max_candidates)[: 2 - 2 * users] == (0, 0)[: 2 - 2 * users]
    assert_equal(batch, pickle.loads(pickle.dumps(batch)))
    assert_equal(batch, batch.to("cpu"))


@pytest.mark.parametrize("users", [0, 1, 3])
@pytest.mark.parametrize("empty_fraction", [0.0, 1.0])
def test_torchrec_collections_take_every_batch(users, empty_fraction):
    """TorchRec raises on a KJT of stride 0 (`to_dict`, and sharded sequence tables), so an empty batch has stride 1."""
    source = small_source(history=HistoryConfig(mean=5, max=9, empty_fraction=empty_fraction))
    batch = source.batch("train", np.arange(users))
    sequences = EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=table,
                num_embeddings=source.schema.tables[table],
                embedding_dim=4,
                feature_names=[f.name for f in source.schema.sequences if f.table == table],
            )
            for table in ("item", "category", "action")
        ]
    )(batch.sequences)
    assert sequences["item_id"].values().shape == (batch.num_history, 4)
    assert sequences["candidate_category_id"].values().shape == (batch.num_candidates, 4)
    pooled = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f.name,
                num_embeddings=source.schema.tables[f.table],
                embedding_dim=4,
                feature_names=[f.name],
            )
            for f in source.schema.context
        ]
    )(batch.context)
    assert pooled["hobbies"].shape == (max(users, 1), 4)
    assert [part.length_per_key() for part in batch.sequences.split([3, 2])] == [
        [batch.num_history] * 3,
        [batch.num_candidates] * 2,
    ]


def test_a_kjt_without_keys():
    nothing = torch.empty(0, dtype=torch.int64)
    jagged = make_jagged([], nothing, nothing, 3)
    assert jagged.length_per_key() == []
    assert jagged.to_dict() == {}


def test_moving_keeps_host_lengths_and_cached_integers(device):
    batch = small_source().batch("train", np.arange(5)).truncate_history(4)
    moved = batch.to(device, non_blocking=True)
    assert moved.device.type == device.type
    for field in dataclasses.fields(Batch):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            host = field.name in ("history_lengths", "candidate_lengths")
            assert value.device.type == ("cpu" if host else device.type), field.name
    assert moved.sequences.device().type == moved.context.device().type == device.type
    assert moved.sequences.length_per_key_or_none() == batch.sequences.length_per_key()
    assert moved.num_truncated_events == batch.num_truncated_events > 0
    assert_equal(moved.to("cpu"), batch)


@pytest.mark.gpu
def test_on_a_gpu_pinning_streams_and_no_synchronisation():
    batch = small_source().batch("train", np.arange(5)).pin_memory()
    assert batch.labels.is_pinned()
    assert batch.sequences.values().is_pinned()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moved = batch.to("cuda", non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    moved.record_stream(torch.cuda.current_stream())
    order = torch.tensor([3, 0], dtype=torch.int32, device="cuda")  # sharded modules keep it as a buffer
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts_of = moved.sequences.split([3, 2])
        moved.sequences.to_dict()
        moved.sequences.permute([3, 0], order)
        assert moved.num_history + moved.max_history + moved.num_candidates + moved.max_candidates > 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert parts_of[0].length_per_key() == batch.sequences.length_per_key()[:3]
    assert_equal(moved.to("cpu"), batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": (Feature("item_id", "item"),)}, "must be unique"),
        ({"candidates": (Feature("candidate_item_id", "thing"),)}, "reads table 'thing', which is not among"),
        ({"tables": {"item": 0, "action": 3, "country": 5}}, "'item' has 0 rows; at least 1"),
        ({"context": (Feature("country", "item"),)}, "serve sequences and pooled context"),
        ({"history": ()}, "at least one history"),
        ({"tasks": ()}, "at least one task"),
        ({"num_dense": -1}, "num_dense is -1; allowed"),
    ],
)
def test_an_impossible_schema_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SCHEMA, **changes)


def test_an_unknown_key_of_a_schema():
    assert SCHEMA.table_of("candidate_item_id") == "item"
    with pytest.raises(ValueError, match="no feature 'x'; there are"):
        SCHEMA.table_of("x")
