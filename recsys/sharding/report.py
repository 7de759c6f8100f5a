"""The plan in force, as a table to read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torchrec.distributed.types import ParameterSharding, ShardingPlan

from recsys.embeddings import SparseOptimizerConfig, Table, tables_of
from recsys.tables import format_table

MIB = 1024**2
BYTES_PER_FLOAT = 4
HEADINGS = ("table", "kind", "rows", "dim", "sharding", "ranks", "MiB per rank", "kernel")
NUMERIC = (False, False, True, True, False, False, False, False)


@dataclass(frozen=True)
class Placement:
    """Rows and columns of one shard and the rank that holds it."""

    rank: int
    rows: int
    columns: int


def placements(table: Table, sharding: ParameterSharding, world_size: int) -> list[Placement]:
    """Where a table's shards are; a replicated table is one shard on every rank."""
    spec = sharding.sharding_spec
    if spec is None:
        return [Placement(rank, table.rows, table.dim) for rank in range(world_size)]
    shards = spec.shards  # type: ignore[attr-defined]
    return [Placement(shard.placement.rank(), *shard.shard_sizes) for shard in shards]


def mib_per_rank(
    table: Table, sharding: ParameterSharding, world_size: int, optimizer: SparseOptimizerConfig | None
) -> list[float]:
    """Weights and, if the optimizer is known, its state, in float32, by rank."""
    mib = [0.0] * world_size
    for shard in placements(table, sharding, world_size):
        floats_per_row = shard.columns
        if optimizer is not None:
            floats_per_row += optimizer.state_floats_per_row(shard.columns)
        mib[shard.rank] += shard.rows * floats_per_row * BYTES_PER_FLOAT / MIB
    return mib


def format_plan(
    plan: ShardingPlan, model: nn.Module, world_size: int, optimizer: SparseOptimizerConfig | None = None
) -> str:
    """The plan as an aligned table with a line of totals; memory counts weights and optimizer state.

    Args:
        plan: what TorchRec planned.
        model: the model, before or after sharding.
        world_size: ranks.
        optimizer: of the tables; without it memory counts weights only.
    """
    tables = tables_of(model)
    lines: list[tuple[str, ...]] = []
    totals = [0.0] * world_size
    for module_plan in plan.plan.values():
        for name, sharding in module_plan.items():  # type: ignore[attr-defined]
            table = tables[name]
            mib = mib_per_rank(table, sharding, world_size, optimizer)
            totals = [total + part for total, part in zip(totals, mib, strict=True)]
            ranks = sorted({shard.rank for shard in placements(table, sharding, world_size)})
            lines.append(
                (
                    name,
                    "pooled" if table.pooled else "sequence",
                    f"{table.rows:,}",
                    str(table.dim),
                    sharding.sharding_type,
                    _range(ranks),
                    _spread(mib),
                    sharding.compute_kernel,
                )
            )
    what = "weights and optimizer state" if optimizer is not None else "weights"
    footer = f"{what}: {_spread(totals)} MiB per rank on {world_size} rank{'s' if world_size > 1 else ''}"
    return format_table(HEADINGS, sorted(lines), NUMERIC) + "\n" + footer


def _range(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(str(rank) for rank in ranks)


def _spread(mib: list[float]) -> str:
    """One number where all ranks agree, else the least and the most."""
    least, most = (f"{value:,.2f}" if value >= 1 else f"{value:.3g}" for value in (min(mib), max(mib)))
    return most if least == most else f"{least} to {most}"
