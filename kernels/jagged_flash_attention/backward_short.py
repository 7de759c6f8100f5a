# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward of users that fit into one tile: dq, dk and dv in one pass, one program per user and key head.

With queries and keys of a user together on the chip, scores and probabilities are computed once instead of twice and
every row is read once; no atomics, no loop. The equations are those of backward.py. Names: see tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.launch import Launcher, grid_of, next_power_of_2
from kernels.jagged.tiles import is_visible, load_entry, load_tile, store_tile, visible_keys
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.tiles import is_kept, load_rowwise
from kernels.jagged_flash_attention.tuning import Tile


@triton.jit(do_not_specialize=["L", "window", "drop_below", "keep_scale"])  # pragma: no cover
def short_users_kernel(
    p_q,  # (L, H, D)
    p_k,  # (L, H // G, D)
    p_v,
    p_dout,  # (L, H, D)
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2
    p_dq,  # (L, H, D), contiguous
    p_dk,  # (L, H // G, D), contiguous
    p_dv,
    p_tiles,  # (entries, 8), users of at most BM tokens
    p_seed,
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    stride_gl,
    stride_gh,
    L,
    window,
    scale,
    scale_log2,
    drop_below,
    keep_scale,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one user and key head."""
    pid = tl.program_id(0)
    i_kh = pid % (H // G)
    start, n, _, _, _, h = load_entry(p_tiles, pid // (H // G))
    if n == 0:
        return
    seed = 0
    if DROPOUT:
        seed = tl.load(p_seed)
    p_k += start * stride_kl + i_kh.to(tl.int64) * stride_kh
    p_v += start * stride_vl + i_kh.to(tl.int64) * stride_vh
    b_k = load_tile(p_k, 0, n, stride_kl, D, BM, BD, True)
    b_v = load_tile(p_v, 0, n, stride_vl, D, BM, BD, True)

    o_row = tl.arange(0, BM)
    first, end = visible_keys(o_row[:, None], h, window, CAUSAL, HAS_WINDOW, HAS_TARGETS)
    m_s = is_visible(o_row[None, :], 0, first, end, HAS_WINDOW)
    if HAS_TARGETS:  # a candidate sees itself
        m_s = m_s | ((o_row[:, None] == o_row[None, :]) & (o_row[:, None] >= h))

    b_dk = tl.zeros([BM, BD], dtype=tl.float32)
    b_dv = tl.zeros([BM, BD], dtype=tl.float32)
    for i_g in tl.static_range(G):
        i_h = i_kh * G + i_g
        row = (start * H + i_h) * D
        row_h = i_h.to(tl.int64) * L + start
        b_q = load_tile(p_q + start * stride_ql + i_h.to(tl.int64) * stride_qh, 0, n, stride_ql, D, BM, BD, True)
        b_dout = load_tile(p_dout + start * stride_gl + i_h.to(tl.int64) * stride_gh, 0, n, stride_gl, D, BM, BD, True)
        b_out = load_tile(p_out + row, 0, n, H * D, D, BM, BD, True)
        b_lse = load_rowwise(p_lse + row_h, 0, n, float("inf"), BM, True)  # inf: a probability of zero
        b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)

        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (queries, keys), not scaled
        b_p = tl.where(m_s, tl.exp2(b_s * scale_log2 - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_dropped = b_p
        if DROPOUT:
            m_kept = is_kept(seed, start + o_row[:, None], i_h, o_row[None, :], drop_below)
            b_keep = tl.where(m_kept, keep_scale, 0.0)
            b_dropped = b_p * b_keep
            b_dp = b_dp * b_keep
        b_dv = tl.dot(tl.trans(b_dropped.to(b_dout.dtype)), b_dout, b_dv, input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q.dtype)
        b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision=PRECISION)
        b_dq = tl.dot(b_ds, b_k, input_precision=PRECISION)
        store_tile(p_dq + row, b_dq * scale, 0, n, H * D, D, BM, BD)

    row_kv = (start * (H // G) + i_kh) * D
    store_tile(p_dk + row_kv, b_dk * scale, 0, n, H // G * D, D, BM, BD)
    store_tile(p_dv + row_kv, b_dv, 0, n, H // G * D, D, BM, BD)


launch = Launcher(short_users_kernel, "num_warps", "num_stages", "maxnreg")


def launch_short_users(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    tiles: Tensor,
    call: Call,
    tile: Tile,
    seed: Tensor | None = None,
) -> None:
    """Write the rows of dq, dk and dv of users of at most `tile.block_m` tokens; self attention only.

    Args:
        dout, q, k, v, out, lse: as for `launch_backward`, which is called for the other users.
        gradients: dq, dk and dv, contiguous.
        tiles: `(entries, 8)`, these users.
        call: as for the forward.
        tile: how to compute it; `block_n` is not used.
        seed: `(1,)` int64, where there is dropout.
    """
    L, H, D = q.shape
    Hk = k.shape[1]
    launch(
        grid_of(tiles, Hk),
        (),
        (q, k, v, dout, out, lse, *gradients, tiles, tiles if seed is None else seed),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2]),
        (L, call.window or 0, call.scale, call.scale_log2, call.drop_below, call.keep_scale),
        (H, H // Hk, D, tile.block_m, next_power_of_2(D), *call.constants),
        (tile.num_warps, tile.num_stages, tile.max_registers),
    )
