# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of a jagged operand and a dense one of one row per user, which every token of the user meets.

    z = x op dense[user],  out = dropout(activation(z))
    dz = activation'(z) dropout(dout);  add: dx = dz, ddense = sum of dz over the user's rows
                                        mul: dx = dz dense[user], ddense = sum of dz x

The backward computes z again. Each of its tiles writes one partial sum of ddense (kernels/jagged/partial_sums.py).

Names: see kernels/jagged/tiles.py; BL x BC tiles of rows x columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import Launcher, grid_of
from kernels.jagged.partial_sums import launch_partial_sums, new_partial_sums, slot_of
from kernels.jagged.score_layout import BLOCK
from kernels.jagged.tiles import (
    columns_per_tile,
    load_columns,
    load_entry,
    load_user_index,
    row_and_columns,
    store_columns,
)

BACKWARD_COLUMNS = 64  # of a tile, at most: three operands at once are many registers


@triton.jit  # pragma: no cover
def combine(b_x, b_y, OP: tl.constexpr):
    """z."""
    if OP == "add":
        return b_x + b_y
    else:
        return b_x * b_y


@triton.jit  # pragma: no cover
def activate(b_z, ACTIVATION: tl.constexpr):
    """activation(z); NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(b_z < 0.0, 0.0, b_z)
    elif ACTIVATION == "silu":
        return b_z * tl.sigmoid(b_z)
    elif ACTIVATION == "gelu":
        return b_z * (0.5 + 0.5 * tl.erf(b_z * 0.7071067811865476))
    else:
        return b_z


@triton.jit  # pragma: no cover
def slope(b_z, ACTIVATION: tl.constexpr):
    """activation'(z), 0 for the kink of relu."""
    if ACTIVATION == "relu":
        return tl.where(b_z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        b_sigmoid = tl.sigmoid(b_z)
        return b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    else:
        b_normal = 0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)
        return 0.5 + 0.5 * tl.erf(b_z * 0.7071067811865476) + b_z * b_normal


@triton.jit  # pragma: no cover
def is_kept(seed, i_row, i_column, drop_below, C: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr):
    """Which elements dropout keeps, of rows i_row ... and columns i_column ...: (BL, BC); see `dropout_mask`.

    i_row is int64, and counts from the first row of the tensor, so forward and backward agree.
    """
    o_counter = i_column // 4 + tl.arange(0, BC // 4)
    number = (i_row + tl.arange(0, BL))[:, None] * tl.cdiv(C, 4) + o_counter[None, :]
    c0, c1 = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, c0, c1, c0 * 0, c0 * 0)
    words = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (BL, BC))
    return words.to(tl.int64) >= drop_below


