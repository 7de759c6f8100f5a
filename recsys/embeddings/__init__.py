"""Embedding tables: sequence tables (one row per token) and pooled tables (one row per user)."""

from recsys.embeddings.collections import (
    PooledEmbeddings,
    SequenceEmbeddings,
    Table,
    merge_features,
    tables_of,
)
from recsys.embeddings.optimizer import SparseOptimizerConfig, SparseOptimizerName, apply_sparse_optimizer

__all__ = [
    "PooledEmbeddings",
    "SequenceEmbeddings",
    "SparseOptimizerConfig",
    "SparseOptimizerName",
    "Table",
    "apply_sparse_optimizer",
    "merge_features",
    "tables_of",
]
