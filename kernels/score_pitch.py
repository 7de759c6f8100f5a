"""How much memory jagged scores take; apart from the kernels, for who plans a batch without Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

ROW_MULTIPLE = 8
"""Rows of scores are rounded up to so many: 16 bytes of 16-bit numbers, what a GPU reads and writes at once."""

Count = TypeVar("Count", int, Tensor)


def row_pitch(num_keys: Count) -> Count:
    """From one row of scores to the next: elements, for so many keys."""
    return (num_keys + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE


def count_scores(query_lengths: Sequence[int] | Tensor, key_lengths: Sequence[int] | Tensor | None = None) -> int:
    """Elements of the scores of one head: queries x pitch of a row, added up over the users.

    Args:
        query_lengths: of every user, on the host: a tensor on a GPU would be waited for.
        key_lengths: the same of the keys; None: the queries are the keys.

    Raises:
        ValueError: numbers of users that differ.
    """
    keys = query_lengths if key_lengths is None else key_lengths
    if len(query_lengths) != len(keys):
        raise ValueError(f"{len(query_lengths)} users have query lengths, {len(keys)} have key lengths")
    if isinstance(query_lengths, Tensor) and isinstance(keys, Tensor):
        return int((query_lengths.long() * row_pitch(keys.long())).sum())
    return sum(int(m) * row_pitch(int(n)) for m, n in zip(query_lengths, keys, strict=True))
