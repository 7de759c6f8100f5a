"""Joining histories and candidates, and the encodings of events."""

import pytest
import torch

from recsys.layers.encodings import EventEncoding, time_bucket
from recsys.layers.sequence import join_layout
from tests.samples import batch_of

LENGTHS = pytest.mark.parametrize(
    ("history", "candidates"),
    [([3, 0, 2], [1, 2, 1]), ([0, 0], [1, 1]), ([4], [3]), ([5, 1], [0, 2]), ([], [])],
    ids=["empty-in-between", "all-empty", "one-user", "no-candidates", "no-users"],
)


@LENGTHS
def test_candidates_follow_each_users_history(history: list[int], candidates: list[int]) -> None:
    batch = batch_of(history, candidates)
    sequence = join_layout(batch)
    history_rows = torch.arange(sum(history), dtype=torch.float64)[:, None]
    candidate_rows = 1000 + torch.arange(sum(candidates), dtype=torch.float64)[:, None]
    expected, h, c = [], 0, 0
    for num_history, num_candidates in zip(history, candidates, strict=True):
        expected += [*range(h, h + num_history), *range(1000 + c, 1000 + c + num_candidates)]
        h, c = h + num_history, c + num_candidates
    joined = sequence.join(history_rows, candidate_rows)
    assert joined[:, 0].tolist() == expected
    assert torch.equal(sequence.candidates(joined), candidate_rows)
    assert sequence.offsets.diff().tolist() == [h + c for h, c in zip(history, candidates, strict=True)]
    assert sequence.total == sum(history) + sum(candidates)
    assert sequence.max_seqlen == max((h + c for h, c in zip(history, candidates, strict=True)), default=0)
    assert sequence.num_candidates_per_user.tolist() == candidates


def test_time_buckets_are_two_per_doubling_and_bounded() -> None:
    seconds = torch.tensor([-5, 0, 1, 3, 7, 2**20 - 1, 2**62])
    assert time_bucket(seconds, 64).tolist() == [0, 0, 2, 4, 6, 40, 63]


def test_event_encoding_counts_from_the_newest_event_and_sees_gaps() -> None:
    torch.manual_seed(0)
    batch = batch_of([3, 0, 2], [1, 1, 1])
    encoding = EventEncoding(width=4, max_history=2, num_time_buckets=64)
    got = encoding(batch, join_layout(batch))
    time, request = batch.history_time, batch.request_time
    row = 0
    for user, length in enumerate([3, 0, 2]):
        for i in range(length):
            is_newest = i == length - 1
            following = request[user] if is_newest else time[row + 1]
            age, gap = request[user] - time[row], following - time[row]
            expected = (
                encoding.rank.weight[min(length - 1 - i, 1)]  # ranks past max_history share the last row
                + encoding.age.weight[time_bucket(age, 64)]
                + encoding.gap.weight[time_bucket(gap, 64)]
            )
            torch.testing.assert_close(got[row], expected)
            row += 1
