"""Tile sizes, warps and pipeline stages: the one place that knows how they depend on GPU, dtype, head dim and length.

A static table instead of autotuning: the first step of a job is as fast as the second, every rank runs the same kernel,
and a result can be repeated. What a batch holds is not in it on purpose, only `max_seqlen`, which a model fixes.
`python -m benchmarks.attention.tune` measures on the GPU at hand and writes a file, whose rows come before the table's;
docs/tuning.md says how.

The 16-bit rows for Hopper up to 128 are the best of sweeps on an H200 (docs/lab_log.md). The others are chosen to fit:
registers (accumulators are block x head dim in float32) and shared memory (227 KB on Hopper, 99 KB on Ada and small
Ampere).
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.jagged.launch import INTERPRETED, check_fields, is_traced, listed
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.hopper.two_groups.config import TwoGroupBackwardConfig, TwoGroupForwardConfig

PADDED_HEAD_DIMS = (16, 32, 64, 128, 256)
FILE_VARIABLE = "KERNELS_TUNING_FILE"
FILE_FORMAT = 3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Tile:
    """block_m queries x block_n keys, the warps that share it, and loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """Inner tiles come through Hopper's copy engine, where it can read the tensors."""

    split: bool = True
    """Tiles that need no mask have a loop of their own; for short users one loop with a mask is less work."""

    max_registers: int | None = None
    """Of a thread: fewer let more programs share a multiprocessor."""

    def __post_init__(self) -> None:
        sizes = (16, 32, 64, 128, 256)
        check_fields(
            self,
            "a tile",
            {
                "block_m": sizes,
                "block_n": sizes,
                "num_warps": (1, 2, 4, 8, 16),
                "num_stages": range(1, 9),
                "max_registers": (None, *range(24, 256)),
            },
        )


@dataclass(frozen=True)
class Tiles:
    """One tile per kernel."""

    forward: Tile
    dkv: Tile
    dq: Tile
    short: Tile | None = None
    """Users of at most block_m tokens have their backward in one pass; None: there is no such pass."""

    hopper_forward: TwoGroupForwardConfig | OneGroupConfig | None = None
    """The forward written for Hopper is used instead of `forward`, where it can do the call."""

    hopper_dq: TwoGroupBackwardConfig | OneGroupConfig | None = None
    """The same of `dq`."""

    hopper_dkv: TwoGroupBackwardConfig | OneGroupConfig | None = None
    """The same of `dkv`."""

    def __post_init__(self) -> None:
        """ValueError for what a configuration can say, but its kernel can't do."""
        for kernel in ("hopper_forward", "hopper_dq", "hopper_dkv"):
            config = getattr(self, kernel)
            if isinstance(config, OneGroupConfig):
                allowed = {"block_n": (64, 128) if kernel == "hopper_forward" else (64,)}
                check_fields(config, kernel, {**allowed, "in_pairs": (False, kernel == "hopper_dkv")})
        if isinstance(self.hopper_dkv, TwoGroupBackwardConfig):
            check_fields(self.hopper_dkv, "hopper_dkv", {"num_stages": (3,)})


@dataclass(frozen=True)
class Row:
    """Serves padded head dims up to `head_dim`, users up to `max_seqlen` and masks of `causal` (None: any)."""

    head_dim: int
    max_seqlen: int | None
    causal: bool | None
    tiles: Tiles

    def serves(self, head_dim: int, max_seqlen: int, causal: bool) -> bool:
        fits = head_dim <= self.head_dim and (self.max_seqlen is None or max_seqlen <= self.max_seqlen)
        return fits and self.causal in (None, causal)


# The first row that serves a call counts.
TileTable = Sequence[Row]

