"""What a data set contains: its features, the tables they read, its dense columns and its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """One key of a `KeyedJaggedTensor` and the embedding table it reads."""

    name: str
    """The key; unique in the data set."""
    table: str
    """The table that holds its rows; several features may share one."""


@dataclass(frozen=True)
class Schema:
    """Features by their part in the model, the tables they read, and the columns of `dense` and `labels`.

    History and candidate features may share tables. A table serves sequences (one row per token) or pooled
    context (one row per user), never both: the two live in different TorchRec collections.

    Raises:
        ValueError: a feature names no table, a key comes twice, a table has no rows or serves both kinds.
    """

    history: tuple[Feature, ...]
    """Features of an event; all have the same lengths per user."""
    candidates: tuple[Feature, ...]
    """Features of an item to score; all have the same lengths per user."""
    context: tuple[Feature, ...]
    """Pooled features of a user; each has its own lengths."""
    tables: Mapping[str, int]
    """Rows of every table."""
    num_dense: int
    """Columns of `dense`."""
    tasks: tuple[str, ...]
    """Names of the columns of `labels`."""

    def __post_init__(self) -> None:
        features = (*self.history, *self.candidates, *self.context)
        keys = [feature.name for feature in features]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"feature names must be unique, but {twice} come more than once")
        for feature in features:
            if feature.table not in self.tables:
                raise ValueError(
                    f"feature {feature.name!r} reads table {feature.table!r}, which is not among {sorted(self.tables)}"
                )
        for table, rows in self.tables.items():
            if rows < 1:
                raise ValueError(f"table {table!r} has {rows} rows; at least 1 is needed")
        both = sorted({f.table for f in self.sequences} & {f.table for f in self.context})
        if both:
            raise ValueError(f"tables {both} serve sequences and pooled context; give each kind its own")
        if not self.history or not self.candidates:
            raise ValueError("a schema needs at least one history and one candidate feature")
        if not self.tasks:
            raise ValueError("a schema needs at least one task")
        if self.num_dense < 0:
            raise ValueError(f"num_dense is {self.num_dense}; allowed: 0 or more")

    @property
    def sequences(self) -> tuple[Feature, ...]:
        """History features, then candidate features: the order of the keys in `Batch.sequences`."""
        return (*self.history, *self.candidates)

    def table_of(self, key: str) -> str:
        """The table that a key reads.

        Raises:
            ValueError: the schema has no such key.
        """
        for feature in (*self.sequences, *self.context):
            if feature.name == key:
                return feature.table
        raise ValueError(f"no feature {key!r}; there are {[f.name for f in (*self.sequences, *self.context)]}")
