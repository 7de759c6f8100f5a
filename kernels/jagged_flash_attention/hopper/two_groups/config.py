"""How a program of two groups is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triton.experimental.gluon import language as gl

from kernels.jagged.launch import check_fields

BLOCK = 128  # rows of an item: of a tile of the tile list
# Items that are a program's own. Items are long: if a program drew earlier, it could be left with a whole one when all
# others are done.
GIVEN = gl.constexpr(1)
# Registers per thread: 168 for the 12 warps of a program when it starts, which has an SM to itself; the warp that
# loads and its 3 idle ones keep 24, so that 240 are left for the two groups.
REGISTERS, GROUP_REGISTERS = 168, 240


@dataclass(frozen=True)
class TwoGroupForwardConfig:
    """How a program is laid out; no setting changes what is computed."""

    block_n: int
    """Keys of a tile, 64 or 128."""

    num_stages: int
    """Slots of the ring."""

    block: ClassVar[int] = BLOCK
    """Queries of an item."""

    def __post_init__(self) -> None:
        check_fields(self, "a forward of two groups", {"block_n": (64, 128)})
        most = 320 // self.block_n  # that fit beside the queries
        check_fields(self, f"a forward of two groups with block_n={self.block_n},", {"num_stages": range(2, most + 1)})


@dataclass(frozen=True)
class TwoGroupBackwardConfig:
    """How a program is laid out; no setting changes what is computed."""

    num_stages: int
    """Slots of the ring: 2 or 3, of dk and dv 3; more don't fit."""

    block: ClassVar[int] = BLOCK
    """Queries of an item; of dk and dv keys."""

    def __post_init__(self) -> None:
        check_fields(self, "a backward of two groups", {"num_stages": (2, 3)})
