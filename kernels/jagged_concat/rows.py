# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernel that moves rows of users between two jagged tensors, where a user's rows lie a shift apart.

A user's rows begin at s in its own tensor, which tiles are made of, and row i of the own tensor is row i + shift of the
other one. Concatenation: x's rows move by the number of rows of y before the user, y's rows by the number of rows of
x up to the user's end. The last rows of a user: by the difference of the users' ends.

Names: see kernels/jagged/tiles.py; BL x BC tiles of rows x columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import MAX_INT32, Launcher, grid_of
from kernels.jagged.score_layout import BLOCK
from kernels.jagged.tiles import columns_per_tile, load_entry, load_user_index, row_and_columns


@triton.jit(do_not_specialize=["num_others", "last"])  # pragma: no cover
def move_rows_kernel(
    p_from,  # the own tensor (own rows, C), or with PULL the other one
    p_to,  # the other tensor (other rows, C), or with PULL the own one; contiguous
    p_tiles,  # (entries, 8), tiles of BL own rows
    p_shifts,  # (B,) by users
    p_more_shifts,  # (B,), subtracted with HAS_MORE
    stride_from,
    num_others,
    last,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    PULL: tl.constexpr,
    HAS_MORE: tl.constexpr,
):
    """BL own rows of one user, BC columns, of its last `last` rows only.

    With PULL own rows are written, and those that have no partner are zero. Whatever the shifts say, no row outside of
    the tensors is touched.
    """
    i_entry, i_c = row_and_columns(C, BC)
    start, n, _, _, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_user = load_user_index(p_tiles, i_entry)
    shift = tl.load(p_shifts + i_user).to(tl.int64)
    if HAS_MORE:
        shift -= tl.load(p_more_shifts + i_user).to(tl.int64)
    o_l = i_tile * BL + tl.arange(0, BL)
    o_own = start + o_l
    o_other = o_own + shift
    m_own = o_l < n
    m_pair = m_own & (o_l >= n - last) & (o_other >= 0) & (o_other < num_others)
    o_c = i_c + tl.arange(0, BC)[None, :]
    m_c = o_c < C
    if PULL:
        b_x = tl.load(p_from + o_other[:, None] * stride_from + o_c, mask=m_pair[:, None] & m_c, other=0.0)
        tl.store(p_to + o_own[:, None] * C + o_c, b_x, mask=m_own[:, None] & m_c)
    else:
        b_x = tl.load(p_from + o_own[:, None] * stride_from + o_c, mask=m_pair[:, None] & m_c, other=0.0)
        tl.store(p_to + o_other[:, None] * C + o_c, b_x, mask=m_pair[:, None] & m_c)


launch_kernel = Launcher(move_rows_kernel, "num_warps")


def launch_move(
    source: Tensor,
    to: Tensor,
    tiles: Tensor,
    shifts: Tensor,
    *,
    minus: Tensor | None = None,
    pull: bool,
    last: int = MAX_INT32,
) -> None:
    """Move rows of every user.

    Args:
        source: `(rows, C)`, contiguous in the last dimension.
        to: `(rows, C)`, contiguous; written.
        tiles: `(entries, 8)`, tiles of BLOCK rows: of the source, or of what is written if `pull`.
        shifts, minus: `(B,)`, int32 or int64, contiguous: their difference is what is added to a row of the tensor that
            has tiles, to find the row of the other one.
        pull: write every row of `to`, zero where there is nothing to move; otherwise only rows that are moved.
        last: how many rows at a user's end have a partner, of the tensor with tiles.
    """
    C = source.shape[1]
    if to.numel() == 0 or tiles.shape[0] == 0:
        return
    if source.numel() == 0:
        if pull:
            to.zero_()
        return
    block = columns_per_tile(C)
    launch_kernel(
        grid_of(tiles, -(-C // block)),
        (),
        (source, to, tiles, shifts, shifts if minus is None else minus),
        (source.stride(0),),
        ((source if pull else to).shape[0], min(last, MAX_INT32)),
        (C, BLOCK, block, pull, minus is not None),
        (4,),
    )
