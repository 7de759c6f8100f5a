"""One jagged sequence per user: the history first, the candidates last."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import Batch
from kernels.score_pitch import count_scores


def user_of_token(offsets: Tensor, total: int) -> Tensor:
    """The user that each token belongs to.

    Args:
        offsets: `(B + 1,)` bounds of the users, on the device.
        total: number of tokens, `offsets[-1]`, known on the host so that nothing waits for the device.

    Returns:
        `(total,)` int64, ascending.
    """
    num_users = offsets.numel() - 1
    users = torch.arange(num_users, device=offsets.device)
    return torch.repeat_interleave(users, offsets.diff(), output_size=total)


@dataclass(frozen=True)
class JoinedSequence:
    """Where history and candidate tokens lie in the joined sequence; made once per batch, shared by all layers.

    Attributes:
        offsets: `(B + 1,)` bounds of the users in the joined sequence.
        order: `(L + N,)`; the joined sequence is `cat([history, candidates])[order]`.
        history_slots: `(L,)` positions of the history tokens in the joined sequence.
        candidate_slots: `(N,)` positions of the candidates in the joined sequence.
        history_user: `(L,)` user of each history token.
        candidate_user: `(N,)` user of each candidate.
        num_candidates_per_user: `(B,)`.
        max_seqlen: longest joined sequence of the batch.
        total: `L + N`.
        total_scores: elements of the scores of the users' joined sequences, see `count_scores`.
    """

    offsets: Tensor
    order: Tensor
    history_slots: Tensor
    candidate_slots: Tensor
    history_user: Tensor
    candidate_user: Tensor
    num_candidates_per_user: Tensor
    max_seqlen: int
    total: int
    total_scores: int

    def join(self, history: Tensor, candidates: Tensor) -> Tensor:
        """`(L, W)` and `(N, W)` to `(L + N, W)`, each user's candidates behind its history."""
        return torch.cat([history, candidates]).index_select(0, self.order)

    def candidates(self, joined: Tensor) -> Tensor:
        """`(L + N, ...)` to `(N, ...)`: the candidate tokens, in the order of `Batch.candidates`."""
        return joined.index_select(0, self.candidate_slots)

    def history(self, joined: Tensor) -> Tensor:
        """`(L + N, ...)` to `(L, ...)`: the history tokens, in the order of `Batch.history`."""
        return joined.index_select(0, self.history_slots)


def join_layout(batch: Batch) -> JoinedSequence:
    """Lay out a batch's history and candidates as one jagged sequence, without a host synchronisation."""
    num_history, num_candidates = batch.num_history, batch.num_candidates
    device = batch.history_offsets.device
    history_user = user_of_token(batch.history_offsets, num_history)
    candidate_user = user_of_token(batch.candidate_offsets, num_candidates)
    history_slots = torch.arange(num_history, device=device) + batch.candidate_offsets[history_user]
    candidate_slots = torch.arange(num_candidates, device=device) + batch.history_offsets[candidate_user + 1]
    total = num_history + num_candidates
    order = torch.empty(total, dtype=torch.int64, device=device)
    order[torch.cat([history_slots, candidate_slots])] = torch.arange(total, device=device)
    lengths = batch.history_lengths + batch.candidate_lengths  # both on the host
    return JoinedSequence(
        offsets=batch.history_offsets + batch.candidate_offsets,
        order=order,
        history_slots=history_slots,
        candidate_slots=candidate_slots,
        history_user=history_user,
        candidate_user=candidate_user,
        num_candidates_per_user=batch.candidate_offsets.diff(),
        max_seqlen=int(lengths.max()) if lengths.numel() else 0,
        total=total,
        total_scores=count_scores(lengths),
    )
