"""Which tiles are worth a try on a GPU: the short lists that `tune` measures, and why they hold what they hold.

- A program of 64 queries (dk and dv: 64 keys) and 4 warps is one group of warps that shares a matrix product. 32 rows
  waste less on short users, 128 rows with 8 warps read keys less often for long ones.
- What is streamed comes in 32 or 64 rows. The larger the head dim, the fewer fit: accumulators are rows x head dim in
  float32 registers.
- Stages are loads in flight. One for the backward of short users, whose loops end before a pipeline is full.
- A limit on registers puts more programs on a multiprocessor, and makes those spill that need more; so it is tried in
  the one or two sizes that have paid.
- Hopper and later have a copy engine (`tma`), which pays with two stages and more.
- One loop that masks everything (not `split`) spares short users the way through loops that have nothing to do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from kernels.jagged_flash_attention.hopper.common import GLUON_DTYPES
from kernels.jagged_flash_attention.hopper.items import ITEM_SLOTS
from kernels.jagged_flash_attention.hopper.one_group import dkv as one_group_dkv
from kernels.jagged_flash_attention.hopper.one_group import dq as one_group_dq
from kernels.jagged_flash_attention.hopper.one_group import forward as one_group_forward
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.hopper.two_groups import dkv as two_groups_dkv
from kernels.jagged_flash_attention.hopper.two_groups import dq as two_groups_dq
from kernels.jagged_flash_attention.hopper.two_groups import forward as two_groups_forward
from kernels.jagged_flash_attention.hopper.two_groups.config import TwoGroupBackwardConfig, TwoGroupForwardConfig
from kernels.jagged_flash_attention.tuning import Tile, Tiles

KERNELS = ("forward", "dq", "dkv", "short", "hopper_forward", "hopper_dq", "hopper_dkv")
OfHopper = TwoGroupForwardConfig | TwoGroupBackwardConfig | OneGroupConfig
Candidate = Tile | OfHopper
Sizes = tuple[int, int, int, int]  # block_m, block_n, warps, stages

# Kernel -> greatest padded head dim -> sizes, and limits on registers besides none.
TENSOR_CORE_TILES: dict[str, dict[int, tuple[Sequence[Sizes], Sequence[int]]]] = {
    "forward": {
        32: (((32, 32, 2, 2), (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2)), (64,)),
        64: (((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3)), (80, 112)),
        128: (((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)), ()),
        256: (((32, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2)), ()),
    },
    "dq": {
        32: (((32, 32, 2, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 4, 3)), (80,)),
        64: (((64, 32, 4, 1), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3)), (96,)),
        128: (((64, 32, 4, 1), (64, 32, 4, 2), (64, 64, 4, 1), (64, 64, 4, 2), (128, 64, 8, 2)), ()),
        256: (((32, 16, 4, 1), (32, 32, 4, 1), (64, 32, 8, 1), (64, 32, 8, 2)), ()),
    },
    "dkv": {
        32: (((16, 32, 1, 2), (32, 64, 4, 1), (32, 64, 4, 2), (64, 64, 4, 1)), (96,)),
        64: (((32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 1)), (128, 168)),
        128: (((32, 64, 4, 1), (32, 64, 4, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 128, 8, 2)), ()),
        256: (((16, 32, 4, 1), (32, 32, 4, 1), (32, 64, 8, 1), (32, 64, 8, 2)), ()),
    },
    # Whole users: square, without a loop.
    "short": {
        64: (((32, 32, 1, 1), (32, 32, 2, 1), (32, 32, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1)), ()),
        128: (((32, 32, 2, 1), (32, 32, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1)), ()),
        256: (((32, 32, 4, 1), (32, 32, 8, 1)), ()),
    },
}

# The kernels written for Hopper come with lists of their own, by head dim.
HOPPER_CONFIGS: dict[str, Mapping[int, Sequence[OfHopper]]] = {
    "hopper_forward": {**one_group_forward.CONFIGS, **two_groups_forward.CONFIGS},
    "hopper_dq": {**one_group_dq.CONFIGS, **two_groups_dq.CONFIGS},
    "hopper_dkv": {**one_group_dkv.CONFIGS, **two_groups_dkv.CONFIGS},
}

# float32 is multiplied without tensor cores, and operands' rows live in registers: small tiles, more warps.
FLOAT32_TILES: dict[str, Sequence[Sizes]] = {
    "forward": ((16, 16, 4, 1), (32, 16, 4, 1), (32, 32, 4, 1), (64, 32, 8, 1)),
    "dq": ((16, 16, 4, 1), (32, 16, 4, 1), (32, 32, 4, 1), (64, 32, 8, 1)),
    "dkv": ((16, 16, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1), (32, 64, 8, 1)),
    "short": ((16, 16, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
}


def candidates(
    kernel: str, head_dim: int, dtype: torch.dtype, compute_capability: tuple[int, int], table: Tiles
) -> list[Candidate]:
    """What is tried for one kernel: what the table has, if anything, and then the list.

    Args:
        kernel: of `KERNELS`.
        head_dim: padded, a power of two.
        dtype: of the inputs.
        compute_capability: of the GPU.
        table: the tiles that the table has for the setting.
    """
    found: list[Candidate | None] = [getattr(table, kernel)]
    if kernel in HOPPER_CONFIGS:
        if compute_capability[0] == 9 and dtype in GLUON_DTYPES:
            found += HOPPER_CONFIGS[kernel].get(head_dim, ())
    elif dtype == torch.float32:
        found += [Tile(*sizes) for sizes in FLOAT32_TILES[kernel]]
    else:
        by_head_dim = TENSOR_CORE_TILES[kernel]
        all_sizes, limits = by_head_dim[min(limit for limit in by_head_dim if head_dim <= limit)]
        for sizes, registers in itertools.product(all_sizes, (None, *limits)):
            found.append(Tile(*sizes, max_registers=registers))
            if compute_capability[0] >= 9 and sizes[3] >= 2 and kernel != "short":
                found.append(Tile(*sizes, tma=True, max_registers=registers))
            if registers is None and kernel != "short":
                found.append(Tile(*sizes, split=False))
    return list(dict.fromkeys(candidate for candidate in found if candidate is not None))


def shared_memory(kernel: str, candidate: Candidate, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of shared memory that a program needs at least: operands that stay there, loads in flight.

    The compiler may need more; then it says so, and the candidate is left out later.
    """
    row = head_dim * dtype.itemsize
    items = ITEM_SLOTS.value
    if isinstance(candidate, OneGroupConfig):  # rows of q, dout and out; of k and v; of q, k, v and dout
        stay = {"hopper_forward": items, "hopper_dq": 2 * items + 1, "hopper_dkv": 2 * items}[kernel]
        return (stay * candidate.block + 2 * candidate.block_n * candidate.num_stages) * row
    if isinstance(candidate, TwoGroupForwardConfig):
        return (items * candidate.block + 2 * candidate.block_n * candidate.num_stages) * row
    if isinstance(candidate, TwoGroupBackwardConfig):
        stay = {"hopper_dq": 3, "hopper_dkv": 2 * items}[kernel]
        return (stay * candidate.block + candidate.block * candidate.num_stages) * row
    if kernel == "forward":  # keys and values are streamed, queries may be in registers
        return 2 * candidate.block_n * candidate.num_stages * row
    if kernel == "dq":  # queries and dout stay
        return 2 * (candidate.block_m + candidate.block_n * candidate.num_stages) * row
    if kernel == "dkv":  # keys and values stay, queries and dout are streamed
        return 2 * (candidate.block_n + candidate.block_m * candidate.num_stages) * row
    assert kernel == "short", kernel
    return 3 * candidate.block_m * row


def describe(candidate: Candidate | None) -> str:
    """In a word or two, for tables: `64x32 w4 s3 tma r96` has 4 warps, 3 stages and at most 96 registers."""
    if candidate is None:
        return "none"
    if isinstance(candidate, OneGroupConfig):
        text = f"one group n{candidate.block_n} s{candidate.num_stages} p{candidate.programs_per_sm}"
        return text + (" in registers" if candidate.in_registers else "") + (" pairs" if candidate.in_pairs else "")
    if isinstance(candidate, TwoGroupForwardConfig):
        return f"two groups n{candidate.block_n} s{candidate.num_stages}"
    if isinstance(candidate, TwoGroupBackwardConfig):
        return f"two groups s{candidate.num_stages}"
    text = f"{candidate.block_m}x{candidate.block_n} w{candidate.num_warps} s{candidate.num_stages}"
    text += (" tma" if candidate.tma else "") + ("" if candidate.split else " one loop")
    return text + (f" r{candidate.max_registers}" if candidate.max_registers else "")