@triton.jit(do_not_specialize=["drop_below", "keep_scale"])  # pragma: no cover
def jagged_dense_elementwise_kernel(
    p_x,  # (L, C)
    p_dense,  # (B, C)
    p_out,  # (L, C), contiguous
    p_tiles,  # (entries, 8), tiles of BL rows
    p_seed,  # (1,), read only with DROPOUT
    stride_x,
    stride_dense,
    drop_below,
    keep_scale,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    OP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """BL rows of one user, BC columns."""
    i_entry, i_c = row_and_columns(C, BC)
    start, n, _, _, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_l = i_tile * BL
    i_user = load_user_index(p_tiles, i_entry)
    b_x = load_columns(p_x + start * stride_x, i_l, n, stride_x, i_c, C, BL, BC).to(tl.float32)
    b_dense = load_columns(p_dense, i_user, i_user + 1, stride_dense, i_c, C, 1, BC).to(tl.float32)
    b_out = activate(combine(b_x, b_dense, OP), ACTIVATION)
    if DROPOUT:
        m_kept = is_kept(tl.load(p_seed), start + i_l, i_c, drop_below, C, BL, BC)
        b_out = tl.where(m_kept, b_out * keep_scale, 0.0)
    store_columns(p_out + start * C, b_out, i_l, n, C, i_c, C, BL, BC)


@triton.jit(do_not_specialize=["drop_below", "keep_scale"])  # pragma: no cover
def jagged_dense_elementwise_backward_kernel(
    p_dout,  # (L, C)
    p_x,  # (L, C), not read if z is not needed
    p_dense,  # (B, C), likewise
    p_dx,  # (L, C), contiguous; written with NEEDS_DX
    p_sums,  # (slots, C) float32; written with NEEDS_DDENSE
    p_tiles,  # (entries, 8), tiles of BL rows
    p_seed,  # (1,), read only with DROPOUT
    stride_dout,
    stride_x,
    stride_dense,
    drop_below,
    keep_scale,
    C: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    OP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DDENSE: tl.constexpr,
):
    """dx of BL rows of one user and BC columns, and what these rows give to ddense."""
    i_entry, i_c = row_and_columns(C, BC)
    start, n, _, _, i_tile, _ = load_entry(p_tiles, i_entry)
    if n == 0:
        return
    i_l = i_tile * BL
    i_user = load_user_index(p_tiles, i_entry)
    b_dz = load_columns(p_dout + start * stride_dout, i_l, n, stride_dout, i_c, C, BL, BC).to(tl.float32)
    if DROPOUT:
        m_kept = is_kept(tl.load(p_seed), start + i_l, i_c, drop_below, C, BL, BC)
        b_dz = tl.where(m_kept, b_dz * keep_scale, 0.0)
    if OP == "mul" or ACTIVATION != "none":
        b_x = load_columns(p_x + start * stride_x, i_l, n, stride_x, i_c, C, BL, BC).to(tl.float32)
        b_dense = load_columns(p_dense, i_user, i_user + 1, stride_dense, i_c, C, 1, BC).to(tl.float32)
        if ACTIVATION != "none":
            b_dz = b_dz * slope(combine(b_x, b_dense, OP), ACTIVATION)
    if NEEDS_DX:
        b_dx = b_dz
        if OP == "mul":
            b_dx = b_dz * b_dense
        store_columns(p_dx + start * C, b_dx, i_l, n, C, i_c, C, BL, BC)
    if NEEDS_DDENSE:
        if OP == "mul":
            b_dz = b_dz * b_x
        # Past the end of the user dz is zero, because dout is; or NaN, where an infinite z makes all of it NaN anyway.
        i_slot = slot_of(start, i_user, i_tile, BL)
        o_c = i_c + tl.arange(0, BC)
        tl.store(p_sums + i_slot * C + o_c, tl.sum(b_dz, 0), mask=o_c < C)


launch_forward_kernel = Launcher(jagged_dense_elementwise_kernel, "num_warps")
launch_backward_kernel = Launcher(jagged_dense_elementwise_backward_kernel, "num_warps")


def launch_dense_elementwise(
    x: Tensor, dense: Tensor, tiles: Tensor, seed: Tensor | None, op: str, activation: str, dropout_p: float
) -> Tensor:
    """`(L, C)` in x's dtype: `dropout(activation(x op dense[user]))`.

    Args:
        x, dense: `(L, C)`, `(B, C)`, contiguous in the last dimension.
        tiles: `(entries, 8)`, tiles of BLOCK rows.
        seed: `(1,)` int64, where there is dropout.
        op, activation, dropout_p: as for `jagged_dense_elementwise`; no activation is "none".
    """
    C = x.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0 or tiles.shape[0] == 0:
        return out
    block = columns_per_tile(C)
    launch_forward_kernel(
        grid_of(tiles, -(-C // block)),
        (),
        (x, dense, out, tiles, tiles if seed is None else seed),
        (x.stride(0), dense.stride(0)),
        (int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p)),
        (C, BLOCK, block, op, activation, dropout_p > 0.0),
        (4,),
    )
    return out


def launch_dense_elementwise_backward(
    dout: Tensor,
    x: Tensor | None,
    dense: Tensor | None,
    tiles: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    op: str,
    activation: str,
    dropout_p: float,
    needs_dx: bool,
    needs_ddense: bool,
) -> tuple[Tensor, Tensor]:
    """dx `(L, C)` and ddense `(B, C)` in dout's dtype; those that are not needed are `(0, C)`.

    Args:
        dout: `(L, C)`, contiguous in the last dimension.
        x, dense: of the forward; None where neither the activation nor the product needs them.
        offsets, max_seqlen: of the rows.
        tiles, seed, op, activation, dropout_p: as for the forward.
        needs_dx, needs_ddense: what is wanted.
    """
    L, C = dout.shape
    B = offsets.shape[0] - 1
    dx = torch.empty((L if needs_dx else 0, C), dtype=dout.dtype, device=dout.device)
    ddense = torch.empty((B if needs_ddense else 0, C), dtype=dout.dtype, device=dout.device)
    if dx.numel() == 0 and ddense.numel() == 0:
        return dx, ddense
    if L == 0 or tiles.shape[0] == 0:
        return dx, ddense.zero_()
    block = columns_per_tile(C, BACKWARD_COLUMNS)
    sums = new_partial_sums(L if needs_ddense else 0, B if needs_ddense else 0, BLOCK, C, dout.device)
    x = dout if x is None else x
    dense = dout if dense is None else dense
    launch_backward_kernel(
        grid_of(tiles, -(-C // block)),
        (),
        (dout, x, dense, dx, sums, tiles, tiles if seed is None else seed),
        (dout.stride(0), x.stride(0), dense.stride(0)),
        (int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p)),
        (C, BLOCK, block, op, activation, dropout_p > 0.0, needs_dx, needs_ddense),
        (4,),
    )
    if needs_ddense:
        launch_partial_sums(sums, ddense, offsets, L, max_seqlen, BLOCK)
    return dx, ddense
