"""The generator: reproducible per user, and shaped as its config says."""

import itertools

import numpy as np
import pytest
import torch

from data.config import (
    CandidatesConfig,
    ContextFeatureConfig,
    HistoryConfig,
    PlantedConfig,
    SyntheticConfig,
    TaskConfig,
)
from data.sources import build_source
from data.synthetic import SyntheticSource
from tests.data.helpers import assert_equal, auc, rows, small_config, small_source


def events(batch, key):
    """Values of one key of the sequences as numpy."""
    i = batch.sequences.keys().index(key)
    return torch.split(batch.sequences.values(), batch.sequences.length_per_key())[i].numpy()


def test_a_user_is_the_same_in_every_batch():
    source = small_source()
    together = rows(source.batch("train", np.arange(40)))
    in_parts = [row for i in range(0, 40, 7) for row in rows(source.batch("train", np.arange(i, min(i + 7, 40))))]
    backwards = rows(source.batch("train", np.arange(40)[::-1]))[::-1]
    assert together == in_parts == backwards
    assert_equal(small_source().batch("train", np.arange(40)), source.batch("train", np.arange(40)))


def test_the_seed_changes_every_user():
    one, other = (rows(small_source(seed=seed).batch("train", np.arange(20))) for seed in (1, 2))
    assert all(x["dense"] != y["dense"] for x, y in zip(one, other, strict=True))


def test_users_differ_and_the_splits_are_disjoint():
    source = small_source()
    train = {tuple(row["dense"]) for row in rows(source.batch("train", np.arange(1000)))}
    held_out = {tuple(row["dense"]) for row in rows(source.batch("eval", np.arange(50)))}
    assert len(train) == 1000
    assert len(held_out) == 50
    assert not train & held_out
    assert source.num_users("train") == 1000
    assert source.num_users("eval") == 50


def test_a_longer_maximum_only_adds_old_events():
    short, long = (small_source(history=HistoryConfig(mean=12, max=most, empty_fraction=0)) for most in (6, 30))
    users = np.arange(100)
    assert_equal(
        short.batch("train", users),
        _without_counts(long.batch("train", users).truncate_history(6)),
    )


def _without_counts(batch):
    batch.num_truncated_events = batch.num_truncated_users = 0
    return batch


def test_lengths_follow_the_config():
    history = HistoryConfig(mean=40, max=100_000, sigma=0.8, empty_fraction=0.1)
    batch = small_source(history=history).batch("train", np.arange(20_000))
    lengths = batch.history_lengths.numpy()
    some = lengths[lengths > 0]
    assert np.mean(lengths == 0) == pytest.approx(0.1, abs=0.01)
    assert some.mean() == pytest.approx(40, rel=0.03)
    assert np.log(some[some > 5]).std() == pytest.approx(0.8, abs=0.05)
    clamped = small_source(history=HistoryConfig(mean=40, max=50)).batch("train", np.arange(2000))
    assert clamped.max_history == 50
    assert 0 < clamped.history_lengths.float().mean() < 40
    counts = torch.bincount(batch.candidate_lengths, minlength=5)
    assert counts[0] == 0
    assert (counts[1:].float() / 20_000 - 0.25).abs().max() < 0.02


def test_no_events_at_all():
    batch = small_source(history=HistoryConfig(mean=5, max=0)).batch("train", np.arange(3))
    assert batch.num_history == batch.max_history == 0
    assert batch.num_users == 3
    assert batch.num_candidates > 0


def test_popularity_has_a_long_tail():
    batch = small_source(num_items=5000).batch("train", np.arange(8000))
    counts = np.sort(np.bincount(events(batch, "item_id"), minlength=5000))[::-1]
    assert counts[:50].sum() > 0.15 * counts.sum()  # 1 % of the items, more than 15 % of the events
    assert (counts > 0).mean() > 0.6  # and yet most items occur
    assert counts[0] > 30 * np.median(counts)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("num_items", [24, 25, 997])
