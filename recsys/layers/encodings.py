"""Where an event lies in its history: counted from the newest, and in seconds before the request."""

import torch
from torch import Tensor, nn

from data.batch import Batch
from recsys.layers.sequence import JoinedSequence

_BUCKETS_PER_OCTAVE = 2.0


def time_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """Log-spaced bucket of a duration: two per doubling, bucket 0 is under one second, the last holds the rest.

    Args:
        seconds: any shape, int64; negative durations count as 0.
        num_buckets: number of buckets; 64 reach 2^32 seconds.

    Returns:
        Same shape, int64 in `[0, num_buckets)`.
    """
    octaves = torch.log2(seconds.clamp(min=0).to(torch.float32) + 1.0)
    return (octaves * _BUCKETS_PER_OCTAVE).to(torch.int64).clamp(max=num_buckets - 1)


class EventEncoding(nn.Module):
    """Learned encodings of an event's rank from the newest, its age, and the gap to the next event.

    The gap shows where a session ended; the newest event's gap is its age.

    Args:
        width: model width `W`.
        max_history: ranks past it share the last embedding.
        num_time_buckets: log-spaced buckets for age and gap.
    """

    def __init__(self, width: int, max_history: int, num_time_buckets: int) -> None:
        super().__init__()
        self.rank = nn.Embedding(max_history, width)
        self.age = nn.Embedding(num_time_buckets, width)
        self.gap = nn.Embedding(num_time_buckets, width)
        for table in (self.rank, self.age, self.gap):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, batch: Batch, sequence: JoinedSequence) -> Tensor:
        """Encodings `(L, W)` of the history events of `batch`."""
        user = sequence.history_user
        end = batch.history_offsets[user + 1]
        index = torch.arange(batch.num_history, device=user.device)
        rank = (end - 1 - index).clamp(max=self.rank.num_embeddings - 1)
        request = batch.request_time[user]
        next_index = (index + 1).clamp(max=max(batch.num_history - 1, 0))
        next_time = torch.where(index + 1 < end, batch.history_time[next_index], request)
        age = time_bucket(request - batch.history_time, self.age.num_embeddings)
        gap = time_bucket(next_time - batch.history_time, self.gap.num_embeddings)
        return self.rank(rank) + self.age(age) + self.gap(gap)
