"""Tile sizes, warps and pipeline stages: the one place that knows how they depend on GPU, dtype and head dim.

A static table instead of autotuning: the first step of a job is as fast as the second, every rank runs the
same kernel, and a result can be repeated. The shape of a batch is not in it on purpose.

The 16-bit rows for Hopper up to 128 start from what was best in a sweep on an H200. The others are chosen to
fit: registers (accumulators are block x head dim in float32) and shared memory (227 KB on Hopper, 99 KB on
Ada and small Ampere).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

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


# Greatest padded head dim each row serves -> tiles, from small to large.
TileTable = dict[int, Tiles]

HOPPER_16BIT: TileTable = {
    32: Tiles(forward=Tile(64, 64, 4, 3), dkv=Tile(32, 64, 4, 3), dq=Tile(64, 64, 4, 3)),
    64: Tiles(forward=Tile(64, 64, 4, 3), dkv=Tile(32, 64, 4, 3), dq=Tile(64, 64, 4, 2)),
    128: Tiles(forward=Tile(64, 64, 4, 2), dkv=Tile(64, 128, 8, 2), dq=Tile(128, 64, 8, 2)),
    256: Tiles(forward=Tile(64, 32, 4, 2), dkv=Tile(32, 64, 8, 1), dq=Tile(64, 32, 8, 1)),
}

# Everything else with 16 bits: fits 99 KB of shared memory.
PORTABLE_16BIT: TileTable = {
    64: Tiles(forward=Tile(64, 64, 4, 2), dkv=Tile(32, 64, 4, 2), dq=Tile(64, 32, 4, 2)),
    128: Tiles(forward=Tile(64, 32, 4, 2), dkv=Tile(32, 64, 4, 1), dq=Tile(64, 32, 4, 1)),
    256: Tiles(forward=Tile(32, 32, 4, 1), dkv=Tile(16, 32, 4, 1), dq=Tile(32, 16, 4, 1)),
}

# float32 products run without tensor cores (no TF32), where an operand's rows live in registers: small tiles.
PORTABLE_32BIT: TileTable = {
    64: Tiles(forward=Tile(32, 32, 4, 1), dkv=Tile(32, 32, 4, 1), dq=Tile(32, 32, 4, 1)),
    128: Tiles(forward=Tile(32, 16, 4, 1), dkv=Tile(16, 32, 4, 1), dq=Tile(32, 16, 4, 1)),
    256: Tiles(forward=Tile(16, 16, 4, 1), dkv=Tile(16, 16, 4, 1), dq=Tile(16, 16, 4, 1)),
}

# Small, and no two block sizes alike, so that short test sequences reach every loop of the kernels.
INTERPRETER = Tiles(forward=Tile(32, 16, 1, 1), dkv=Tile(16, 32, 1, 1), dq=Tile(16, 32, 1, 1), short=Tile(16, 16, 1, 1))


def select_table(dtype: torch.dtype, compute_capability: tuple[int, int]) -> TileTable:
    """The table of this dtype on this architecture."""
    if dtype == torch.float32:
        return PORTABLE_32BIT
    has_large_shared_memory = compute_capability[0] in (9, 10)
    return HOPPER_16BIT if has_large_shared_memory else PORTABLE_16BIT


def choose_tiles(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tiles of all kernels for this head dim and dtype on this device."""
    if INTERPRETED:
        return INTERPRETER
    table = select_table(dtype, _compute_capability(device))
    return next(tiles for limit, tiles in table.items() if triton.next_power_of_2(head_dim) <= limit)


@functools.cache
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