def test_items_belong_to_their_category_and_fit_the_table(exponent, num_items):
    source = small_source(num_items=num_items, num_categories=24, planted=PlantedConfig(item_exponent=exponent))
    batch = source.batch("train", np.arange(500))
    for prefix in ("", "candidate_"):
        items, categories = events(batch, f"{prefix}item_id"), events(batch, f"{prefix}category_id")
        assert items.min() >= 0
        assert items.max() < num_items
        assert np.array_equal(source.catalogue.category_of(items), categories)
    # All ids can occur: the scrambling is a bijection.
    ids = source.catalogue.category_of(np.arange(num_items))
    assert np.bincount(ids, minlength=24).min() >= num_items // 24


def test_times_ascend_and_show_the_sessions():
    planted = PlantedConfig(max_idle_events=0)
    source = small_source(history=HistoryConfig(mean=50, max=200), planted=planted)
    batch = source.batch("train", np.arange(500))
    gaps = []
    for row in rows(batch):
        times = [*row["history_time"], row["request_time"]]
        gaps += [b - a for a, b in itertools.pairwise(times)]
    assert min(gaps) >= 1
    gaps = np.array(gaps)
    assert not np.any((gaps > 1201) & (gaps < 1800))  # within a session, or half an hour and more
    assert np.mean(gaps >= 1800) == pytest.approx(1 / PlantedConfig().session_events, rel=0.2)


def test_labels_are_a_funnel_drawn_with_the_true_probabilities():
    tasks = [TaskConfig("click", -1, 2), TaskConfig("like", 0, 1), TaskConfig("buy", -1, 1)]
    batch = small_source(tasks=tasks).batch("train", np.arange(20_000))
    labels, probs = batch.labels.numpy(), batch.true_probs.numpy()
    assert labels.shape == probs.shape == (batch.num_candidates, 3)
    assert set(np.unique(labels)) == {0.0, 1.0}
    assert (np.diff(labels, axis=1) <= 0).all()
    assert (np.diff(probs, axis=1) <= 0).all()
    assert np.abs(labels.mean(0) - probs.mean(0)).max() < 0.01
    for task in range(3):  # calibrated in every tenth of the predictions
        bounds = np.quantile(probs[:, task], np.linspace(0, 1, 11)[1:-1])
        bins = np.digitize(probs[:, task], bounds)
        for b in range(10):
            assert labels[bins == b, task].mean() == pytest.approx(probs[bins == b, task].mean(), abs=0.03)


def test_context_and_dense_have_the_configured_shapes():
    context = [ContextFeatureConfig("country", 7, 1, 1), ContextFeatureConfig("hobbies", 9, 0, 3)]
    batch = small_source(context=context, num_dense=5).batch("train", np.arange(2000))
    country, hobbies = batch.context.lengths().view(2, -1)
    assert country.unique().tolist() == [1]
    assert hobbies.unique().tolist() == [0, 1, 2, 3]
    assert int(batch.context["country"].values().max()) == 6
    assert batch.dense.shape == (2000, 5)
    assert batch.dense.mean().abs() < 0.05
    assert float(batch.dense.std()) == pytest.approx(1, abs=0.05)
    none = small_source(context=[], num_dense=0).batch("train", np.arange(3))
    assert none.context.keys() == []
    assert none.dense.shape == (3, 0)


def test_the_signal_is_in_the_newest_positive_events():
    """What ranks candidates: the newest events that met with a positive action; neither all of them nor the newest."""
    source = SyntheticSource(SyntheticConfig())
    batch = source.batch("train", np.arange(3000))
    scores = {"newest positive": [], "all": [], "newest": []}
    labels, probs = [], []
    for row in rows(batch):
        category, positive = np.array(row["category_id"], np.int64), np.array(row["action"], np.int64) > 0
        for candidate in row["candidate_category_id"]:
            hits = (category == candidate) & positive
            scores["newest positive"].append(hits[positive][-4:].sum())
            scores["all"].append(hits.mean() if len(hits) else 0.0)
            scores["newest"].append(hits[-4:].sum())
        labels += [label[0] for label in row["labels"]]
        probs += [prob[0] for prob in row["true_probs"]]
    best = auc(np.array(probs), np.array(labels))
    closed = {name: (auc(np.array(score), np.array(labels)) - 0.5) / (best - 0.5) for name, score in scores.items()}
    assert best > 0.9
    assert 0.85 < closed["newest positive"] < 1
    assert closed["all"] < 0.7
    assert closed["newest"] < 0.5


