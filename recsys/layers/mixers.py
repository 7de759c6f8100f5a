"""How the tokens of a user meet inside a block: attention, or mean pooling to compare it with.

Shapes: `S` tokens of the joined sequence, `H` heads, `D` head dim.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data.batch import Batch
from kernels.score_pitch import count_scores
from recsys.attention.interface import AttentionBackend, CrossLayout, JaggedLayout, MaskSpec
from recsys.layers.sequence import JoinedSequence, user_of_token


@dataclass(frozen=True)
class MixContext:
    """What every layer of a step shares: where the users lie, and who sees whom."""

    sequence: JoinedSequence
    layout: JaggedLayout
    mask: MaskSpec
    across: CrossLayout
    """Candidates against the history."""


class Mixer(nn.Module):
    """Maps q, k, v `(S, H, D)` to `(S, H, D)`; tokens see only tokens of their own user."""

    def forward(self, q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, context: MixContext) -> Tensor:
        raise NotImplementedError


class AttentionMixer(Mixer):
    """Softmax attention by one of the backends of `recsys.attention`.

    Args:
        backend: computes it.
        dropout_p: probability of dropping an attention weight in training.
    """

    def __init__(self, backend: AttentionBackend, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.backend = backend
        self.dropout_p = dropout_p

    def forward(self, q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, context: MixContext) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        return self.backend(q_SHD, k_SHD, v_SHD, context.layout, context.mask, dropout_p=dropout_p)


class TargetMixer(Mixer):
    """Target attention: a candidate attends to the history of its user, and nothing else attends.

    Work grows with candidates x history instead of the square of the history; in its blocks the history meets itself
    nowhere, and its rows are zero here. DIN (Zhou et al. 2018, arXiv:1706.06978) weighs the
    history by the candidate too; here with softmax and heads.

    Args:
        backend: computes it, unfused or fused.
        dropout_p: probability of dropping an attention weight in training.
    """

    def __init__(self, backend: AttentionBackend, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.backend = backend
        self.dropout_p = dropout_p

    def forward(self, q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, context: MixContext) -> Tensor:
        sequence = context.sequence
        q_NHD = sequence.candidates(q_SHD)
        k_LHD, v_LHD = sequence.history(k_SHD), sequence.history(v_SHD)
        dropout_p = self.dropout_p if self.training else 0.0
        out_NHD = self.backend.cross(q_NHD, k_LHD, v_LHD, context.across, dropout_p=dropout_p)
        return out_NHD.new_zeros(q_SHD.shape).index_copy(0, sequence.candidate_slots, out_NHD)


class MeanPoolMixer(Mixer):
    """Attention with equal weights: the mean of `v` over the tokens that the mask shows.

    A history token sees its prefix (causal) or the whole history, a candidate the history and itself. Queries and
    keys are not used; they stay in the block so that the parameters are those of the attention model.
    """

    def forward(self, q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, context: MixContext) -> Tensor:
        sequence = context.sequence
        prefix = torch.cat([v_SHD.new_zeros(1, *v_SHD.shape[1:]), v_SHD], dim=0).double().cumsum(dim=0)
        offsets, num_candidates = sequence.offsets, sequence.num_candidates_per_user
        history_end = offsets[1:] - num_candidates
        index = torch.arange(sequence.total, device=v_SHD.device)
        user = user_of_token(offsets, sequence.total)
        is_candidate = index >= history_end[user]
        seen_to = torch.where(is_candidate | (not context.mask.causal), history_end[user], index + 1)
        total = prefix[seen_to] - prefix[offsets[:-1][user]] + is_candidate[:, None, None] * v_SHD
        count = seen_to - offsets[:-1][user] + is_candidate
        return (total / count[:, None, None]).to(v_SHD.dtype)


def mix_context(batch: Batch, sequence: JoinedSequence, mask: MaskSpec) -> MixContext:
    """What the layers of this step share; `mask` is the configured one, the candidates are filled in here."""
    layout = JaggedLayout(sequence.offsets, sequence.max_seqlen, sequence.total, sequence.total_scores)
    mask = replace(
        mask,
        num_targets=sequence.num_candidates_per_user,
        total_targets=batch.num_candidates,
        max_targets=batch.max_candidates,
        max_history=batch.max_history,
    )
    across = CrossLayout(
        JaggedLayout(batch.candidate_offsets, batch.max_candidates, batch.num_candidates),
        JaggedLayout(batch.history_offsets, batch.max_history, batch.num_history),
        total_scores=count_scores(batch.candidate_lengths, batch.history_lengths),
    )
    return MixContext(sequence, layout, mask, across)