# Head dims 32 and 64 by programs of one group, 128 of two, where these can do the call; the tiles beside them serve
# windows, dropout and cross attention. Measured at mean lengths of 50 to 4096. For tiles:
# short users want many small programs on a multiprocessor (few registers, few stages), long ones loads by the copy
# engine, two or three stages ahead.
HOPPER_16BIT: TileTable = (
    Row(32, None, None, Tiles(
        forward=Tile(32, 32, 2, 2, max_registers=64), dkv=Tile(32, 64, 4, 1, max_registers=96),
        dq=Tile(64, 32, 4, 3, tma=True), short=Tile(32, 32, 2, 1),
        hopper_forward=OneGroupConfig(4, 4), hopper_dq=OneGroupConfig(4, 3), hopper_dkv=OneGroupConfig(6, 3),
    )),
    Row(64, 1024, None, Tiles(
        forward=Tile(64, 32, 4, 3, max_registers=80), dkv=Tile(32, 64, 4, 1),
        dq=Tile(64, 32, 4, 3, tma=True, max_registers=96),
        hopper_forward=OneGroupConfig(3, 3),
        hopper_dq=OneGroupConfig(4, 2, in_registers=True), hopper_dkv=OneGroupConfig(4, 2, in_registers=True),
    )),
    Row(64, 4096, True, Tiles(
        forward=Tile(64, 64, 4, 3), dkv=Tile(32, 64, 4, 2, tma=True, max_registers=128),
        dq=Tile(64, 64, 4, 3, tma=True),
        hopper_forward=OneGroupConfig(3, 3),
        hopper_dq=OneGroupConfig(4, 2, in_registers=True), hopper_dkv=OneGroupConfig(4, 2, in_registers=True),
    )),
    Row(64, None, None, Tiles(
        forward=Tile(64, 64, 4, 3), dkv=Tile(32, 64, 4, 2, tma=True, max_registers=128),
        dq=Tile(64, 64, 4, 3, tma=True),
        hopper_forward=OneGroupConfig(2, 4), hopper_dq=OneGroupConfig(4, 2, in_registers=True),
        hopper_dkv=OneGroupConfig(4, 2, in_registers=True, in_pairs=True),
    )),
    Row(128, 512, None, Tiles(
        forward=Tile(64, 64, 4, 2), dkv=Tile(32, 64, 4, 2, tma=True), dq=Tile(64, 64, 4, 2, tma=True),
        hopper_forward=TwoGroupForwardConfig(block_n=64, num_stages=4),
        hopper_dq=TwoGroupBackwardConfig(3), hopper_dkv=TwoGroupBackwardConfig(3),
    )),
    Row(128, 2048, None, Tiles(
        forward=Tile(64, 64, 4, 3, tma=True), dkv=Tile(32, 64, 4, 2, tma=True), dq=Tile(64, 64, 4, 2, tma=True),
        hopper_forward=TwoGroupForwardConfig(block_n=64, num_stages=4),
        hopper_dq=TwoGroupBackwardConfig(3), hopper_dkv=TwoGroupBackwardConfig(3),
    )),
    Row(128, None, None, Tiles(
        forward=Tile(64, 64, 4, 3, tma=True), dkv=Tile(32, 64, 4, 2, tma=True), dq=Tile(64, 64, 4, 2, tma=True),
        hopper_forward=TwoGroupForwardConfig(block_n=128, num_stages=2),
        hopper_dq=TwoGroupBackwardConfig(3), hopper_dkv=TwoGroupBackwardConfig(3),
    )),
    Row(256, None, None, Tiles(forward=Tile(64, 32, 4, 2), dkv=Tile(32, 64, 8, 1), dq=Tile(64, 32, 8, 1))),
)  # fmt: skip

# Everything else with 16 bits: fits 99 KB of shared memory.
PORTABLE_16BIT: TileTable = (
    Row(64, None, None, Tiles(forward=Tile(64, 64, 4, 2), dkv=Tile(32, 64, 4, 2), dq=Tile(64, 32, 4, 2))),
    Row(128, None, None, Tiles(forward=Tile(64, 32, 4, 2), dkv=Tile(32, 64, 4, 1), dq=Tile(64, 32, 4, 1))),
    Row(256, None, None, Tiles(forward=Tile(32, 32, 4, 1), dkv=Tile(16, 32, 4, 1), dq=Tile(32, 16, 4, 1))),
)

# float32 products run without tensor cores (no TF32), where an operand's rows live in registers: small tiles.
PORTABLE_32BIT: TileTable = (
    Row(64, None, None, Tiles(forward=Tile(32, 32, 4, 1), dkv=Tile(32, 32, 4, 1), dq=Tile(32, 32, 4, 1))),
    Row(128, None, None, Tiles(forward=Tile(32, 16, 4, 1), dkv=Tile(16, 32, 4, 1), dq=Tile(32, 16, 4, 1))),
    Row(256, None, None, Tiles(forward=Tile(16, 16, 4, 1), dkv=Tile(16, 16, 4, 1), dq=Tile(16, 16, 4, 1))),
)

