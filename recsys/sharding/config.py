"""The config group `sharding`: how tables are laid out over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from recsys.embeddings import Table


class ShardingKind(Enum):
    """TorchRec's sharding types, and `auto`: the planner decides. Which exist depends on table and device."""

    auto = "auto"
    table_wise = "table_wise"
    row_wise = "row_wise"
    column_wise = "column_wise"
    table_row_wise = "table_row_wise"
    table_column_wise = "table_column_wise"
    data_parallel = "data_parallel"


class ComputeKernel(Enum):
    """Where rows are kept and updated, and `auto`: the planner decides."""

    auto = "auto"
    fused = "fused"
    """In device memory, updated in the backward of the lookup."""
    fused_uvm = "fused_uvm"
    """In host memory that the GPU reads directly."""
    fused_uvm_caching = "fused_uvm_caching"
    """In host memory, with the rows in use cached on the GPU."""
    dense = "dense"
    """Replicated on every rank, with dense gradients: the kernel of `data_parallel`."""


@dataclass
class TableSharding:
    """What is asked of one table, or of one kind of table."""

    sharding_type: ShardingKind = ShardingKind.auto
    """How the table is cut."""

    compute_kernel: ComputeKernel = ComputeKernel.auto
    """Where its rows are kept."""


@dataclass
class ShardingConfig:
    """How tables are laid out over ranks."""

    name: str = "auto"
    """Name of the plan, for run directories and reports."""

    sequence: TableSharding = field(default_factory=TableSharding)
    """Sequence tables: history and candidates."""

    pooled: TableSharding = field(default_factory=TableSharding)
    """Pooled tables: context."""

    tables: dict[str, Any] = field(default_factory=dict)
    """Tables that are laid out differently, by name; each a `TableSharding`."""

    column_shard_dim: int | None = None
    """Columns of a shard where a table is cut by columns; a multiple of 4 that divides the table's dimension.
    `null`: the smallest such that gives no more shards than ranks."""

    device_memory_gib_per_rank: float | None = None
    """What the planner may fill on a GPU, GiB; `null`: all of its memory."""

    host_memory_gib_per_rank: float | None = None
    """The same for host memory, which holds all tables on a CPU; `null`: this host's, shared by its ranks."""

    reserved_memory_fraction: float = 0.25
    """Part of that memory kept free for the dense model, its optimizer and activations."""

    def __post_init__(self) -> None:
        # Hydra can't add a dataclass to a dict from the command line, so what it adds becomes one here.
        self.tables = {table: _table_sharding(table, asked) for table, asked in self.tables.items()}
        if self.column_shard_dim is not None and (self.column_shard_dim < 4 or self.column_shard_dim % 4):
            raise ValueError(
                f"sharding.column_shard_dim is {self.column_shard_dim}: allowed are null and multiples of 4"
            )
        for name in ("device_memory_gib_per_rank", "host_memory_gib_per_rank"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"sharding.{name} is {value}: allowed are null and values > 0")
        if not 0.0 <= self.reserved_memory_fraction < 1.0:
            raise ValueError(
                f"sharding.reserved_memory_fraction is {self.reserved_memory_fraction}: allowed are 0 <= fraction < 1"
            )

    def of(self, table: Table) -> TableSharding:
        """What is asked of `table`."""
        asked: TableSharding = self.tables.get(table.name, self.pooled if table.pooled else self.sequence)
        return asked


def _table_sharding(table: str, asked: Any) -> TableSharding:
    if isinstance(asked, TableSharding):
        return asked
    kinds: dict[str, type[Enum]] = {"sharding_type": ShardingKind, "compute_kernel": ComputeKernel}
    if not isinstance(asked, dict) or set(asked) - set(kinds):
        raise ValueError(f"sharding.tables.{table} is {asked}: allowed are the keys {', '.join(kinds)}")
    values: dict[str, Any] = {}
    for key, value in asked.items():
        name = value.value if isinstance(value, Enum) else value
        allowed = [kind.value for kind in kinds[key]]
        if name not in allowed:
            raise ValueError(f"sharding.tables.{table}.{key} is {name}: allowed are {', '.join(allowed)}")
        values[key] = kinds[key](name)
    return TableSharding(**values)
