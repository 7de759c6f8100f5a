"""Embedding tables as a checkpoint sees them: the boxes of weights and optimizer states that this rank holds.

Names and shapes don't depend on the plan (R rows, D columns, C ranges of columns with own row states):

    tables/<table>/weight         (R, D)
    tables/<table>/<state>        (R, D)    Adagrad `sum`, Adam `exp_avg`, `exp_avg_sq`, SGD `momentum_buffer`
    tables/<table>/row_<state>    (C, R)    row-wise Adagrad `sum`

A row-wise optimizer keeps, for each row, a mean of squared gradients over the columns it sees. Column-wise
sharding makes it see one range of columns at a time, so a table has one such vector for each range. From
the ranges saved to the ranges needed each column keeps its range's value, and a range takes the mean over
its columns. That is exact for coarser ranges (column-wise to whole rows), because a mean over all columns is
the width-weighted mean of the ranges' means; for finer ones (whole rows to column-wise) every new range goes
on from its row's value.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding, BatchedFusedEmbeddingBag

from recsys.sharding.optimizer import ReplicatedTableOptimizer
from recsys.training.checkpoint.planner import Array

FUSED_KERNELS = (BatchedFusedEmbedding, BatchedFusedEmbeddingBag)
FAMILY = {
    "exact_row_wise_adagrad": "rowwise_adagrad",
    "exact_adagrad": "adagrad",
    "exact_sgd": "sgd",
    "RowWiseAdagrad": "rowwise_adagrad",
    "Adagrad": "adagrad",
    "Adam": "adam",
    "AdamW": "adam",
    "SGD": "sgd",
}
"""One name for an optimizer fused into a lookup (FBGEMM's word) and on the dense path (its class)."""


@dataclass
class RowPiece:
    """A row-wise state of some rows and one range of columns: a vector, a view into the live state."""

    values: Tensor
    first_row: int
    columns: tuple[int, int]


@dataclass
class Slot:
    """The place of one parameter in an optimizer that steps outside the lookups."""

    parameter: Tensor
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.optimizer.state.get(self.parameter, {}))

    def put(self, key: str, value: Any) -> None:
        self.optimizer.state.setdefault(self.parameter, {})[key] = value

    @property
    def family(self) -> str:
        """The optimizer's name, the same for a fused one of this rule."""
        if isinstance(self.optimizer, ReplicatedTableOptimizer):
            return self.optimizer.config.name.value
        kind = type(self.optimizer).__name__
        return FAMILY.get(kind, kind)

    @property
    def step(self) -> int:
        """Steps the optimizer has counted for this parameter."""
        if isinstance(self.optimizer, ReplicatedTableOptimizer):
            return self.optimizer.num_steps
        return int(self.state.get("step", 0))

    def table_states(self, table: str) -> dict[str, Tensor]:
        """The states of a table under torch's names; TorchRec's style is `<table>.momentum1`, the first of a rule."""
        first = "exp_avg" if self.family == "adam" else "sum"
        named = {key.removeprefix(f"{table}."): value for key, value in self.state.items() if key != "step"}
        return {
            first if key == "momentum1" else key: value.detach()
            for key, value in named.items()
            if isinstance(value, Tensor)
        }

    @property
    def hyper(self) -> dict[str, float]:
        """The learning rate, which schedules move; other settings are configuration, not state."""
        return {key: float(self.group[key]) for key in ("lr", "initial_lr") if key in self.group}

    def set_hyper(self, hyper: dict[str, float]) -> None:
        """Take the learning rate over, for the parameter's whole group."""
        for key in ("lr", "initial_lr"):
            if key in hyper and isinstance(self.group.get(key), Tensor):
                self.group[key].fill_(hyper[key])
            elif key in hyper and (key == "lr" or key in self.group):
                self.group[key] = hyper[key]


