"""Checks of a sharding config that need no other rank, so that every rank refuses it by itself."""

from __future__ import annotations

from torch import nn

from recsys.embeddings import SparseOptimizerConfig, SparseOptimizerName, Table, tables_of
from recsys.sharding.config import ComputeKernel, ShardingConfig, ShardingKind
from recsys.sharding.replicated import sharder_of

COLUMN_KINDS = (ShardingKind.column_wise, ShardingKind.table_column_wise)
ROW_KINDS = (ShardingKind.row_wise, ShardingKind.table_row_wise)


def check_sharding(
    model: nn.Module,
    config: ShardingConfig,
    device_type: str,
    world_size: int,
    optimizer: SparseOptimizerConfig | None = None,
) -> None:
    """Refuse what TorchRec can't do with these tables on this device, before any rank plans or waits for
    another.

    Args:
        model: holds `SequenceEmbeddings` and `PooledEmbeddings`.
        config: the plan asked for.
        device_type: `cpu` or `cuda`.
        world_size: ranks that tables are laid out over.
        optimizer: of the tables; not checked without it.

    Raises:
        ValueError: an override names no table, or a table's sharding type, kernel or column width can't be
            had; the message names the table, what was asked and what is allowed (what the sharders
            themselves offer).
    """
    tables = tables_of(model)
    unknown = sorted(set(config.tables) - set(tables))
    if unknown:
        raise ValueError(f"sharding.tables names unknown tables {unknown}: there are {sorted(tables)}")
    for table in tables.values():
        _check_type_and_kernel(table, config, device_type)
        _check_shape(table, config, world_size)
        if optimizer is not None:
            _check_optimizer(table, config, device_type, optimizer)


def _check_type_and_kernel(table: Table, config: ShardingConfig, device_type: str) -> None:
    asked = config.of(table)
    sharder = sharder_of(table.pooled)
    where = f"{'pooled' if table.pooled else 'sequence'} table {table.name!r} on {device_type}"
    types = sharder.sharding_types(device_type)
    if asked.sharding_type is not ShardingKind.auto:
        if asked.sharding_type.value not in types:
            raise ValueError(
                f"{where}: sharding_type={asked.sharding_type.value} can't be had; allowed are {['auto', *types]}"
            )
        types = [asked.sharding_type.value]
    if asked.compute_kernel is ComputeKernel.auto:
        return
    kernels = sorted({kernel for type_ in types for kernel in sharder.compute_kernels(type_, device_type)})
    if asked.compute_kernel.value not in kernels:
        raise ValueError(
            f"{where}: compute_kernel={asked.compute_kernel.value} can't be had with "
            f"sharding_type={asked.sharding_type.value}; allowed are {['auto', *kernels]}"
        )


def _check_shape(table: Table, config: ShardingConfig, world_size: int) -> None:
    kind = config.of(table).sharding_type
    width = config.column_shard_dim
    if kind in COLUMN_KINDS and width is not None and table.dim % width:
        allowed = [dim for dim in range(4, table.dim + 1, 4) if table.dim % dim == 0]
        raise ValueError(
            f"table {table.name!r} has dimension {table.dim}, which column_shard_dim={width} doesn't divide; "
            f"allowed are null and {allowed}"
        )
    if kind in ROW_KINDS and table.rows < world_size:
        raise ValueError(
            f"table {table.name!r} has {table.rows} rows, too few for {kind.value} over {world_size} ranks; "
            "choose another sharding_type for it under sharding.tables"
        )


def _check_optimizer(table: Table, config: ShardingConfig, device_type: str, optimizer: SparseOptimizerConfig) -> None:
    """FBGEMM fuses Adam on GPUs only; replicated tables have an optimizer of our own."""
    kind = config.of(table).sharding_type
    only_gpu = optimizer.name is SparseOptimizerName.adam
    if device_type == "cpu" and only_gpu and kind is not ShardingKind.data_parallel:
        allowed = [name.value for name in SparseOptimizerName if name is not SparseOptimizerName.adam]
        raise ValueError(
            f"optimizer.sparse.name=adam isn't fused on a CPU, which table {table.name!r} with "
            f"sharding_type={kind.value} needs; allowed are {allowed}, or sharding_type=data_parallel"
        )