# Small, and no two block sizes alike, so that short test sequences reach every loop of the kernels.
INTERPRETER = Tiles(forward=Tile(32, 16, 1, 1), dkv=Tile(16, 32, 1, 1), dq=Tile(16, 32, 1, 1), short=Tile(16, 16, 1, 1))


def select_table(dtype: torch.dtype, compute_capability: tuple[int, int]) -> TileTable:
    """The table of this dtype on this architecture."""
    if dtype == torch.float32:
        return PORTABLE_32BIT
    return HOPPER_16BIT if compute_capability[0] == 9 else PORTABLE_16BIT


def table_tiles(
    head_dim: int, dtype: torch.dtype, compute_capability: tuple[int, int], max_seqlen: int, causal: bool
) -> Tiles:
    """What the table says, whatever a file does."""
    padded = padded_head_dim(head_dim)
    table = select_table(dtype, compute_capability)
    return next(row.tiles for row in table if row.serves(padded, max_seqlen, causal))


def padded_head_dim(head_dim: int) -> int:
    """The power of two that kernels compute with. Comparisons only: under torch.compile it may be a symbol."""
    return next(padded for padded in PADDED_HEAD_DIMS if head_dim <= padded)


def choose_tiles(head_dim: int, dtype: torch.dtype, device: torch.device, max_seqlen: int, causal: bool) -> Tiles:
    """The tiles of all kernels for such calls on this device: the file's, where it has a row, or the table's."""
    if INTERPRETED:
        return INTERPRETER
    # Asked three times in every step, so answers are kept; but a size that is being traced can't be looked up.
    choose = _choose if is_traced() else _choose_once
    return choose(head_dim, dtype, device, max_seqlen, causal, _compute_capability(device))


def _choose(
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    max_seqlen: int,
    causal: bool,
    compute_capability: tuple[int, int],
) -> Tiles:
    _read_file_once(device)
    padded = padded_head_dim(head_dim)
    for row in _rows_of_files[device]:
        if row.serves(padded, dtype, max_seqlen, causal):
            return row.tiles
    return table_tiles(head_dim, dtype, compute_capability, max_seqlen, causal)


_choose_once = functools.lru_cache(maxsize=4096)(_choose)


@functools.cache
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# Tiles of the file


@dataclass(frozen=True)
class TunedRow:
    """Serves one dtype, padded head dim and mask, and users up to `max_seqlen`."""

    dtype: torch.dtype
    head_dim: int
    max_seqlen: int
    causal: bool
    tiles: Tiles

    def __post_init__(self) -> None:
        if self.head_dim not in PADDED_HEAD_DIMS:
            raise ValueError(f"head_dim is {self.head_dim}; allowed are {listed(PADDED_HEAD_DIMS)}")
        if self.max_seqlen < 1:
            raise ValueError(f"max_seqlen is {self.max_seqlen}; allowed are values >= 1")

    @property
    def key(self) -> tuple[str, int, bool, int]:
        """What no two rows of a file share; in this order they are sorted."""
        return str(self.dtype), self.head_dim, self.causal, self.max_seqlen

    def serves(self, head_dim: int, dtype: torch.dtype, max_seqlen: int, causal: bool) -> bool:
        is_kind = head_dim == self.head_dim and dtype == self.dtype and causal == self.causal
        return is_kind and max_seqlen <= self.max_seqlen


@dataclass(frozen=True)
class Machine:
    """What measured times hold for."""

    gpu: str
    compute_capability: tuple[int, int]
    triton: str

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"{self.gpu} of compute capability {major}.{minor} with triton {self.triton}"


