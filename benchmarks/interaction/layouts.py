"""A batch in the layouts of the providers, and what is converted between them outside of the timed region."""

from __future__ import annotations

import itertools
import math
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.attention.accuracy import LEAST_ROW_SIZE
from benchmarks.attention.shapes import Batch
from kernels.jagged import Schedule
from kernels.jagged.score_layout import ScoreLayout
from kernels.score_pitch import count_scores, row_pitch


class Layouts:
    """Where rows and scores of a batch are, ours and padded.

    Letters: `B` users, `L` tokens, `S` tokens of the longest user, `H` heads, `T` scores of a head, of which `P` are of
    a query and a key, and the others lie between a row's end and the next one.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.num_scores = count_scores(batch.lengths)
        self.num_pairs = sum(n * n for n in batch.lengths)

    @cached_property
    def schedule(self) -> Schedule:
        batch = self.batch
        return Schedule(batch.offsets, batch.total, batch.max_seqlen, num_targets=batch.num_targets)

    @cached_property
    def scores(self) -> ScoreLayout:
        return ScoreLayout(self.schedule, self.num_scores)

    @cached_property
    def is_token(self) -> Tensor:
        """`(B, S)`"""
        lengths = torch.tensor(self.batch.lengths, device=self.batch.device)
        return torch.arange(self.batch.max_seqlen, device=self.batch.device) < lengths[:, None]

    @cached_property
    def user_of_token(self) -> Tensor:
        """`(L,)` int64"""
        return self.is_token.nonzero()[:, 0]

    @cached_property
    def order_of_pairs(self) -> Tensor:
        """`(2 L,)` int64: rows of two such tensors, one below the other, by user: those of the first, of the second."""
        device, total = self.batch.device, self.batch.total
        user = self.user_of_token.repeat(2)
        is_second = torch.arange(2 * total, device=device) >= total
        return (2 * user + is_second).argsort(stable=True)

    @property
    def is_score(self) -> Tensor:
        """`(B, S, S)`, made anew: it is large."""
        return self.is_token[:, :, None] & self.is_token[:, None, :]

    @cached_property
    def offsets(self) -> Tensor:
        """`(B + 1,)` int64, the same object each time: by it torch knows that nested tensors fit."""
        return self.batch.offsets.long()

    def nested(self, x: Tensor) -> Tensor:
        """`(L, ...)` as torch's nested tensor `(B, lengths, ...)`, a view."""
        return torch.nested.nested_tensor_from_jagged(
            x, self.offsets, min_seqlen=min(self.batch.lengths), max_seqlen=self.batch.max_seqlen
        )

    def pad_rows(self, x: Tensor) -> Tensor:
        """`(L, ...)` to `(B, S, ...)`, zero where there is no token."""
        padded = x.new_zeros((*self.is_token.shape, *x.shape[1:]))
        padded[self.is_token] = x.detach()
        return padded

    def unpad_rows(self, x: Tensor) -> Tensor:
        return x[self.is_token]

    @cached_property
    def is_pair(self) -> Tensor:
        """`(T,)`"""
        lengths = torch.tensor(self.batch.lengths, device=self.batch.device)[self.user_of_token]
        pitches = row_pitch(lengths)
        row = torch.repeat_interleave(pitches, output_size=self.num_scores)
        column = torch.arange(self.num_scores, device=row.device) - (pitches.cumsum(0) - pitches)[row]
        return column < lengths[row]

    def tight(self, x: Tensor) -> Tensor:
        """`(H, T)` to `(H, P)`, rows right behind each other, as others have them."""
        return x.detach()[:, self.is_pair]

    def loose(self, x: Tensor) -> Tensor:
        """And back."""
        scores = x.new_zeros(x.shape[0], self.num_scores)
        scores[:, self.is_pair] = x
        return scores

    def pad_scores(self, x: Tensor) -> Tensor:
        """`(H, T)` to `(B, H, S, S)`"""
        is_score = self.is_score
        padded = x.new_zeros((x.shape[0], *is_score.shape))
        padded[:, is_score] = self.tight(x)
        return padded.transpose(0, 1).contiguous()

    def unpad_scores(self, x: Tensor) -> Tensor:
        return self.loose(x.transpose(0, 1)[:, self.is_score])

    def worst_error(self, actual: Tensor, exact: Tensor) -> float:
        """Of the rows of a tensor, the worst root mean square error, relative to the size of the exact row.

        Jagged scores, `(H, T)`, count as a row for every user. A row smaller than a part of the root mean square of all
        counts as so large. Infinite where a value isn't finite.
        """
        exact = exact.detach().float()
        difference = actual.detach().float() - exact
        if not bool(torch.isfinite(difference).all()):
            return math.inf
        if exact.numel() == 0:
            return 0.0
        if exact.dim() == 2 and exact.shape[1] == self.num_scores:
            sizes, errors = (self._mean_by_user(x.square().mean(dim=0)) for x in (exact, difference))
        else:
            sizes, errors = (x.square().flatten(1).mean(dim=1) for x in (exact, difference))
        least = LEAST_ROW_SIZE * float(exact.square().mean().sqrt())
        return float((errors.sqrt() / sizes.sqrt().clamp_min(max(least, torch.finfo(torch.float32).tiny))).max())

    def _mean_by_user(self, x: Tensor) -> Tensor:
        """`(T,)` to `(B,)`"""
        lengths = torch.tensor(self.batch.lengths, device=x.device)
        user = torch.repeat_interleave(lengths * row_pitch(lengths), output_size=self.num_scores)
        return torch.zeros(len(lengths), device=x.device).index_add_(0, user, x) / lengths.square()

    def offsets_of_heads(self, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For who has no heads: each is taken as users of its own, one head after the other.

        Lengths and offsets of rows, lengths and offsets of scores; int64.
        """
        rows = self.batch.lengths * num_heads
        scores = [n * n for n in rows]
        device = self.batch.device

        def offsets(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *itertools.accumulate(lengths)], device=device)

        return torch.tensor(rows, device=device), offsets(rows), torch.tensor(scores, device=device), offsets(scores)


def heads_first(x: Tensor) -> Tensor:
    """`(L, H, D)` to `(H L, D)`."""
    return x.detach().transpose(0, 1).reshape(-1, x.shape[2])


def heads_inside(x: Tensor, num_heads: int) -> Tensor:
    """And back."""
    return x.view(num_heads, -1, x.shape[1]).transpose(0, 1)
