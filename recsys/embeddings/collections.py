"""TorchRec collections of embedding tables behind two modules, and the one helper that reads what they
return.

Both modules live at the top of the model and only hand a `KeyedJaggedTensor` to collections: TorchRec's train
pipeline traces the model symbolically down to its sharded collections, and can start the exchange of the next
batch's ids only when a collection's input is an attribute of the batch. Whoever needs values calls
`merge_features` below the traced part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.schema import Feature, Schema

DEFAULT_INIT_STD = 0.02


class Pooling(Enum):
    """How the rows of a pooled feature become one row per user; no ids give zeros either way."""

    mean = "mean"
    sum = "sum"


@dataclass(frozen=True)
class Table:
    """One embedding table, whatever becomes of it on the devices.

    Attributes:
        name: unique in the model.
        rows, dim: its shape.
        features: the keys that read it.
        pooled: whether it gives a row per user instead of one per token.
        init_std: standard deviation of the uniform distribution that its weights start from.
    """

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    pooled: bool
    init_std: float


class SequenceEmbeddings(nn.Module):
    """One row per token for history and candidate features, which share tables.

    An `EmbeddingCollection` wants one dimension for all its tables, so there is one per dimension, named
    after it: a table keeps its name in state dicts, `collections.dim_64.embeddings.item.weight`, under
    every sharding plan. Weights are on the meta device until `recsys.sharding.shard` places and fills them.

    Args:
        schema: the features and the rows of the tables.
        dims: embedding dimension by table; multiples of 4.
        init_std: see `Table`.
    """

    def __init__(self, schema: Schema, dims: Mapping[str, int], *, init_std: float = DEFAULT_INIT_STD) -> None:
        super().__init__()
        self.tables = _tables(schema, schema.sequences, dims, init_std, pooled=False)
        self.collections = nn.ModuleDict(
            {
                f"dim_{dim}": EmbeddingCollection(
                    tables=[
                        EmbeddingConfig(
                            name=table.name,
                            num_embeddings=table.rows,
                            embedding_dim=dim,
                            feature_names=list(table.features),
                        )
                        for table in self.tables
                        if table.dim == dim
                    ],
                    device=torch.device("meta"),
                )
                for dim in sorted({table.dim for table in self.tables})
            }
        )

    def forward(self, sequences: KeyedJaggedTensor) -> list[Any]:
        """Per collection a dict of feature to `JaggedTensor` (values `(tokens, dim)`), or its promise."""
        return [collection(sequences) for collection in self.collections.values()]


class PooledEmbeddings(nn.Module):
    """One row per user for context features.

    An `EmbeddingBagCollection` takes tables of any dimension, so there is one, or none for a schema without
    context.

    Args:
        schema, dims, init_std: as for `SequenceEmbeddings`.
        pooling: how the rows of a user's ids become one.
    """

    def __init__(
        self,
        schema: Schema,
        dims: Mapping[str, int],
        *,
        pooling: Pooling = Pooling.mean,
        init_std: float = DEFAULT_INIT_STD,
    ) -> None:
        super().__init__()
        self.tables = _tables(schema, schema.context, dims, init_std, pooled=True)
        self.collections = nn.ModuleDict()
        if self.tables:
            self.collections["bags"] = EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=table.name,
                        num_embeddings=table.rows,
                        embedding_dim=table.dim,
                        feature_names=list(table.features),
                        pooling=PoolingType.MEAN if pooling is Pooling.mean else PoolingType.SUM,
                    )
                    for table in self.tables
                ],
                device=torch.device("meta"),
            )

    def forward(self, context: KeyedJaggedTensor) -> list[Any]:
        """At most one `KeyedTensor` of feature to `(B, dim)`, or the promise of one."""
        return [collection(context) for collection in self.collections.values()]


def merge_features(collections: Iterable[Any], num_users: int | None = None) -> dict[str, Tensor]:
    """What either module returned, as one dict: feature to `(tokens, dim)` or, for pooled features, `(B, dim)`.

    Waits for the exchange of embeddings where it is still under way, so call it as late as possible.

    Args:
        collections: what the module returned.
        num_users: `B`, for pooled features: sharded ones have a row too many for a batch without users
            (recsys/sharding/replicated.py).
    """
    values: dict[str, Tensor] = {}
    for features in collections:
        # Sharded collections return a stand-in that waits, once, when an attribute is asked for.
        if hasattr(features, "to_dict"):
            values.update({key: rows[:num_users] for key, rows in features.to_dict().items()})
        else:
            values.update({key: rows.values() for key, rows in features.items()})
    return values


def tables_of(model: nn.Module) -> dict[str, Table]:
    """Every table of a model by name, before and after sharding."""
    return {
        table.name: table
        for module in model.modules()
        if isinstance(module, SequenceEmbeddings | PooledEmbeddings)
        for table in module.tables
    }


def _tables(
    schema: Schema, features: tuple[Feature, ...], dims: Mapping[str, int], init_std: float, *, pooled: bool
) -> tuple[Table, ...]:
    """The tables that `features` read, in the order of their first reader."""
    if init_std < 0:
        raise ValueError(f"init_std is {init_std}: allowed are values >= 0")
    tables = []
    for name in dict.fromkeys(feature.table for feature in features):
        if name not in dims:
            raise ValueError(f"no embedding dimension for table {name!r}: there are some for {sorted(dims)}")
        if dims[name] < 4 or dims[name] % 4:
            raise ValueError(f"table {name!r} has embedding dimension {dims[name]}: allowed are multiples of 4")
        readers = tuple(feature.name for feature in features if feature.table == name)
        tables.append(Table(name, schema.tables[name], dims[name], readers, pooled, init_std))
    return tuple(tables)
