"""What a live model and its optimizers hold on this rank, under names that don't depend on the plan.

dense/<parameter or buffer>             replicated tensors of the dense part
optimizer/<parameter>/<state>           their optimizer states
tables/...                              see `recsys.training.checkpoint.tables`
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.optim.fused import FusedOptimizer

from recsys.sharding.optimizer import ReplicatedTableOptimizer
from recsys.training.checkpoint.planner import Array
from recsys.training.checkpoint.tables import (
    RowPiece,
    Slot,
    Table,
    add_fused_parts,
    add_replicated,
    convert_columns,
    fused_kernels,
    row_arrays,
)

TABLE_NAME = re.compile(r"(?:^|\.)(?:embeddings|embedding_bags)\.([^.]+)\.weight$")
"""TorchRec's names of a table, alike in a sharded, a replicated and an unsharded collection."""


@dataclass
class Inventory:
    """Tables, dense tensors and the dense parameters' places in optimizers."""

    tables: dict[str, Table] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    kernels: list[Any] = field(default_factory=list)

    @classmethod
    def take(cls, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> "Inventory":
        """Look through a model and its optimizers.

        Raises:
            ValueError: two tables of one name, an optimizer over a parameter that isn't the model's, two
                optimizers over one parameter, or a value that checkpoints can't hold.
        """
        inventory = cls()
        slots = _slots(model, optimizers)
        for name, value in _clean(model.state_dict().items(), model):
            found = TABLE_NAME.search(name)
            if isinstance(value, (ShardedTensor, DTensor)) or (found and value.dim() == 2):
                assert found is not None, name
                inventory._add_table(found[1], value, slots.get(name))
            elif isinstance(value, Tensor):
                inventory.dense[name] = value
                if name in slots:
                    inventory.slots[name] = slots[name]
            else:
                raise ValueError(
                    f"{name} is a {type(value).__name__}, which checkpoints can't hold: keep it in a tensor"
                )
        for kernel in fused_kernels(model):
            inventory.kernels.append(kernel)
            for index, config in enumerate(kernel.config.embedding_tables):
                add_fused_parts(inventory.tables[config.name], kernel, index)
        return inventory

    def _add_table(self, name: str, value: Any, slot: Slot | None) -> None:
        if name in self.tables:
            raise ValueError(f"two embedding tables are named {name!r}: a checkpoint tells tables apart by name")
        if isinstance(value, ShardedTensor):  # its own size() and dtype warn that the class is deprecated
            (rows, dim), dtype = value.metadata().size, value.metadata().tensor_properties.dtype
        else:
            (rows, dim), dtype = value.shape, value.dtype
        self.tables[name] = table = Table(name, rows, dim, dtype)
        if not isinstance(value, (ShardedTensor, DTensor)):
            add_replicated(table, value, slot)

    def description(self) -> dict[str, Any]:
        """Names and shapes, as the manifest holds them."""
        dense: dict[str, dict[str, Any]] = {}
        for name, tensor in self.dense.items():
            dense[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            if (slot := self.slots.get(name)) is not None:
                states = {
                    key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
                    for key, value in slot.state.items()
                    if isinstance(value, Tensor)
                }
                dense[name] |= {
                    "optimizer": type(slot.optimizer).__name__,
                    "states": states,
                    "hyper": slot.hyper,
                }
        return {"tables": {name: table.description() for name, table in self.tables.items()}, "dense": dense}

    def arrays(self) -> dict[str, Array]:
        """Everything to write."""
        arrays = {f"dense/{name}": Array.whole(tensor) for name, tensor in self.dense.items()}
        for name, slot in self.slots.items():
            for key, value in slot.state.items():
                if isinstance(value, Tensor):
                    arrays[f"optimizer/{name}/{key}"] = Array.whole(value)
        for table in self.tables.values():
            arrays[f"tables/{table.name}/weight"] = table.weight
            for key, array in (table.states | row_arrays(table)).items():
                arrays[f"tables/{table.name}/{key}"] = array
        return arrays

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Optimizer states that are no tensors, by parameter."""
        by_name = {name: slot.state for name, slot in self.slots.items()}
        return {
            name: {k: v for k, v in state.items() if not isinstance(v, Tensor)}
            for name, state in by_name.items()
            if state
        }

    def flush(self) -> None:
        """Write GPU caches of tables in host memory back, so that their views show the present weights."""
        for kernel in self.kernels:
            kernel.flush()

    def purge(self) -> None:
        """Drop GPU caches of tables in host memory, before their weights are replaced."""
        for kernel in self.kernels:
            kernel.purge()


def merge(descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    """One description from all ranks': of each table, the word of a rank that holds a part of it.

    Raises:
        ValueError: no rank knows a table's weights.
    """
    merged = {"tables": dict(descriptions[0]["tables"]), "dense": descriptions[0]["dense"]}
    for name in merged["tables"]:
        known = [d["tables"][name] for d in descriptions if d["tables"][name]["optimizer"] is not None]
        if not known:
            raise ValueError(
                f"table {name} has a compute kernel that checkpoints can't read: allowed are "
                f"fused, fused_uvm, fused_uvm_caching and, for replicated tables, dense"
            )
        merged["tables"][name] = known[0]
    return merged


@dataclass
class Loading:
    """What to read for an inventory from a checkpoint, and what to do once it is read."""

    arrays: dict[str, Array] = field(default_factory=dict)
    then: list[Callable[[], None]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    afresh: set[str] = field(default_factory=set)
    """Tables whose optimizer doesn't take the saved state over."""


def plan_loading(inventory: Inventory, manifest: dict[str, Any], scalars: dict[str, dict[str, Any]]) -> Loading:
    """Line up the live tensors with what a (matching) checkpoint holds."""
    loading = Loading()
    for name, tensor in inventory.dense.items():
        loading.arrays[f"dense/{name}"] = Array.whole(tensor)
        saved, slot = manifest["dense"][name], inventory.slots.get(name)
        if slot is not None and saved.get("optimizer") == type(slot.optimizer).__name__:
            for key, spec in saved["states"].items():
                state = _state_tensor(slot, key, spec["shape"], spec["dtype"])
                loading.arrays[f"optimizer/{name}/{key}"] = Array.whole(state)
            for key, value in scalars.get(name, {}).items():
                slot.put(key, value)
            slot.set_hyper(saved["hyper"])
        elif slot is not None:
            loading.messages.append(
                f"{name}: its optimizer starts afresh, the checkpoint has {saved.get('optimizer')}'s state"
            )
    for table in inventory.tables.values():
        _plan_table(loading, table, manifest["tables"][table.name])
    for kernel in inventory.kernels:
        names = {config.name for config in kernel.config.embedding_tables}
        saved_tables = [manifest["tables"][name] for name in sorted(names - loading.afresh)]
        if saved_tables:
            loading.then.append(partial(_set_counters, kernel, saved_tables))
    return loading


def optimizers_differ(saved: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether a table's saved optimizer state is of no use to the optimizer of the run.

    A dense-path optimizer that hasn't stepped may have no states yet; it takes those that are saved.
    """
    states, own = (set(d["states"] + [f"row_{key}" for key in d["row_states"]]) for d in (saved, here))
    return saved["optimizer"] != here["optimizer"] or bool(states and own and states != own)


def _plan_table(loading: Loading, table: Table, saved: dict[str, Any]) -> None:
    loading.arrays[f"tables/{table.name}/weight"] = table.weight
    if table.optimizer is None:
        return
    if optimizers_differ(saved, table.description()):
        loading.messages.append(
            f"table {table.name}: its optimizer starts afresh, the checkpoint has the state of {saved['optimizer']}"
        )
        loading.afresh.add(table.name)
        return
    if table.slot is not None:
        _make_replicated_states(table, table.slot, saved)
        table.slot.set_hyper(saved["hyper"])
    for key in saved["states"]:
        if key in table.states:
            loading.arrays[f"tables/{table.name}/{key}"] = table.states[key]
    for key in saved["row_states"]:
        if key in table.row_states:
            _plan_row_state(loading, table, key, saved)


def _plan_row_state(loading: Loading, table: Table, key: str, saved: dict[str, Any]) -> None:
    """Read a row state directly where column ranges agree, and through `convert_columns` where they don't."""
    name, bounds = f"tables/{table.name}/row_{key}", saved["column_bounds"]
    if bounds == table.bounds:
        loading.arrays[name] = row_arrays(table)[f"row_{key}"]
        return
    array = loading.arrays[name] = Array((len(bounds) - 1, table.rows))
    buffers: dict[tuple[int, int], Tensor] = {}
    for piece in table.row_states[key]:
        box = (piece.first_row, len(piece.values))
        if box not in buffers:  # the column shards of one rank share rows
            buffers[box] = piece.values.new_empty(len(bounds) - 1, len(piece.values))
            array.add(buffers[box], (0, piece.first_row))

        loading.then.append(partial(_fill_converted, piece, buffers[box], bounds))
    before, now = len(bounds) - 1, len(table.bounds) - 1
    loading.messages.append(
        f"table {table.name}: {key} of its rows converted from {before} range(s) of columns to {now}"
    )


def _fill_converted(piece: RowPiece, saved: Tensor, bounds: list[int]) -> None:
    piece.values.copy_(convert_columns(saved, bounds, piece.columns))


def _make_replicated_states(table: Table, slot: Slot, saved: dict[str, Any]) -> None:
    """Give the slot of a replicated table its states; torch makes most of them at the first step only."""
    dtype = str(table.dtype).removeprefix("torch.")
    for key in set(saved["states"]) - set(table.states):
        table.states[key] = Array.whole(_state_tensor(slot, key, [table.rows, table.dim], dtype))
    for key in set(saved["row_states"]) - set(table.row_states):
        state = _state_tensor(slot, key, [table.rows, 1], dtype)
        table.row_states[key] = [RowPiece(state.detach().view(-1), 0, (0, table.dim))]
    if isinstance(slot.optimizer, ReplicatedTableOptimizer):
        slot.optimizer.set_optimizer_step(saved["step"])
    elif saved["states"] or saved["row_states"]:
        step = _state_tensor(slot, "step", [], "float32")
        step.detach().fill_(float(saved["step"]))


def _set_counters(kernel: Any, saved: list[dict[str, Any]]) -> None:
    """Set the iteration counter and learning rate of a fused kernel; its state dict holds neither."""
    # The tables of a kernel count together. Where they come from kernels that counted differently, the
    # highest count is taken: it only enters Adam's bias correction.
    step = max(table["step"] for table in saved)
    kernel.emb_module.iter.fill_(step)
    kernel.emb_module.iter_cpu.fill_(step)  # FBGEMM looks at `iter` only while this one is 0
    hyper = saved[0]["hyper"]
    if "lr" in hyper:
        for group in kernel.fused_optimizer.param_groups:
            group["lr"] = hyper["lr"]
            if "initial_lr" in hyper and "initial_lr" in group:
                group["initial_lr"] = hyper["initial_lr"]
        kernel.emb_module.set_learning_rate(hyper.get("applied_lr", hyper["lr"]))


def _state_tensor(slot: Slot, key: str, shape: list[int], dtype: str) -> Tensor:
    """The live state to read into, made if the optimizer hasn't yet."""
    state = slot.state.get(key)
    if not isinstance(state, Tensor) or list(state.shape) != shape:
        # torch keeps the step counter on the host unless a fused or captured optimizer reads it on the device
        on_host = key == "step" and not (slot.group.get("fused") or slot.group.get("capturable"))
        device = torch.device("cpu") if on_host else slot.parameter.device
        state = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
        slot.put(key, state)
    return state


def _clean(named: Iterable[tuple[str, Any]], model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names without what wrappers add to them (DistributedModelParallel strips DDP's part itself)."""
    for name, value in named:
        name = name.removeprefix("module.") if isinstance(model, DistributedDataParallel) else name
        yield name.replace("_orig_mod.", ""), value


def _slots(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Slot]:
    """By parameter name, its place in one of the optimizers."""
    names = {id(parameter): name for name, parameter in _clean(model.named_parameters(), model)}
    slots: dict[str, Slot] = {}
    for optimizer in (leaf for o in optimizers for leaf in _leaves(o)):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    shape = tuple(parameter.shape)
                    raise ValueError(
                        f"{type(optimizer).__name__} trains a parameter of shape {shape} that isn't the "
                        f"model's: allowed are parameters of TrainState.model"
                    )
                if name in slots:
                    raise ValueError(f"two optimizers train {name}: allowed is one")
                slots[name] = Slot(parameter, optimizer, group)
    return slots


def _leaves(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside TorchRec's wrappers; fused ones are found through the model instead."""
    if isinstance(optimizer, FusedOptimizer):
        return
    inner = getattr(optimizer, "optimizers", None) or getattr(optimizer, "_optimizer", None)
    if isinstance(inner, list):
        for _, part in inner:
            yield from _leaves(part)
    elif inner is not None:
        yield from _leaves(inner)
    else:
        yield optimizer
