"""Where embedding tables live: the config, its checks, the plan, and the model wrapped by it."""

from recsys.sharding.check import check_sharding
from recsys.sharding.config import ComputeKernel, ShardingConfig, ShardingKind, TableSharding
from recsys.sharding.optimizer import ReplicatedTableOptimizer
from recsys.sharding.report import format_plan
from recsys.sharding.shard import ShardedModel, shard

__all__ = [
    "ComputeKernel",
    "ReplicatedTableOptimizer",
    "ShardedModel",
    "ShardingConfig",
    "ShardingKind",
    "TableSharding",
    "check_sharding",
    "format_plan",
    "shard",
]
