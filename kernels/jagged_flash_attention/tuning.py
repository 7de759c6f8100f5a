"""Tile sizes, warps and pipeline stages: the one place that knows how they depend on GPU, dtype, head dim and length.

A static table instead of autotuning: the first step of a job is as fast as the second, every rank runs the same kernel,
and a result can be repeated. What a batch holds is not in it on purpose, only `max_seqlen`, which a model fixes.

The 16-bit rows for Hopper up to 128 are the best of sweeps on an H200 (docs/lab_log.md). The others are chosen to fit:
registers (accumulators are block x head dim in float32) and shared memory (227 KB on Hopper, 99 KB on Ada and small
Ampere).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from kernels.jagged_flash_attention.hopper_forward import HopperConfig
from kernels.jagged_flash_attention.launch import INTERPRETED


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

    def options(self) -> dict[str, int | None]:
        """What the compiler is told besides the blocks."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class Tiles:
    """One tile per kernel."""

    forward: Tile
    dkv: Tile
    dq: Tile
    short: Tile | None = None
    """Users of at most block_m tokens have their backward in one pass; None: there is no such pass."""

    hopper_forward: HopperConfig | None = None
    """The forward written for Hopper is used instead of `forward`, where it can do the call."""


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

# Short users: many small programs on a multiprocessor (few registers, few stages). Long ones: loads by the copy engine,
# two or three stages ahead. Measured at mean lengths of 50 to 4096; at head dim 64 the forward in Gluon was slower.
HOPPER_16BIT: TileTable = (
    Row(32, None, None, Tiles(
        forward=Tile(32, 32, 2, 2, max_registers=64), dkv=Tile(32, 64, 4, 1, max_registers=96),
        dq=Tile(64, 32, 4, 3, tma=True), short=Tile(32, 32, 2, 1),
    )),
    Row(64, 1024, None, Tiles(
        forward=Tile(64, 32, 4, 3, max_registers=80), dkv=Tile(32, 64, 4, 1),
        dq=Tile(64, 32, 4, 3, tma=True, max_registers=96),
    )),
    Row(64, None, True, Tiles(
        forward=Tile(64, 64, 4, 3), dkv=Tile(32, 64, 4, 2, tma=True, max_registers=128),
        dq=Tile(64, 64, 4, 3, tma=True),
    )),
    Row(64, None, False, Tiles(
        forward=Tile(64, 64, 4, 3), dkv=Tile(32, 64, 4, 3, max_registers=128), dq=Tile(64, 64, 4, 3, tma=True),
    )),
    Row(128, 512, None, Tiles(
        forward=Tile(64, 64, 4, 2), dkv=Tile(32, 64, 4, 2, tma=True), dq=Tile(64, 64, 4, 2, tma=True),
    )),
    Row(128, None, None, Tiles(
        forward=Tile(64, 64, 4, 3, tma=True), dkv=Tile(32, 64, 4, 2, tma=True), dq=Tile(64, 64, 4, 2, tma=True),
        hopper_forward=HopperConfig(block_n=128, num_stages=2),
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


def choose_tiles(head_dim: int, dtype: torch.dtype, device: torch.device, max_seqlen: int, causal: bool) -> Tiles:
    """The tiles of all kernels for such calls on this device."""
    if INTERPRETED:
        return INTERPRETER
    table = select_table(dtype, _compute_capability(device))
    padded = triton.next_power_of_2(head_dim)
    return next(row.tiles for row in table if row.serves(padded, max_seqlen, causal))


@functools.cache
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
