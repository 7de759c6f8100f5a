"""The loader: who gets which users, in which order, whatever the number of workers and ranks."""

import itertools

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.config import OutOfRangeIds
from data.loader import CycledBatches, build_loader
from data.throughput import main, measure
from tests.data.helpers import assert_equal, rows, small_config, small_source


def load(config=None, *, steps=None, source=None, **options) -> list[Batch]:
    """The first batches of a loader, or all of them."""
    config = config or small_config()
    settings = {"split": "train", "rank": 0, "world_size": 1} | options
    loader = build_loader(source or small_source(), config, **settings)
    return list(itertools.islice(loader, steps))


def users_of(batches) -> list[tuple[float, ...]]:
    """Something that tells users apart: their dense features."""
    return [tuple(row.tolist()) for batch in batches for row in batch.dense]


def test_ranks_share_the_users_in_order():
    alone = load(small_config(batch_size=12), steps=3)
    shared = [load(steps=3, rank=rank, world_size=3) for rank in range(3)]
    for step in range(3):
        merged = [row for rank in range(3) for row in rows(shared[rank][step])]
        assert merged == rows(alone[step])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_resumes_with_another_world_size_and_batch_size(world_size):
    whole = users_of(load(steps=15))  # 60 users
    config = small_config(batch_size=2)
    steps = 24 // (2 * world_size)
    rest = [load(config, steps=steps, rank=r, world_size=world_size, position=36) for r in range(world_size)]
    resumed = [user for step in range(steps) for r in range(world_size) for user in users_of([rest[r][step]])]
    assert resumed == whole[36:60]


def test_training_wraps_around():
    source = small_source(num_train_users=10)
    users = users_of(load(small_config(batch_size=4), source=source, steps=6))
    assert users[:4] == users[10:14] == users[20:24]
    assert len(set(users)) == 10
    assert users_of(load(small_config(), source=source, steps=1, position=10)) == users[:4]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_users", [0, 1, 4, 24, 25, 50])
def test_eval_covers_every_user_once_in_the_same_number_of_batches(world_size, num_users):
    source = small_source(num_eval_users=num_users)
    ranks = [load(source=source, split="eval", rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == -(-num_users // (4 * world_size))
    users = [user for batches in ranks for user in users_of(batches)]
    assert len(users) == len(set(users)) == num_users
    assert set(users) == set(users_of([source.batch("eval", np.arange(num_users))]))
    if num_users == 25 and world_size == 3:
        assert [batches[-1].num_users for batches in ranks] == [1, 0, 0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers):
    config = small_config(num_workers=num_workers, prefetch_batches=2)
    state = torch.get_rng_state()
    loader = build_loader(small_source(), config, split="eval", rank=0, world_size=2, max_history=7, device_type="cpu")
    here = load(split="eval", rank=0, world_size=2, max_history=7)
    for _ in range(2):  # the workers stay for the next evaluation
        there = list(loader)
        assert len(there) == len(here) == 7
        for one, other in zip(there, here, strict=True):
            assert_equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loader_leaves_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    load(steps=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_long_histories_are_cut_and_counted():
    full, cut = load(steps=5), load(steps=5, max_history=8)
    assert all(batch.max_history <= 8 for batch in cut)
    for one, other in zip(full, cut, strict=True):
        assert other.num_truncated_events == one.num_history - other.num_history
        assert other.num_truncated_users == int((one.history_lengths > 8).sum())
    assert sum(batch.num_truncated_events for batch in cut) > 0


class Broken:
    """A source with an item past the end of its table in every batch."""

    def __init__(self):
        self.good = small_source()
        self.schema = self.good.schema

    def num_users(self, split):
        return self.good.num_users(split)

    def batch(self, split, users):
        batch = self.good.batch(split, users)
        if batch.num_history:
            batch.sequences.values()[0] = 500
        return batch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_id_stops_the_loader_by_default(num_workers):
    with pytest.raises(ValueError, match="feature 'item_id' holds id 500, outside table 'item' of 500 rows"):
        load(small_config(num_workers=num_workers), source=Broken(), steps=1)


@pytest.mark.parametrize("policy", [OutOfRangeIds.clip, OutOfRangeIds.hash])
def test_a_bad_id_is_repaired_by_policy(policy):
    batches = load(small_config(out_of_range_ids=policy), source=Broken(), steps=2)
    assert [batch.num_bad_ids for batch in batches] == [1, 1]
    assert all(int(batch.sequences["item_id"].values().max()) < 500 for batch in batches)


def test_cycling_serves_the_same_batches_again():
    config = small_config(cycle_batches=3)
    loader = build_loader(small_source(), config, split="train", rank=1, world_size=2)
    assert isinstance(loader, CycledBatches)
    seven = list(itertools.islice(loader, 7))
    assert seven[0] is seven[3] is seven[6]
    for one, other in zip(seven[:3], load(steps=3, rank=1, world_size=2), strict=True):
        assert_equal(one, other)
    resumed = build_loader(
        small_source(), config, split="train", rank=1, world_size=2, position=2 * 2 * config.batch_size
    )
    for one, other in zip(itertools.islice(resumed, 5), seven[2:], strict=True):
        assert_equal(one, other)  # goes on in the middle of the cycle, with the same batches
    assert len(load(config, split="eval")) == 13  # eval does not cycle


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_pinned_for_a_gpu(num_workers):
    torch.cuda.init()  # the workers must not inherit a used CUDA context
    config = small_config(num_workers=num_workers)
    (batch,) = load(config, steps=1, device_type="cuda")
    assert batch.labels.is_pinned()
    assert batch.sequences.values().is_pinned()
    (cycled,) = load(small_config(cycle_batches=1), steps=1, device_type="cuda")
    assert cycled.labels.is_pinned()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split is 'test'; allowed: train, eval"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of 2; allowed: 0 to 1"),
        ({"position": -1}, "position is -1 for train"),
        ({"position": 4, "split": "eval"}, "position is 4 for eval"),
        ({"max_history": -1}, "max_history is -1; allowed"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_throughput_counts_what_it_takes(capsys):
    result = measure(small_config(), num_batches=3, warmup_batches=1)
    expected = load(steps=4)[1:]
    assert result.samples == 12
    assert result.tokens == sum(batch.num_history + batch.num_candidates for batch in expected)
    assert result.samples_per_second > 0
    main(["--batch-size", "8", "--num-batches", "2", "--num-items", "1000", "--cycle-batches", "1"])
    assert "16 samples of" in capsys.readouterr().out
