"""The schedule of a jagged batch: its lists of tiles (tile_lists.py), made once and shared."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.jagged.launch import is_traced
from kernels.jagged.tile_lists import (
    MAX_ROWS,
    MIN_BLOCK,
    make_tile_lists,
    tile_capacity,
    tile_lists_op,
)


class ListSpec(NamedTuple):
    """Which list: of the tiles of queries or of keys, how many rows a tile has, and of which users.

    A tuple, because torch.compile can't make other keys of the dictionary that keeps the lists.
    """

    of_keys: bool
    block: int
    causal: bool
    more_than: int = 0
    at_most: int = MAX_ROWS


def list_spec(of_keys: bool, block: int, causal: bool, is_cross: bool, more_than: int = 0) -> ListSpec:
    """In self attention without a causal mask the lists of queries serve as those of keys."""
    if block < MIN_BLOCK or block & (block - 1):
        raise ValueError(f"a tile must have a power of two of rows, at least {MIN_BLOCK}; got {block}")
    return ListSpec(of_keys and (causal or is_cross), block, causal, more_than)


def training_specs(forward: int, dq: int, dkv: int, short: int, causal: bool, is_cross: bool) -> tuple[ListSpec, ...]:
    """What `Schedule.for_training` asks for; the last, that of short users, only where they have one."""
    short = 0 if is_cross else short
    specs = (
        list_spec(False, forward, causal, is_cross),
        list_spec(False, dq, causal, is_cross, short),
        list_spec(True, dkv, causal, is_cross, short),
    )
    return (*specs, ListSpec(False, short, causal, 0, short)) if short else specs


class ListOptions(NamedTuple):
    """Of lists that are made together: what is asked for, without repetitions, as `make_tile_lists` takes it."""

    blocks: list[int]
    descending: list[bool]
    more_than: list[int]
    at_most: list[int]


def _options_of(specs: tuple[ListSpec, ...]) -> tuple[ListOptions, list[int]]:
    """And which of the lists is the one for each spec."""
    different = list(dict.fromkeys(specs))
    options = ListOptions(
        [spec.block for spec in different],
        [spec.causal and not spec.of_keys for spec in different],  # a late query has the most work
        [spec.more_than for spec in different],
        [spec.at_most for spec in different],
    )
    return options, [different.index(spec) for spec in specs]


_options_of_once = functools.lru_cache(maxsize=4096)(_options_of)

Side = tuple[Tensor, int, int]  # offsets, total and max_seqlen of queries or of keys


def make_lists(
    queries: Side, keys: Side | None, num_targets: Tensor | None, specs: tuple[ListSpec, ...], check_values: bool
) -> list[Tensor]:
    """One list per spec, with one launch; in cross attention one for queries and one for keys.

    Args:
        queries, keys: checked by `Schedule` or `check_inputs`; keys is None in self attention.
        num_targets, check_values: as for `Schedule`.
        specs: the same list serves all that are equal.
    """
    if keys is None:
        return _make_side(queries, queries, None, num_targets, specs, False, check_values)
    of_queries = tuple([spec for spec in specs if not spec.of_keys])
    of_keys = tuple([spec for spec in specs if spec.of_keys])
    made: dict[ListSpec, Tensor] = {}
    if of_queries:
        lists = _make_side(queries, keys, keys[0], num_targets, of_queries, True, check_values)
        made.update(zip(of_queries, lists, strict=True))
    if of_keys:
        lists = _make_side(keys, queries, queries[0], num_targets, of_keys, False, check_values)
        made.update(zip(of_keys, lists, strict=True))
    return [made[spec] for spec in specs]


def _make_side(
    own: Side,
    other: Side,
    other_offsets: Tensor | None,
    num_targets: Tensor | None,
    specs: tuple[ListSpec, ...],
    keys_are_other: bool,
    check_values: bool,
) -> list[Tensor]:
    offsets, total, max_seqlen = own
    traced = is_traced(offsets)
    options, which = _options_of(specs) if traced else _options_of_once(specs)
    make = tile_lists_op if traced else make_tile_lists
    arguments = (offsets, other_offsets, num_targets, total, max_seqlen, *other[1:], *options, keys_are_other)
    if traced or not torch.is_inference_mode_enabled():
        lists = make(*arguments, check_values)
    else:
        with torch.inference_mode(False):  # a later backward may save them
            lists = make(*arguments, check_values)
    if len(options.blocks) == 1:
        return [lists] * len(specs)
    num_users = offsets.shape[0] - 1
    sizes = [tile_capacity(total, num_users, *pair) for pair in zip(options.blocks, options.at_most, strict=True)]
    parts = torch.split_with_sizes(lists, sizes)
    return [parts[i] for i in which]


class Schedule:
    """Where the tiles of a batch are: made once per batch, shared by all layers, by forward and backward.

    Nothing waits for the GPU. A list is made when it is first asked for and then kept, so one object serves one batch;
    `for_training` makes all of a forward and a backward with one launch. Every stream, and every graph that is being
    captured, has lists of its own, because kernels count in them what they have done. A compiled program keeps those of
    its first call, so two that share a schedule must not run at the same time.

    Args:
        offsets: `(B + 1,)` int32 or int64, ascending from 0 to total: where users' queries are.
        total: rows of the queries, all users together; less than 2^31.
        max_seqlen: at least the longest user's number of queries.
        num_targets: `(B,)` int32 or int64, candidates at the end of each user; self attention only.
        key_offsets: `(B + 1,)`, like offsets, for cross attention; None: the queries are the keys.
        total_keys, max_key_seqlen: like total and max_seqlen; needed with key_offsets, and only then.
        check_values: whether wrong values in the tensors raise ValueError when lists are asked for: on a CPU, and on
            CUDA if KERNELS_CHECK_OFFSETS=1, because it waits for the GPU.

    Raises:
        ValueError: on shapes, dtypes, devices or numbers that don't fit. Wrong values that nobody checked give wrong
            lists, but none that points outside 0 ... total or past max_seqlen. A total past 2^31 is refused when lists
            are asked for.
        RuntimeError: when lists are asked for and the tensors are not on CUDA and Triton isn't interpreting.
    """

    def __init__(
        self,
        offsets: Tensor,
        total: int,
        max_seqlen: int,
        *,
        num_targets: Tensor | None = None,
        key_offsets: Tensor | None = None,
        total_keys: int | None = None,
        max_key_seqlen: int | None = None,
        check_values: bool = False,
    ) -> None:
        self.is_cross = key_offsets is not None
        if self.is_cross != (total_keys is not None) or self.is_cross != (max_key_seqlen is not None):
            raise ValueError("key_offsets, total_keys and max_key_seqlen go together; give all of them or none")
        if self.is_cross and num_targets is not None:
            raise ValueError("num_targets are candidates among the keys of self attention; cross attention has none")
        _check_side("offsets", offsets, "total", total, "max_seqlen", max_seqlen)
        num_users = offsets.shape[0] - 1
        _check_partner("key_offsets", key_offsets, offsets, num_users + 1)
        _check_partner("num_targets", num_targets, offsets, num_users)
        self.num_users = num_users
        self.num_targets = num_targets
        self.check_values = check_values
        self.queries = (offsets, total, max_seqlen)
        self.keys = self.queries
        if key_offsets is not None and total_keys is not None and max_key_seqlen is not None:
            _check_side("key_offsets", key_offsets, "total_keys", total_keys, "max_key_seqlen", max_key_seqlen)
            self.keys = (key_offsets, total_keys, max_key_seqlen)
        self._lists: dict[tuple[int, int], dict[ListSpec, Tensor]] = {}

    def query_tiles(self, blocks: Sequence[int], causal: bool, more_than: int = 0) -> list[Tensor]:
        """One (capacity, 8) list per block of the tiles of queries; causal, a late query has the most work.

        Args:
            blocks: rows of a tile, powers of two from 16.
            causal: whether work depends on a tile's place in its user, rather than on the user's length alone.
            more_than: only users longer than that.
        """
        return self.lists([list_spec(False, block, causal, self.is_cross, more_than) for block in blocks])

    def key_tiles(self, blocks: Sequence[int], causal: bool, more_than: int = 0) -> list[Tensor]:
        """One (capacity, 8) list per block of the tiles of keys; causal, an early key has the most work."""
        return self.lists([list_spec(True, block, causal, self.is_cross, more_than) for block in blocks])

    def for_training(self, forward: int, dq: int, dkv: int, short: int, causal: bool) -> list[Tensor]:
        """All lists of a forward and a backward, with one launch (cross attention: one for queries, one for keys).

        Args:
            forward, dq: rows of a tile of queries; the list of all users, and of those longer than `short`.
            dkv: rows of a tile of keys, of users longer than `short`.
            short: users of at most that many tokens are on the last list instead; 0, and in cross attention: none are.
            causal: as for `query_tiles`.
        """
        lists = self.lists(training_specs(forward, dq, dkv, short, causal, self.is_cross))
        return lists if len(lists) == 4 else [*lists, lists[0][:0]]

    def lists(self, specs: Sequence[ListSpec]) -> list[Tensor]:
        """The lists asked for; those that are missing are made with one launch, in cross attention with two."""
        owner = _owner_of_lists(self.queries[0])
        lists = {} if owner is None else self._lists.setdefault(owner, {})
        missing = [spec for spec in specs if spec not in lists]
        if missing:
            keys = self.keys if self.is_cross else None
            made = make_lists(self.queries, keys, self.num_targets, tuple(missing), self.check_values)
            lists.update(zip(missing, made, strict=True))
        return [lists[spec] for spec in specs]


def _owner_of_lists(x: Tensor) -> tuple[int, int] | None:
    """The stream of the tensor's device and the graph that it captures, 0 for none; None if nothing tells which."""
    if x.device.type != "cuda" or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return 0, 0
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    if not torch.cuda.is_current_stream_capturing():
        return stream, 0
    capture = _capture_id(stream)
    return None if capture is None else (stream, capture)


def _capture_id(stream: int) -> int | None:
    """A number that the CUDA driver gives every capture; None if it doesn't say."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if not failed and number.value else None


def _check_side(name: str, offsets: Tensor, total_name: str, total: int, max_seqlen_name: str, max_seqlen: int) -> None:
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must have shape (users + 1,), got {tuple(offsets.shape)}")
    if total < 0:
        raise ValueError(f"{total_name} must be at least 0, got {total}")
    if max_seqlen < 0:
        raise ValueError(f"{max_seqlen_name} must be at least 0, got {max_seqlen}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {offsets.dtype}")


def _check_partner(name: str, tensor: Tensor | None, offsets: Tensor, length: int) -> None:
    """That an index vector beside `offsets` has its device and a length that fits."""
    if tensor is None:
        return
    if tensor.dim() != 1 or tensor.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},) for the users of offsets, got {tuple(tensor.shape)}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.device != offsets.device:
        raise ValueError(f"offsets are on {offsets.device}, {name} on {tensor.device}; they must be on one device")


def offsets_of(lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """Where each user begins, and the last one ends: `(B + 1,)` from `(B,)`, on its device."""
    ends = lengths.cumsum(0, dtype=dtype)
    return torch.cat([ends.new_zeros(1), ends])
