"""The ranking model: a score per candidate and task from a user's history, context and dense features.

Shapes: `B` users, `L` history tokens, `N` candidates, `S = L + N` joined tokens, `T` tasks, `F` dense features,
`W` width, `E` embedding dims of the features put side by side, `C` context width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet

from data.batch import Batch
from data.schema import Feature, Schema
from recsys.attention.interface import AttentionBackend, MaskSpec
from recsys.embeddings import PooledEmbeddings, SequenceEmbeddings, merge_features
from recsys.layers.block import JaggedBlock
from recsys.layers.encodings import EventEncoding
from recsys.layers.mixers import AttentionMixer, MeanPoolMixer, Mixer, TargetMixer, mix_context
from recsys.layers.sequence import JoinedSequence, join_layout
from recsys.models.config import MixerKind, ModelConfig


def table_dims(config: ModelConfig, schema: Schema) -> dict[str, int]:
    """Embedding dimension of every table of `schema`; a dimension for an unknown table is a `ValueError`."""
    unknown = sorted(set(config.embedding_dims) - set(schema.tables))
    if unknown:
        raise ValueError(f"model.embedding_dims names unknown tables {unknown}: allowed are {sorted(schema.tables)}")
    return {table: config.embedding_dims.get(table, config.embedding_dim) for table in schema.tables}


class Predictions(NamedTuple):
    """What a training step hands back; tensors are detached and stay on the device.

    Attributes:
        loss: scalar; its mean over ranks is the mean binary cross-entropy over all candidates and tasks.
        logits: `(N, T)` float32.
        batch: the batch the logits belong to.
    """

    loss: Tensor
    logits: Tensor
    batch: Batch


class SequenceTower(nn.Module):
    """History and candidates through the jagged blocks to one vector per candidate."""

    def __init__(self, config: ModelConfig, schema: Schema, mixer: Mixer, mask: MaskSpec) -> None:
        super().__init__()
        dims = table_dims(config, schema)
        self.history_keys = [feature.name for feature in schema.history]
        self.candidate_keys = [feature.name for feature in schema.candidates]
        self.mask = mask
        self.history_in = nn.Linear(_total_dim(schema.history, dims), config.width, bias=False)
        self.candidate_in = nn.Linear(_total_dim(schema.candidates, dims), config.width, bias=False)
        # Rows of tables start small. Unscaled, the encodings, alike for all items, would drown what tells items apart,
        # and deep models would take many hundred steps to find it (docs/decisions/0004-scaled-content.md).
        self.content_norm = nn.RMSNorm(config.width)
        self.encoding = EventEncoding(config.width, config.max_history, config.num_time_buckets)
        self.blocks = nn.ModuleList(
            JaggedBlock(
                mixer,
                width=config.width,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                ffn_width=config.ffn_width,
                dropout=config.dropout,
                compiled=config.compiled,
            )
            for _ in range(config.num_layers)
        )
        self.out_norm = nn.RMSNorm(config.width)

    def forward(self, batch: Batch, sequence: JoinedSequence, features: dict[str, Tensor]) -> Tensor:
        """Returns `(N, W)`, one row per candidate.

        Args:
            batch: for times and offsets.
            sequence: the joined layout of `batch`.
            features: looked-up rows by feature: `(L, E_f)` for history keys, `(N, E_f)` for candidate keys.
        """
        history_LE = torch.cat([features[key] for key in self.history_keys], dim=-1)
        candidates_NE = torch.cat([features[key] for key in self.candidate_keys], dim=-1)
        events_LW = self.content_norm(self.history_in(history_LE)) + self.encoding(batch, sequence)
        candidates_NW = self.content_norm(self.candidate_in(candidates_NE))
        x_SW = sequence.join(events_LW, candidates_NW.to(events_LW.dtype))
        context = mix_context(batch, sequence, self.mask)
        for block in self.blocks:
            x_SW = block(x_SW, context)
        return self.out_norm(sequence.candidates(x_SW))


class Interaction(nn.Module):
    """Everything dense: sequence tower, context and dense features, cross network, task heads.

    The cross network is DCN-v2's low-rank form (Wang et al. 2020, arXiv:2008.13535):
    `x_{l+1} = x_0 * (W_l V_l x_l + b_l) + x_l`.
    """

    def __init__(
        self,
        config: ModelConfig,
        schema: Schema,
        mixer: Mixer,
        mask: MaskSpec,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.autocast_dtype = autocast_dtype
        self.tower = SequenceTower(config, schema, mixer, mask)
        self.context_keys = [feature.name for feature in schema.context]
        context_dim = _total_dim(schema.context, table_dims(config, schema)) + schema.num_dense
        self.context = nn.Sequential(
            nn.Linear(context_dim, config.context_width),
            nn.SiLU(),
            nn.Linear(config.context_width, config.context_width),
        )
        crossed = config.width + config.context_width
        self.cross = LowRankCrossNet(crossed, config.cross_layers, config.cross_rank)
        self.heads = nn.ModuleList(_head(crossed, config.head_widths) for _ in schema.tasks)

    def forward(self, batch: Batch, sequences: list[dict[str, object]], context: list[dict[str, object]]) -> Tensor:
        """Logits `(N, T)` float32 from what the tables returned."""
        with torch.autocast(
            batch.dense.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        ):
            sequence = join_layout(batch)
            candidates_NW = self.tower(batch, sequence, merge_features(sequences))
            pooled = merge_features(context, batch.num_users)
            context_BE = torch.cat([*(pooled[key] for key in self.context_keys), batch.dense], dim=-1)
            context_NC = self.context(context_BE)[sequence.candidate_user]
            x = self.cross(torch.cat([candidates_NW, context_NC.to(candidates_NW.dtype)], dim=-1))
            return torch.cat([head(x) for head in self.heads], dim=-1).float()


class RankingModel(nn.Module):
    """Tables and interaction; the top of the model stays symbolically traceable, as TorchRec's pipelines ask."""

    def __init__(
        self,
        config: ModelConfig,
        schema: Schema,
        *,
        backend: AttentionBackend,
        attention_dropout: float,
        mask: MaskSpec,
        autocast_dtype: torch.dtype | None,
        sequence_embeddings: SequenceEmbeddings,
        context_embeddings: PooledEmbeddings,
    ) -> None:
        super().__init__()
        self.sequence_embeddings = sequence_embeddings
        self.context_embeddings = context_embeddings
        mixers: dict[MixerKind, Callable[[], Mixer]] = {
            MixerKind.attention: lambda: AttentionMixer(backend, attention_dropout),
            MixerKind.target: lambda: TargetMixer(backend, attention_dropout),
            MixerKind.mean_pool: MeanPoolMixer,
        }
        mixer = mixers[config.mixer]()
        self.interaction = Interaction(config, schema, mixer, mask, autocast_dtype)

    def forward(self, batch: Batch) -> Tensor:
        """Logits `(N, T)`."""
        sequences = self.sequence_embeddings(batch.sequences)
        context = self.context_embeddings(batch.context)
        return self.interaction(batch, sequences, context)


class RankingLoss(nn.Module):
    """Mean binary cross-entropy over the candidates of all ranks and over tasks.

    Gradients are averaged over ranks, and ranks hold different numbers of candidates, so a rank's sum is divided by
    `candidates of all ranks / ranks`; a rank without candidates adds zero.
    """

    def forward(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Predictions]:
        summed = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")
        count = torch.full((), float(logits.numel()), device=logits.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        loss = summed / count.clamp(min=1.0)
        return loss, Predictions(loss.detach(), logits.detach(), batch)


class RankingTask(nn.Module):
    """Model and loss: what a training pipeline runs."""

    def __init__(self, model: RankingModel) -> None:
        super().__init__()
        self.model = model
        self.loss = RankingLoss()

    def forward(self, batch: Batch) -> tuple[Tensor, Predictions]:
        """The loss to differentiate, and what to report."""
        return self.loss(self.model(batch), batch)


def _total_dim(features: tuple[Feature, ...], dims: dict[str, int]) -> int:
    return sum(dims[feature.table] for feature in features)


def _head(in_width: int, hidden_widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden_widths:
        layers += [nn.Linear(in_width, width), nn.SiLU()]
        in_width = width
    return nn.Sequential(*layers, nn.Linear(in_width, 1))
