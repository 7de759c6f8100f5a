# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the kernels for Hopper share: waiting for earlier ones, rings of slots, rows of other users, candidates, TMA.

Names: see ../tiles.py; `ready` barriers say that a slot is filled, `free` barriers that those who compute are done with
it; `b_g` and `g_slots` hold dout. Scores stay unscaled; the scale (in base 2) goes into the one fused multiply-add in
front of `exp2`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from kernels.jagged.launch import Descriptor, fits_copy_engine

GROUP = gl.constexpr(64)  # rows of a group of four warps: those of one wgmma
LANES = gl.constexpr(32)  # of the warp that loads: each of them arrives on a barrier when its own copy is there
# All warps of a group wait for each other; the name changed between triton 3.6 and 3.7.
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit  # pragma: no cover
def wait_for_earlier_kernels():
    """Until whatever was launched before on this stream is done, and what it wrote can be seen by the whole grid.

    A kernel launched with `launch_pdl` begins while the one before it may still run, if that one allows it, as the one
    that makes the tile lists does. So it touches no global memory before, be it to read or to write; and one thread of
    every program has to wait, or a third kernel could begin before the first one ended.
    """
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit  # pragma: no cover
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The next slot of a ring, and the phase of its barriers, which turns over with every round."""
    is_last = slot == STAGES - 1
    return gl.where(is_last, 0, slot + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit  # pragma: no cover
def zero_rows_from(slot, num_rows, BN: gl.constexpr, D: gl.constexpr):
    """Zero the rows of a tile of values from num_rows on: they are not this user's, and 0 * NaN is NaN.

    Where two groups share a tile both do it, each for itself: they write the same.
    """
    swizzle: gl.constexpr = slot.type.layout.swizzle_byte_width
    pairs = slot._reinterpret(gl.int32, [BN, D // 2], gl.NVMMASharedLayout(swizzle, element_bitwidth=32, rank=2))
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [256 // D, D // 8], [4, 1], [1, 0])
    m_row = (gl.arange(0, BN, gl.SliceLayout(1, layout)) < num_rows)[:, None]
    pairs.store(gl.where(m_row, pairs.load(layout), 0))
    fence_async_shared()


@gluon.jit  # pragma: no cover
def count_key_tiles(i_m, h, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """Tiles of history keys that the BM queries from i_m on visit; at least one, if all of it is masked."""
    hi = h
    if CAUSAL:
        hi = gl.where(i_m + BM <= h, i_m + BM, h)  # a candidate sees the whole history
    return gl.maximum(gl.cdiv(hi, BN), 1)


@gluon.jit  # pragma: no cover
def resident(slot, layout_s: gl.constexpr, IN_REGISTERS: gl.constexpr):
    """A left operand that stays for the whole program: in registers it is not read again by every product."""
    if IN_REGISTERS:
        return slot.load(gl.DotOperandLayout(0, layout_s, 2))
    else:
        return slot


@gluon.jit  # pragma: no cover
def attend_self(
    b_acc, b_shift, b_sum, p_q, p_k, p_v, stride_ql, stride_kl, stride_vl, num_before, num_rows, scale_log2,
    BM: gl.constexpr, D: gl.constexpr, layout_acc: gl.constexpr,
):  # fmt: skip
    """Let every candidate among the queries see itself: the diagonal, one row-wise product.

    Rows of the pointers from num_before to below num_rows are candidates. b_shift: what is subtracted from scaled
    scores, for rows that have seen something, which is where b_sum isn't zero.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_m = gl.arange(0, BM, gl.SliceLayout(1, layout))[:, None]
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    m_candidate = (o_m >= num_before) & (o_m < num_rows)
    b_q = gl.load(p_q + (o_m * stride_ql + o_d), mask=m_candidate, other=0.0).to(gl.float32)
    b_k = gl.load(p_k + (o_m * stride_kl + o_d), mask=m_candidate, other=0.0).to(gl.float32)
    b_s = gl.convert_layout(gl.sum(b_q * b_k, 1), gl.SliceLayout(1, layout_acc))

    o_m = gl.arange(0, BM, gl.SliceLayout(1, layout_acc))
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout_acc))[None, :]
    m_candidate = (o_m >= num_before) & (o_m < num_rows)
    b_v = gl.load(p_v + (o_m[:, None] * stride_vl + o_d), mask=m_candidate[:, None], other=0.0)
    b_s = gl.where(m_candidate, b_s * scale_log2, float("-inf"))
    b_shift = gl.where(b_sum == 0.0, float("-inf"), b_shift)
    b_new_shift = gl.maximum(b_shift, b_s)
    b_new_shift = gl.where(b_new_shift == float("-inf"), 0.0, b_new_shift)  # rows past the end see nothing
    b_p = gl.exp2(b_s - b_new_shift)
    b_decay = gl.exp2(b_shift - b_new_shift)
    b_acc = b_acc * b_decay[:, None] + b_p[:, None] * b_v.to(gl.float32)
    return b_acc, b_new_shift, b_sum * b_decay + b_p


