"""Sharders for this project's tables, and the replicated sequence tables that TorchRec lacks on a CPU.

TorchRec's `data_parallel` lookup for an `EmbeddingCollection` runs FBGEMM's dense table-batched embedding.
Its CPU operator knows no unpooled mode: it sums every bag and returns `features * users` rows whatever the
lengths, which fails one step later in `split_with_sizes`
(docs/decisions/0002-replicated-sequence-tables.md). Here the lookup is `F.embedding` per table instead;
everything around it (state dict names, DDP's all-reduce of the dense gradients, the pipeline) stays
TorchRec's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import BaseEmbeddingLookup
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.dp_sequence_sharding import DpSequenceEmbeddingSharding
from torchrec.distributed.types import ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.sharding.config import ComputeKernel


class ReplicatedLookup(BaseEmbeddingLookup[KeyedJaggedTensor, Tensor]):
    """Whole tables on every rank, one row per id, dense gradients."""

    def __init__(self, tables: list[ShardedEmbeddingTable], device: torch.device | None) -> None:
        super().__init__()
        self.num_features = [table.num_features() for table in tables]
        self.names = [table.name for table in tables]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(table.num_embeddings, table.embedding_dim, device=device)) for table in tables
        )

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Rows of all features in their order, flattened, as the other lookups return them."""
        by_table = sparse_features.split(self.num_features)
        rows = [F.embedding(ids.values(), w) for ids, w in zip(by_table, self.weights, strict=True)]
        return torch.cat(rows).view(-1)

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What TorchRec registers as `embeddings.<table>.weight`."""
        yield from zip(self.names, self.weights, strict=True)

    def flush(self) -> None:
        """There is no cache to write back."""

    def purge(self) -> None:
        """There is no cache to drop."""


class ReplicatedSequenceSharding(DpSequenceEmbeddingSharding):
    """TorchRec's `data_parallel` for sequences, with the lookup above."""

    def create_lookup(self, device: torch.device | None = None, *_: Any, **__: Any) -> ReplicatedLookup:
        return ReplicatedLookup(self.embedding_tables(), device if device is not None else self._device)


class _ShardedSequences(ShardedEmbeddingCollection):
    """TorchRec's, with replicated tables that work on a CPU and batches without users."""

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        """TorchRec reshapes lengths to `(-1, stride)`, ambiguous for stride 0: look up nothing for a user."""
        return super().input_dist(ctx, one_user_without_ids(features) if features.stride() == 0 else features)

    @classmethod
    def create_embedding_sharding(cls, sharding_type: str, sharding_infos: Any, env: Any, **options: Any) -> Any:
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return ReplicatedSequenceSharding(sharding_infos, env, options.get("device"))
        return super().create_embedding_sharding(
            sharding_type=sharding_type, sharding_infos=sharding_infos, env=env, **options
        )


def one_user_without_ids(empty: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The keys of a batch without users, with a user who has no ids: just as many tokens, none."""
    keys = empty.keys()
    return KeyedJaggedTensor(
        keys=keys,
        values=empty.values(),
        lengths=empty.lengths().new_zeros(len(keys)),
        stride=1,
        length_per_key=[0] * len(keys),
        offset_per_key=[0] * (len(keys) + 1),
    )


class _KnownKernels:
    """Offers only kernels that this project configures and tests."""

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        offered = super().compute_kernels(sharding_type, compute_device_type)  # type: ignore[misc]
        return [kernel.value for kernel in ComputeKernel if kernel.value in offered]


class SequenceSharder(_KnownKernels, EmbeddingCollectionSharder):
    """Shards `EmbeddingCollection`s."""

    def shard(self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: Any = None) -> Any:
        return _ShardedSequences(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
        )


class _ShardedBags(ShardedEmbeddingBagCollection):
    """TorchRec's, for batches without users: they give one row, of a user without ids, to be cut off."""

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        """As for sequences: `(-1, stride)` is ambiguous for stride 0."""
        return super().input_dist(ctx, one_user_without_ids(features) if features.stride() == 0 else features)


class PooledSharder(_KnownKernels, EmbeddingBagCollectionSharder):
    """Shards `EmbeddingBagCollection`s, but never as a grid, where TorchRec 1.6.1 pools wrongly (docs/sharding.md)."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        offered = super().sharding_types(compute_device_type)
        return [kind for kind in offered if kind != ShardingType.GRID_SHARD.value]

    def shard(self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: Any = None) -> Any:
        return _ShardedBags(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )


def sharder_of(pooled: bool) -> SequenceSharder | PooledSharder:
    """The sharder of a kind of table."""
    return PooledSharder() if pooled else SequenceSharder()