def test_the_newest_events_are_idle_skips():
    planted = PlantedConfig(max_idle_events=5, positive_on_interest=1.0, on_interest=1.0, session_events=1000)
    history = HistoryConfig(mean=30, max=100, sigma=0, empty_fraction=0)
    batch = small_source(planted=planted, history=history).batch("train", np.arange(2000))
    idle = [len(row["action"]) - np.flatnonzero(row["action"])[-1] - 1 for row in rows(batch)]
    expected = 2000 * np.diff(np.sqrt(np.arange(7) / 6))  # whole part of 6 times a squared uniform number
    assert np.bincount(idle).tolist() == pytest.approx(expected.tolist(), rel=0.2)
    none = small_source(planted=PlantedConfig(max_idle_events=0, positive_on_interest=1.0, on_interest=1.0))
    assert all(row["action"][-1] > 0 for row in rows(none.batch("train", np.arange(50))) if row["action"])


def test_the_other_effects_carry_a_little():
    """With the interest taken out, what is left of the logit is worth something, but not much."""
    tasks = [TaskConfig("click", 0, 0)]
    batch = small_source(tasks=tasks).batch("train", np.arange(8000))
    left = auc(batch.true_probs[:, 0].numpy(), batch.labels[:, 0].numpy())
    assert 0.55 < left < 0.75


BAD = {
    "batch_size": lambda: small_config(batch_size=0),
    "num_workers": lambda: small_config(num_workers=-1),
    "prefetch_batches": lambda: small_config(prefetch_batches=0),
    "cycle_batches": lambda: small_config(cycle_batches=-1),
    "num_train_users": lambda: small_config(num_train_users=0),
    "num_eval_users": lambda: small_config(num_eval_users=-1),
    "num_items": lambda: small_config(num_items=3),
    "num_categories": lambda: small_config(num_categories=0),
    "num_actions": lambda: small_config(num_actions=1),
    "num_dense": lambda: small_config(num_dense=-1),
    "tasks": lambda: small_config(tasks=[]),
    "context": lambda: small_config(context=[ContextFeatureConfig("item")]),
    "history.mean": lambda: HistoryConfig(mean=0),
    "history.max": lambda: HistoryConfig(max=-1),
    "history.sigma": lambda: HistoryConfig(sigma=-1),
    "history.empty_fraction": lambda: HistoryConfig(empty_fraction=1.5),
    "candidates.min": lambda: CandidatesConfig(0, 3),
    "candidates.max": lambda: CandidatesConfig(3, 2),
    "context[country].cardinality": lambda: ContextFeatureConfig(cardinality=0),
    "context[country].min_length": lambda: ContextFeatureConfig(min_length=-1),
    "context[country].max_length": lambda: ContextFeatureConfig(min_length=2, max_length=1),
    "planted.on_interest": lambda: PlantedConfig(on_interest=2),
    "planted.current_candidates + past_candidates": lambda: PlantedConfig(current_candidates=0.7, past_candidates=0.7),
    "planted.interests_per_user": lambda: PlantedConfig(interests_per_user=0),
    "planted.session_events": lambda: PlantedConfig(session_events=0.5),
    "planted.min_current_events": lambda: PlantedConfig(min_current_events=0),
    "planted.max_idle_events": lambda: PlantedConfig(max_idle_events=-1),
    "planted.quality_weight": lambda: PlantedConfig(quality_weight=-1),
}


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_setting_is_named_with_what_is_allowed(name):
    with pytest.raises(ValueError, match="allowed: ") as error:
        BAD[name]()
    assert f"data.{name} is " in str(error.value)


def test_a_config_without_a_source_is_refused():
    with pytest.raises(ValueError, match="no source for a object; there are sources for: SyntheticConfig"):
        build_source(object())
