# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over a user's rows that several programs make: each writes a part, and a second kernel adds the parts.

No two programs write to the same place, and parts are added in their order, so results repeat bit by bit. The part of
rows i BL ... of user b, whose first row is s, has slot s // BL + b + i, which no other part has.

Names: see kernels/jagged/tiles.py; C numbers in a sum, BL rows of a part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import Launcher
from kernels.jagged.tile_lists import load_user, tile_capacity
from kernels.jagged.tiles import columns_per_tile, load_columns, row_and_columns

PARTS, COLUMNS = 16, 64  # of a program at once


@triton.jit  # pragma: no cover
def slot_of(start, i_user, i_part, BL: tl.constexpr):
    """Row of the partial sums for part i_part of a user whose rows begin at start."""
    return start // BL + i_user + i_part


@triton.jit(do_not_specialize=["total", "max_seqlen"])  # pragma: no cover
def partial_sums_kernel(
    p_parts,  # (slots, C) float32
    p_out,  # (B, C), contiguous
    p_offsets,  # (B + 1,)
    total,
    max_seqlen,
    C: tl.constexpr,
    BL: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Adds the parts of one user, BC columns; zero for a user without rows."""
    i_b, i_c = row_and_columns(C, BC)
    start, n = load_user(p_offsets, i_b, total, max_seqlen)
    num_parts = tl.cdiv(n, BL)
    p_parts += slot_of(start, i_b, 0, BL).to(tl.int64) * C
    b_acc = tl.zeros([BS, BC], dtype=tl.float32)
    for i_s in range(0, num_parts, BS):
        b_acc += load_columns(p_parts, i_s, num_parts, C, i_c, C, BS, BC)
    o_c = i_c + tl.arange(0, BC)
    tl.store(p_out + i_b.to(tl.int64) * C + o_c, tl.sum(b_acc, 0).to(p_out.dtype.element_ty), mask=o_c < C)


launch_kernel = Launcher(partial_sums_kernel, "num_warps")


def new_partial_sums(total: int, num_users: int, rows: int, width: int, device: torch.device) -> Tensor:
    """Memory for the parts, `rows` rows each, of sums of `width` numbers: `(slots, width)` float32."""
    return torch.empty((tile_capacity(total, num_users, rows), width), dtype=torch.float32, device=device)


def launch_partial_sums(parts: Tensor, out: Tensor, offsets: Tensor, total: int, max_seqlen: int, rows: int) -> None:
    """Write `out`, `(B, width)`, contiguous, from the parts of `rows` rows each.

    Args:
        parts: of `new_partial_sums`.
        offsets: `(B + 1,)`.
        total, max_seqlen: of the rows.
    """
    B, C = out.shape
    block = columns_per_tile(C, COLUMNS)
    launch_kernel(
        (B * -(-C // block),), (), (parts, out, offsets), (), (total, max_seqlen), (C, rows, PARTS, block), (4,)
    )