@gluon.jit  # pragma: no cover
def replace_candidates(
    b_dk, b_dv, memory, strides, row, i_kv, i_n, n, h, L, scale, scale_log2,
    HEADS_PER_KV: gl.constexpr, D: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """A candidate key is seen by itself alone: its dk and dv are row-wise products."""
    p_q, p_g, p_k, p_v, p_lse, p_delta = memory
    stride_ql, stride_qh, stride_gl, stride_gh, stride_kl, stride_kh, stride_vl, stride_vh = strides
    i_h = i_kv * HEADS_PER_KV
    p_q += row * stride_ql + i_h * stride_qh
    p_g += row * stride_gl + i_h * stride_gh
    p_k += row * stride_kl + i_kv * stride_kh
    p_v += row * stride_vl + i_kv * stride_vh
    o_n = i_n + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    m_candidate = (o_n >= h) & (o_n < n)
    rows = o_n.to(gl.int64)[:, None]
    b_k = gl.load(p_k + rows * stride_kl + o_d, mask=m_candidate[:, None], other=0.0).to(gl.float32)
    b_v = gl.load(p_v + rows * stride_vl + o_d, mask=m_candidate[:, None], other=0.0).to(gl.float32)
    b_own_dk = gl.zeros([GROUP, D], gl.float32, layout)
    b_own_dv = gl.zeros([GROUP, D], gl.float32, layout)
    for i_g in range(HEADS_PER_KV):
        p_rows_q = p_q + i_g * stride_qh + rows * stride_ql + o_d
        p_rows_g = p_g + i_g * stride_gh + rows * stride_gl + o_d
        i_lse = (i_h + i_g).to(gl.int64) * L + row + o_n
        b_q = gl.load(p_rows_q, mask=m_candidate[:, None], other=0.0).to(gl.float32)
        b_g = gl.load(p_rows_g, mask=m_candidate[:, None], other=0.0).to(gl.float32)
        b_lse = gl.load(p_lse + i_lse, mask=m_candidate, other=float("inf"))
        b_delta = gl.load(p_delta + i_lse, mask=m_candidate, other=0.0)
        b_p = gl.exp2(gl.sum(b_q * b_k, 1) * scale_log2 - b_lse)
        b_ds = b_p * (gl.sum(b_g * b_v, 1) - b_delta)
        b_own_dk += b_ds[:, None] * b_q
        b_own_dv += b_p[:, None] * b_g
    b_dk = gl.where(m_candidate[:, None], (b_own_dk * scale).to(b_dk.dtype), b_dk)
    b_dv = gl.where(m_candidate[:, None], b_own_dv.to(b_dv.dtype), b_dv)
    return b_dk, b_dv


def supports(head_dim: int, dtype: torch.dtype, window: int | None, dropout_p: float) -> bool:
    """Whether the kernels for Hopper can do this self attention, by what is known while tracing too.

    They take head dim 32, 64 or 128, bfloat16 or float16, no window and no dropout, on compute capability 9.x. Tensors
    that TMA can't read as they lie have to be copied first (`readable_by_tma`).
    """
    return window is None and dropout_p == 0.0 and head_dim in (32, 64, 128) and dtype in GLUON_DTYPES


def readable_by_tma(x: Tensor) -> Tensor:
    """The tensor, or a copy if the copy engine can't read it as it lies."""
    return x if fits_copy_engine(x) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _layout_of(rows: int, head_dim: int, dtype: torch.dtype) -> Any:
    """Of a block on the chip."""
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], GLUON_DTYPES[dtype])


def matrix_of_heads(x: Tensor, rows: int) -> Descriptor:
    """Blocks of `rows` tokens of one head of `(L, H, D)`, taken as a matrix; head i starts at column i * stride(1)."""
    L, num_heads, head_dim = x.shape
    row, head, _ = x.stride()
    shape = [L, (num_heads - 1) * head + head_dim]
    return Descriptor(x, shape, [row, 1], [rows, head_dim], _layout_of(rows, head_dim, x.dtype))
