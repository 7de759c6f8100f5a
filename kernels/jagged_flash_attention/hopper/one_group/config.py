"""How a program of one group is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triton.experimental.gluon import language as gl

from kernels.jagged.launch import check_fields

BLOCK = 64  # rows of an item: of a tile of the tile list
GIVEN = gl.constexpr(2)  # items that are a program's own; they are short, and what they are is asked for one ahead


@dataclass(frozen=True)
class OneGroupConfig:
    """How the programs are laid out; no setting changes what is computed."""

    num_stages: int
    """Slots of the ring of tiles, at least 2."""

    programs_per_sm: int
    """Programs that share a multiprocessor."""

    block_n: int = 64
    """Rows of a tile in the ring: 64, in the forward also 128."""

    in_registers: bool = False
    """Left operands that stay for the whole item are in registers instead of shared memory."""

    in_pairs: bool = False
    """dk and dv: two tiles of queries in a turn, for long users, who have many of them."""

    block: ClassVar[int] = BLOCK
    """Rows of an item."""

    def __post_init__(self) -> None:
        allowed = {
            "num_stages": range(2, 9),
            "programs_per_sm": range(1, 9),
            "block_n": (64, 128),
            "in_registers": (False, True),
            "in_pairs": (False, True),
        }
        check_fields(self, "programs of one group", allowed)


def registers_of(programs_per_sm: int) -> int:
    """Per thread when a program starts with its 8 warps. Four of them keep 24, the others share what these leave."""
    return min(65536 // (256 * programs_per_sm) // 8 * 8, 128)