@dataclass
class Table:
    """One table and what this rank holds of it, perhaps nothing."""

    name: str
    rows: int
    dim: int
    dtype: torch.dtype
    optimizer: str | None = None
    """Family of its optimizer; `None` where this rank holds no part, `"none"` for a frozen table."""
    bounds: list[int] = field(default_factory=list)
    """Column ranges with row states of their own: `[0, D]`, or `[0, D/2, D]` under two column shards."""
    weight: Array = field(init=False)
    states: dict[str, Array] = field(default_factory=dict)
    row_states: dict[str, list[RowPiece]] = field(default_factory=dict)
    kernels: list[Any] = field(default_factory=list)
    """Fused kernels that hold parts of the table."""
    slot: Slot | None = None
    """Place in a dense-path optimizer, for a replicated table."""

    def __post_init__(self) -> None:
        self.weight = Array((self.rows, self.dim))

    @property
    def step(self) -> int:
        """Steps the optimizer has counted (Adam's bias correction)."""
        if self.slot is not None:
            return self.slot.step
        return max(
            (max(int(k.emb_module.iter.item()), int(k.emb_module.iter_cpu.item())) for k in self.kernels),
            default=0,
        )

    @property
    def hyper(self) -> dict[str, float]:
        if self.slot is not None:
            return self.slot.hyper
        if not self.kernels:
            return {}
        group = self.kernels[0].fused_optimizer.param_groups[0]
        hyper = {key: float(group[key]) for key in ("lr", "initial_lr") if key in group}
        # FBGEMM's own copy; the group's value reaches it at the optimizer's next zero_grad() or step()
        return {**hyper, "applied_lr": self.kernels[0].emb_module.get_learning_rate()}

    def description(self) -> dict[str, Any]:
        """What the manifest says of the table; `optimizer` is `None` where this rank doesn't know."""
        return {
            "rows": self.rows,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "optimizer": self.optimizer,
            "column_bounds": self.bounds,
            "states": sorted(self.states),
            "row_states": sorted(self.row_states),
            "step": self.step,
            "hyper": self.hyper,
        }


def fused_kernels(model: nn.Module) -> Iterator[Any]:
    """The lookups with a fused optimizer; sharded modules keep them in a list, unseen by `modules()`."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):
            yield from (kernel for kernel in lookup.modules() if type(kernel) in FUSED_KERNELS)


def add_fused_parts(table: Table, kernel: Any, index: int) -> None:
    """Add to `table` the shard that is entry `index` of a fused kernel."""
    config, tbe = kernel.config.embedding_tables[index], kernel.emb_module
    row, column = config.local_metadata.shard_offsets
    weight = tbe.split_embedding_weights()[index].detach()
    assert list(weight.shape) == list(config.local_metadata.shard_sizes), (table.name, weight.shape)
    family = tbe.optimizer.value
    table.optimizer = FAMILY.get(family, family)
    table.bounds = sorted({shard.shard_offsets[1] for shard in config.global_metadata.shards_metadata} | {table.dim})
    table.weight.add(weight, (row, column))
    if not any(kernel is known for known in table.kernels):
        table.kernels.append(kernel)
    all_states = tbe.get_optimizer_state()  # one dict for each entry; an empty list for SGD
    for key, state in (all_states[index] if all_states else {}).items():
        if state.dim() == 2:
            table.states.setdefault(key, Array((table.rows, table.dim))).add(state, (row, column))
        elif len(state) == len(weight):
            piece = RowPiece(state, row, (column, column + weight.shape[1]))
            table.row_states.setdefault(key, []).append(piece)


def add_replicated(table: Table, weight: Tensor, slot: Slot | None) -> None:
    """Describe a table that every rank holds whole and that a dense-path optimizer trains."""
    table.bounds = [0, table.dim]
    table.weight.add(weight.detach().as_subclass(Tensor), (0, 0))  # TorchRec has a class for slices
    table.slot = slot
    if slot is None:
        table.optimizer = "none"
        return
    table.optimizer = slot.family
    for key, state in slot.table_states(table.name).items():
        if state.shape == weight.shape and slot.family != "rowwise_adagrad":
            table.states[key] = Array.whole(state)
        elif state.numel() == table.rows:
            table.row_states[key] = [RowPiece(state.view(-1), 0, (0, table.dim))]
        else:
            raise ValueError(
                f"table {table.name}: {slot.family} keeps {key!r} of shape {tuple(state.shape)}: "
                f"allowed are one value for each element or each row"
            )


def row_arrays(table: Table) -> dict[str, Array]:
    """The row-wise states as `(C, R)` arrays, for saving."""
    arrays = {}
    for key, pieces in table.row_states.items():
        array = arrays[f"row_{key}"] = Array((len(table.bounds) - 1, table.rows))
        for piece in pieces:
            array.add(piece.values.unsqueeze(0), (table.bounds.index(piece.columns[0]), piece.first_row))
    return arrays


def convert_columns(saved: Tensor, saved_bounds: list[int], columns: tuple[int, int]) -> Tensor:
    """Row states of a range of columns from those of the ranges saved.

    saved: (C, r). Returns (r,): the mean over the range's columns of the value of each column's saved range.
    """
    first, last = columns
    total = torch.zeros_like(saved[0], dtype=torch.float64)
    for index, (start, stop) in enumerate(pairwise(saved_bounds)):
        overlap = min(last, stop) - max(first, start)
        if overlap == last - first:  # one saved range holds all: its value, to the bit
            return saved[index]
        if overlap > 0:
            total += saved[index].double() * (overlap / (last - first))
    return total.to(saved.dtype)
