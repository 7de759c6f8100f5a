"""Where the scores of a jagged batch are: of every user queries x keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jagged.checks import check_offsets, checks_values
from kernels.jagged.launch import INTERPRETED, is_traced
from kernels.jagged.schedule import Schedule, offsets_of
from kernels.score_pitch import ROW_MULTIPLE, row_pitch

BLOCK = 32 if INTERPRETED else 64  # rows of a tile of queries or keys, in most kernels that read or write scores


def row_tiles(schedule: Schedule) -> Tensor:
    """`(entries, 8)`: the tiles of BLOCK rows of the schedule's queries; see tile_lists.py."""
    return schedule.query_tiles([BLOCK], causal=False)[0]


class ScoreLayout:
    """User b with m queries and l keys owns m rows of l scores of `(H, T)` from `offsets[b]` on.

    A row begins at a multiple of 8 elements, so that it is read and written 16 bytes at a time: score (i, j) of user b
    and head h is element `[h, offsets[b] + i * row_pitch(l) + j]`. What lies between the end of a row and the next one
    is written as zero; of a row that isn't finite, perhaps as NaN. No result and no gradient depends on it, but that
    the weights of a weighted sum have to be finite there too. Made once per batch.

    Args:
        schedule: of the queries and keys.
        total: T, a host integer, so that nothing waits for the GPU: `count_scores` of the lengths.

    Attributes:
        offsets: `(B + 1,)` int64 on the device.
        schedule, total: as given.

    Raises:
        ValueError: total can't be one; or it isn't what the offsets say, where values are checked (`Schedule`).
    """

    def __init__(self, schedule: Schedule, total: int) -> None:
        if total < 0 or total % ROW_MULTIPLE:
            raise ValueError(
                f"total must be a number of scores that {ROW_MULTIPLE} divides, as `count_scores` gives it; got {total}"
            )
        self.schedule = schedule
        self.total = total
        (queries, num_queries, longest), (keys, num_keys, most_keys) = schedule.queries, schedule.keys
        arguments = (queries, keys, num_queries, longest, num_keys, most_keys, total, schedule.check_values)
        if is_traced(queries, keys):
            self.offsets = _score_offsets_op(*arguments)
        else:
            with torch.inference_mode(False):  # a later backward may save them
                self.offsets = _score_offsets(*arguments)

    def query_tiles(self) -> Tensor:
        """`(entries, 8)`: the tiles of BLOCK queries; see tile_lists.py."""
        return row_tiles(self.schedule)

    def key_tiles(self) -> Tensor:
        """`(entries, 8)`: the tiles of BLOCK keys."""
        return self.schedule.key_tiles([BLOCK], causal=False)[0]


def _score_offsets(
    queries: Tensor,
    keys: Tensor,
    num_queries: int,
    max_seqlen: int,
    num_keys: int,
    max_key_seqlen: int,
    total: int,
    check_values: bool,
) -> Tensor:
    """First score of every user, and the end of the last one's: `(B + 1,)` int64."""
    check_values = check_values and checks_values(queries.device)
    if check_values:
        check_offsets(queries, max_seqlen, num_queries)
        if keys is not queries:
            check_offsets(keys, max_key_seqlen, num_keys, of_keys=True)
    offsets = offsets_of(queries.diff().long() * row_pitch(keys.diff().long()), torch.int64)
    if check_values and int(offsets[-1]) != total:
        raise ValueError(f"the offsets make {int(offsets[-1])} scores (`count_scores`), not {total}")
    return offsets


_score_offsets_op = torch.library.custom_op("recsys_kernels::jagged_score_offsets", _score_offsets, mutates_args=())


@_score_offsets_op.register_fake
def _score_offsets_fake(queries: Tensor, *_: object) -> Tensor:
    return queries.new_empty(queries.shape, dtype=torch.int64)
