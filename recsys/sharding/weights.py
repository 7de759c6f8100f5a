"""Weights of tables on this rank, and their initialisation, which is the same under every plan."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.embeddings import Table, tables_of

CHUNK_ELEMENTS = 1 << 22
"""Elements initialised at a time: bounds the temporary memory to about 100 MB."""


@dataclass(frozen=True)
class LocalShard:
    """A part of a table on this rank.

    Attributes:
        table: the whole.
        key: name of the table's weight in the state dict.
        weight: a view of the part; writing to it changes the table.
        row, column: where the part begins in the whole.
        replicated: whether every rank holds the whole table.
    """

    table: Table
    key: str
    weight: Tensor
    row: int
    column: int
    replicated: bool


def local_shards(model: nn.Module) -> Iterator[LocalShard]:
    """Every part of every table that this rank holds. Rows cached on the GPU are written back first."""
    tables = tables_of(model)
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if len(parts) < 3 or parts[-3] not in ("embeddings", "embedding_bags") or parts[-2] not in tables:
            continue
        table = tables[parts[-2]]
        if isinstance(value, ShardedTensor):
            for part in value.local_shards():
                row, column = part.metadata.shard_offsets
                yield LocalShard(table, key, part.tensor.detach(), row, column, False)
        else:
            # The plain view: TorchRec's parameter subclass for slices would follow into every result.
            yield LocalShard(table, key, value.detach().as_subclass(Tensor), 0, 0, True)


@torch.no_grad()
def init_tables(model: nn.Module, seed: int) -> None:
    """Fill every table with what depends on seed, table name and position only, not on plan, ranks or device.

    Weights are uniform with mean 0 and the table's `init_std`.
    """
    for shard in local_shards(model):
        rows, columns = shard.weight.shape
        if rows * columns == 0:
            continue
        column = torch.arange(shard.column, shard.column + columns, device=shard.weight.device)
        bound = math.sqrt(3.0) * shard.table.init_std
        chunk_rows = max(1, CHUNK_ELEMENTS // columns)
        for start in range(0, rows, chunk_rows):
            stop = min(rows, start + chunk_rows)
            row = torch.arange(shard.row + start, shard.row + stop, device=shard.weight.device)
            position = row.unsqueeze(1) * shard.table.dim + column
            uniform = _hash_to_unit(position, _table_seed(seed, shard.table.name))
            shard.weight[start:stop] = (2.0 * uniform - 1.0) * bound


def _table_seed(seed: int, name: str) -> int:
    return (seed * 0x9E3779B1 + zlib.crc32(name.encode())) & 0x7FFF_FFFF_FFFF_FFFF


def _hash_to_unit(position: Tensor, seed: int) -> Tensor:
    """float32 in [0, 1) from int64: SplitMix64's finaliser (Steele et al. 2014), 24 of its bits."""
    golden, mix1, mix2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
    z = (position + seed) * golden
    z = (z ^ _shift_right(z, 30)) * mix1
    z = (z ^ _shift_right(z, 27)) * mix2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).float() * 2.0**-24


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