def find_machine(device: torch.device) -> Machine | None:
    """What this device is; None if it is no GPU, or none is there (kernels can be compiled without)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return Machine(torch.cuda.get_device_name(device), _compute_capability(device), triton.__version__)


def tuning_path(machine: Machine) -> Path | None:
    """Where this machine's file is, or would be; None if `KERNELS_TUNING_FILE` is empty, which means no file.

    Without that variable: `~/.cache/recsys/jagged_flash_attention/<gpu>-triton<version>.json`, under `XDG_CACHE_HOME`
    if that is set.
    """
    named = os.environ.get(FILE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    return Path(cache, "recsys", "jagged_flash_attention", f"{gpu}-triton{machine.triton}.json")


def write_tuning(path: Path, machine: Machine, rows: Sequence[TunedRow], command: str) -> None:
    """Write a file that `read_tuning` takes, at once: whoever reads at the same time sees the old one or the new one.

    Args:
        path: folders that are missing are made.
        machine: where the rows were measured.
        rows: no two of one key.
        command: how they came about, for the reader.
    """
    content = {
        "format": FILE_FORMAT,
        **asdict(machine),
        "command": command,
        "rows": [
            {**asdict(row), "dtype": str(row.dtype).removeprefix("torch.")} for row in sorted(rows, key=lambda r: r.key)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=1)
        os.chmod(temporary, 0o644)  # mkstemp makes it unreadable for others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_tuning(path: Path, machine: Machine) -> tuple[TunedRow, ...]:
    """The rows of a file, shortest `max_seqlen` first.

    Raises:
        OSError: it can't be read.
        ValueError: it is not such a file, has fields that are unknown here, or is of another machine.
    """
    content = json.loads(path.read_text())
    expected = {"format": FILE_FORMAT, **asdict(machine), "compute_capability": list(machine.compute_capability)}
    if not isinstance(content, dict) or content.keys() != expected.keys() | {"command", "rows"}:
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected the fields {', '.join(expected)}, command, rows; found {found}")
    for name, value in expected.items():
        if content[name] != value:
            raise ValueError(f"expected {name} {value}; found {content[name]}")
    if not isinstance(content["rows"], list):
        raise ValueError("expected a list of rows")
    rows = [_parse(TunedRow, row, f"rows[{i}]") for i, row in enumerate(content["rows"])]
    if len({row.key for row in rows}) < len(rows):
        raise ValueError("expected one row per dtype, head_dim, causal and max_seqlen; found two")
    return tuple(sorted(rows, key=lambda row: row.key))


_rows_of_files: dict[torch.device, tuple[TunedRow, ...]] = {}


@torch.compiler.assume_constant_result  # so that tracing does not enter it
def _read_file_once(device: torch.device) -> None:
    """See to it that `_rows_of_files` has the device; a file that can't be used is warned of, and gives no rows."""
    if device in _rows_of_files:
        return
    _rows_of_files[device] = ()
    machine = find_machine(device)
    path = None if machine is None else tuning_path(machine)
    if machine is None or path is None or (FILE_VARIABLE not in os.environ and not path.exists()):
        return
    try:
        _rows_of_files[device] = read_tuning(path, machine)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the tuning file {path} is ignored, tiles come from the table: {error}. It has to be made by "
            f"`python -m benchmarks.attention.tune` on {machine}; {FILE_VARIABLE} names another file, or none if empty",
            RuntimeWarning,
            stacklevel=2,
        )


def _parse(kind: Any, value: object, where: str) -> Any:
    """`value` out of JSON as a dataclass, dtype, int or bool, or one of them or None; ValueError says what is wrong."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kinds = [part for part in typing.get_args(kind) if part is not types.NoneType]
        if isinstance(value, dict):  # of several dataclasses, the one that has these fields
            kinds.sort(key=lambda part: len(value.keys() - {field.name for field in fields(part)}))
        kind = kinds[0]
    if is_dataclass(kind):
        return _parse_fields(kind, value, where)
    if kind is torch.dtype:
        if not isinstance(value, str) or value not in DTYPES:
            raise ValueError(f"{where} is {value!r}; allowed are {listed(list(DTYPES))}")
        return DTYPES[value]
    if type(value) is not kind:
        raise ValueError(f"{where} is {value!r}; expected {kind.__name__}")
    return value


def _parse_fields(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; expected fields and values")
    hints = typing.get_type_hints(kind)
    kinds = {field.name: hints[field.name] for field in fields(kind)}
    unknown = [name for name in value if name not in kinds]
    missing = [field.name for field in fields(kind) if field.name not in value and field.default is MISSING]
    if unknown or missing:
        found = f"unknown are {', '.join(unknown) or 'none'}, missing are {', '.join(missing) or 'none'}"
        raise ValueError(f"{where} has other fields than {', '.join(kinds)}: {found}")
    parsed = {name: _parse(kinds[name], part, f"{where}.{name}") for name, part in value.items()}
    try:
        return kind(**parsed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
