"""`Batch`: the users of one step on one rank, on the host or on a device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from data.config import OutOfRangeIds
from data.hashing import mix
from data.schema import Schema

Array: TypeAlias = "np.ndarray | torch.Tensor"
_OnTensor: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
_OnJagged: TypeAlias = Callable[[KeyedJaggedTensor], KeyedJaggedTensor]


@dataclass
class Batch(Pipelineable):
    """Jagged histories and candidates, pooled context, dense features and labels.

    `B` users, `L` history tokens, `N` candidates, `F` dense features, `T` tasks. Build one with `make_batch`,
    which checks that the parts fit. `to`, `pin_memory` and `truncate_history` return a new batch.
    """

    sequences: KeyedJaggedTensor
    """Stride B (1 in a batch without users): history keys, then candidate keys."""
    context: KeyedJaggedTensor
    """Stride B (1 in a batch without users): pooled features, any length per user."""
    history_offsets: torch.Tensor
    """(B + 1,) int64: the bounds of each user in every history key."""
    candidate_offsets: torch.Tensor
    """(B + 1,) int64: the bounds of each user in every candidate key."""
    history_time: torch.Tensor
    """(L,) int64: seconds, ascending within a user."""
    request_time: torch.Tensor
    """(B,) int64: seconds, not before the last event."""
    dense: torch.Tensor
    """(B, F) float32."""
    labels: torch.Tensor
    """(N, T) float32."""
    true_probs: torch.Tensor | None
    """(N, T) float32: what the labels were drawn with, where the source knows it."""
    history_lengths: torch.Tensor
    """(B,) int64, always on the host."""
    candidate_lengths: torch.Tensor
    """(B,) int64, always on the host."""
    num_history_keys: int = 1
    """How many of the keys of `sequences` are history keys."""
    num_truncated_users: int = 0
    """Users whose history the loader cut."""
    num_truncated_events: int = 0
    """Events it cut."""
    num_bad_ids: int = 0
    """Ids outside their tables that it repaired."""

    # Computed from the host lengths: nobody has to ask the device.
    @property
    def num_users(self) -> int:
        """B."""
        return self.history_lengths.numel()

    @property
    def num_history(self) -> int:
        """L."""
        return self.history_time.numel()

    @property
    def num_candidates(self) -> int:
        """N."""
        return self.labels.shape[0]

    @property
    def max_history(self) -> int:
        """Events of the longest history, 0 in an empty batch."""
        return int(self.history_lengths.max()) if self.num_users else 0

    @property
    def max_candidates(self) -> int:
        """Most candidates of a user, 0 in an empty batch."""
        return int(self.candidate_lengths.max()) if self.num_users else 0

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.labels.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy on a device; `history_lengths` and `candidate_lengths` stay on the host."""
        device = torch.device(device)
        return self._map(
            lambda tensor: tensor.to(device, non_blocking=non_blocking),
            lambda jagged: jagged.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """A copy in page-locked host memory (needs CUDA)."""
        return self._map(lambda tensor: tensor.pin_memory(), lambda jagged: jagged.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the device tensors."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _HOST_FIELDS and isinstance(value, (torch.Tensor, KeyedJaggedTensor)):
                value.record_stream(stream)

    def truncate_history(self, max_history: int) -> Batch:
        """Keep the newest `max_history` events of every user, and count what goes (host-side batches only).

        Raises:
            ValueError: `max_history` is negative.
        """
        if max_history < 0:
            raise ValueError(f"max_history is {max_history}; allowed: 0 or more events")
        if self.max_history <= max_history:
            return self
        assert self.device.type == "cpu", "truncation looks at the data, so it belongs on the host"
        lengths = self.history_lengths
        kept_lengths = lengths.clamp(max=max_history)
        # Distance of every event from the end of its history: the newest event has 1.
        from_end = torch.repeat_interleave(self.history_offsets[1:], lengths) - torch.arange(self.num_history)
        keep = from_end <= max_history

        per_key = self.sequences.length_per_key()
        values = torch.split(self.sequences.values(), per_key)
        key_lengths = self.sequences.lengths().view(len(per_key), self.num_users)
        # All history keys have the same lengths and come first; candidate keys stay as they are.
        keys = self.sequences.keys()
        history = self.num_history_keys
        sequences = make_jagged(
            keys,
            torch.cat([*(value[keep] for value in values[:history]), *values[history:]]),
            torch.cat([kept_lengths.repeat(history), key_lengths[history:].reshape(-1)]),
            self.num_users,
        )
        return dataclasses.replace(
            self,
            sequences=sequences,
            history_offsets=_offsets(kept_lengths),
            history_time=self.history_time[keep],
            history_lengths=kept_lengths,
            num_truncated_users=self.num_truncated_users + int((lengths > max_history).sum()),
            num_truncated_events=self.num_truncated_events + int((lengths - kept_lengths).sum()),
        )

    def check_ids(self, schema: Schema, policy: OutOfRangeIds) -> Batch:
        """Find ids outside their tables (host-side batches only) and deal with them by `policy`.

        Returns this batch when all ids are good, else one with repaired ids and a larger `num_bad_ids`.

        Raises:
            ValueError: an id is outside its table and the policy is `error`.
        """
        assert self.device.type == "cpu", "the check looks at the data, so it belongs on the host"
        sequences, bad_sequences = _check_jagged(self.sequences, schema, policy)
        context, bad_context = _check_jagged(self.context, schema, policy)
        if not bad_sequences + bad_context:
            return self
        num_bad_ids = self.num_bad_ids + bad_sequences + bad_context
        return dataclasses.replace(self, sequences=sequences, context=context, num_bad_ids=num_bad_ids)

    def _map(self, on_tensor: _OnTensor, on_jagged: _OnJagged) -> Batch:
        changes: dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _HOST_FIELDS:
                continue
            if isinstance(value, torch.Tensor):
                changes[field.name] = on_tensor(value)
            elif isinstance(value, KeyedJaggedTensor):
                changes[field.name] = on_jagged(value)
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


_HOST_FIELDS = ("history_lengths", "candidate_lengths")


def make_batch(
    schema: Schema,
    *,
    history: Mapping[str, Array],
    history_lengths: Array,
    history_time: Array,
    request_time: Array,
    candidates: Mapping[str, Array],
    candidate_lengths: Array,
    context: Mapping[str, tuple[Array, Array]],
    dense: Array,
    labels: Array,
    true_probs: Array | None = None,
) -> Batch:
    """A host-side batch from arrays or tensors, checked for consistency but not for ids (see `check_ids`).

    Args:
        schema: which keys there are and in which order.
        history: (L,) ids per history key, each user's in the order of time.
        history_lengths: (B,) events per user.
        history_time: (L,) seconds.
        request_time: (B,) seconds.
        candidates: (N,) ids per candidate key.
        candidate_lengths: (B,) candidates per user.
        context: values and (B,) lengths per context key.
        dense: (B, F).
        labels: (N, T).
        true_probs: (N, T) or None.

    Raises:
        ValueError: a key is missing or unknown, or a shape does not fit the lengths.
    """
    lengths, targets = _ints(history_lengths), _ints(candidate_lengths)
    users, num_history, num_candidates = lengths.numel(), int(lengths.sum()), int(targets.sum())
    _require_keys("history", history, [f.name for f in schema.history])
    _require_keys("candidates", candidates, [f.name for f in schema.candidates])
    _require_keys("context", context, [f.name for f in schema.context])
    values = [_shaped(f.name, _ints(history[f.name]), (num_history,)) for f in schema.history]
    values += [_shaped(f.name, _ints(candidates[f.name]), (num_candidates,)) for f in schema.candidates]
    context_lengths = [_shaped(f"{f.name} lengths", _ints(context[f.name][1]), (users,)) for f in schema.context]
    context_values = [
        _shaped(f.name, _ints(context[f.name][0]), (int(feature_lengths.sum()),))
        for f, feature_lengths in zip(schema.context, context_lengths, strict=True)
    ]
    for name, some in (("history", lengths), ("candidate", targets), *_named(schema, context_lengths)):
        if users and int(some.min()) < 0:
            raise ValueError(f"{name} lengths hold {int(some.min())}; allowed: 0 or more")
    num_tasks = len(schema.tasks)
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(
        sequences=make_jagged(
            [f.name for f in schema.sequences],
            torch.cat(values),
            torch.cat([lengths.repeat(len(schema.history)), targets.repeat(len(schema.candidates))]),
            users,
        ),
        context=make_jagged(
            [f.name for f in schema.context],
            torch.cat([nothing, *context_values]),
            torch.cat([nothing, *context_lengths]),
            users,
        ),
        history_offsets=_offsets(lengths),
        candidate_offsets=_offsets(targets),
        history_time=_shaped("history_time", _ints(history_time), (num_history,)),
        request_time=_shaped("request_time", _ints(request_time), (users,)),
        dense=_shaped("dense", _floats(dense), (users, schema.num_dense)),
        labels=_shaped("labels", _floats(labels), (num_candidates, num_tasks)),
        true_probs=None
        if true_probs is None
        else _shaped("true_probs", _floats(true_probs), (num_candidates, num_tasks)),
        history_lengths=_shaped("history_lengths", lengths, (users,)),
        candidate_lengths=_shaped("candidate_lengths", targets, (users,)),
        num_history_keys=len(schema.history),
    )


def make_jagged(keys: Sequence[str], values: torch.Tensor, lengths: torch.Tensor, stride: int) -> KeyedJaggedTensor:
    """A KJT on the host with everything cached that TorchRec would later ask the device for.

    `length_per_key` is what `to_dict`, `split`, `permute` and the input dist wait for otherwise. `to` and
    `pin_memory` of TorchRec 1.6 and 1.8 keep these lists.

    Without users it gets one user with nothing, so stride 1: TorchRec's `to_dict`, and the output of a sharded
    `EmbeddingCollection`, raise on stride 0. Pooled embeddings then have one row that belongs to nobody.
    """
    if stride == 0:
        stride, lengths = 1, lengths.new_zeros(len(keys))
    per_key = lengths.view(len(keys), stride).sum(1).tolist() if keys else []
    return KeyedJaggedTensor(
        keys=list(keys),
        values=values,
        lengths=lengths,
        stride=stride,
        stride_per_key=[stride] * len(keys),
        length_per_key=per_key,
        lengths_offset_per_key=[stride * i for i in range(len(keys) + 1)],
        offset_per_key=[0, *itertools.accumulate(per_key)],
        index_per_key={key: i for i, key in enumerate(keys)},
    )


def _check_jagged(jagged: KeyedJaggedTensor, schema: Schema, policy: OutOfRangeIds) -> tuple[KeyedJaggedTensor, int]:
    """The KJT with good ids, and how many were bad."""
    pieces = list(torch.split(jagged.values(), jagged.length_per_key()))
    num_bad = 0
    for i, (key, ids) in enumerate(zip(jagged.keys(), pieces, strict=True)):
        if not ids.numel():
            continue
        table = schema.table_of(key)
        rows = schema.tables[table]
        lowest, highest = (int(bound) for bound in torch.aminmax(ids))
        if lowest >= 0 and highest < rows:
            continue
        bad = (ids < 0) | (ids >= rows)
        count = int(bad.sum())
        if policy is OutOfRangeIds.error:
            raise ValueError(
                f"feature {key!r} holds id {int(ids[bad][0])}, outside table {table!r} of {rows} rows "
                f"(allowed: 0 to {rows - 1}; {count} such ids in this batch). Fix the data, enlarge the "
                f"table, or set data.out_of_range_ids to clip or hash"
            )
        num_bad += count
        if policy is OutOfRangeIds.clip:
            pieces[i] = ids.clamp(0, rows - 1)
        else:
            hashed = mix(ids[bad].numpy().astype(np.uint64)) % np.uint64(rows)
            pieces[i] = ids.masked_scatter(bad, torch.from_numpy(hashed.astype(np.int64)))
    if not num_bad:
        return jagged, 0
    return make_jagged(jagged.keys(), torch.cat(pieces), jagged.lengths(), jagged.stride()), num_bad


def _ints(array: Array) -> torch.Tensor:
    return torch.as_tensor(array).to(torch.int64)


def _floats(array: Array) -> torch.Tensor:
    return torch.as_tensor(array).to(torch.float32)


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _named(schema: Schema, lengths: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(feature.name, some) for feature, some in zip(schema.context, lengths, strict=True)]


def _require_keys(what: str, given: Mapping[str, object], wanted: list[str]) -> None:
    if set(given) != set(wanted):
        raise ValueError(f"{what} has the keys {sorted(given)}; the schema wants {sorted(wanted)}")


def _shaped(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; its lengths and the schema want {shape}")
    return tensor
