"""From a checked config to a TorchRec plan, the same on every rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, Topology, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from recsys.embeddings import Table, tables_of
from recsys.sharding.config import ComputeKernel, ShardingConfig, ShardingKind

GIB = 1024**3


def make_topology(config: ShardingConfig, device: torch.device, world_size: int) -> Topology:
    """What the planner may fill: device memory on a GPU, host memory for tables kept there and on a CPU."""
    local_world_size = get_local_size(world_size)
    device_memory = 0
    if device.type == "cuda":
        device_memory = torch.cuda.get_device_properties(device).total_memory
        if config.device_memory_gib_per_rank is not None:
            device_memory = int(config.device_memory_gib_per_rank * GIB)
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world_size
    if config.host_memory_gib_per_rank is not None:
        host_memory = int(config.host_memory_gib_per_rank * GIB)
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=local_world_size,
            hbm_cap_bytes=device_memory,
            ddr_cap_bytes=host_memory,
        ),
        kernel_config=KernelConfig(compute_device=device.type),
    )


def make_constraints(
    tables: Mapping[str, Table], config: ShardingConfig, world_size: int, mean_lengths: Mapping[str, float]
) -> dict[str, ParameterConstraints]:
    """The config in the planner's words.

    Args:
        mean_lengths: ids per user by feature, for the planner's estimates of traffic; 1 where missing.
    """
    constraints = {}
    for table in tables.values():
        asked = config.of(table)
        kind, kernel = asked.sharding_type, asked.compute_kernel
        constraints[table.name] = ParameterConstraints(
            sharding_types=None if kind is ShardingKind.auto else [kind.value],
            compute_kernels=None if kernel is ComputeKernel.auto else [kernel.value],
            min_partition=config.column_shard_dim or -(-table.dim // world_size),
            pooling_factors=[mean_lengths.get(feature, 1.0) for feature in table.features],
        )
    return constraints


def make_plan(
    model: nn.Module,
    config: ShardingConfig,
    sharders: list[ModuleSharder[Any]],
    *,
    device: torch.device,
    group: dist.ProcessGroup,
    batch_size: int,
    mean_lengths: Mapping[str, float],
) -> ShardingPlan:
    """Plan on rank 0 and tell all ranks, whether it worked or not.

    TorchRec's own `collective_plan` tells them only when it worked; otherwise the others wait for ever.

    Raises:
        ValueError: no plan fits, on every rank, with the planner's reasons.
    """
    world_size = dist.get_world_size(group)
    result: list[ShardingPlan | str | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            planner = EmbeddingShardingPlanner(
                topology=make_topology(config, device, world_size),
                batch_size=batch_size,
                storage_reservation=FixedPercentageStorageReservation(percentage=config.reserved_memory_fraction),
                constraints=make_constraints(tables_of(model), config, world_size, mean_lengths),
                debug=False,
            )
            result = [planner.plan(model, sharders)]
        except Exception as error:  # whatever it is, the other ranks have to hear of it
            result = [f"no sharding plan fits: {type(error).__name__}: {error}"]
    dist.broadcast_object_list(result, src=dist.get_global_rank(group, 0), group=group, device=device)
    if not isinstance(result[0], ShardingPlan):
        raise ValueError(result[0])
    return result[0]
