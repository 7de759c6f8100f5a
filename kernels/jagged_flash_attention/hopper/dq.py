# mypy: allow-untyped-defs, allow-incomplete-defs
"""delta and dq of long users for Hopper (compute capability 9.x), head dim 128 and 16-bit types, written in Gluon.

The equations are those of ../backward.py, the parts that the warps take those of forward.py: one warp loads by TMA into
rings of slots, two groups of four warps compute, 64 queries each, with q and dout in shared memory.

A group issues the next scores before the product of the present tile is done, and during its exponentials
dP = dout vᵀ of the next tile is still running, so that the tensor cores seldom wait for it.

The only tile with a mask comes first, and the loop has none. A user's rows end inside a tile, and what follows there is
another user's, perhaps NaN: such keys and values are zeroed in shared memory.

Names: see common.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.jagged_flash_attention.hopper.common import (
    GROUP,
    count_key_tiles,
    matrix_of_heads,
    next_slot,
    zero_rows_from,
)
from kernels.jagged_flash_attention.hopper.forward import BLOCK, GROUP_REGISTERS, REGISTERS, load_keys_and_values
from kernels.jagged_flash_attention.launch import Call, Launcher, check_fields, grid_of

BN = gl.constexpr(64)  # keys of a tile in the ring


@gluon.jit  # pragma: no cover
def load_keys_partition(descs, slots, barriers, coordinates, STAGES: gl.constexpr):
    """Queries and dout of both groups once, then tiles of keys and values."""
    desc_q, desc_g, desc_k, desc_v = descs
    q_slots, g_slots, k_slots, v_slots = slots
    own_ready, k_ready, k_free, v_ready, v_free = barriers
    row_q, row_k, col_q, col_g, col_k, col_v, num_tiles = coordinates
    mbarrier.expect(own_ready, 4 * desc_q.block_type.nbytes)
    for i_group in gl.static_range(2):
        row = row_q + i_group * GROUP
        tma.async_copy_global_to_shared(desc_q, [row, col_q], own_ready, q_slots.index(i_group))
        tma.async_copy_global_to_shared(desc_g, [row, col_g], own_ready, g_slots.index(i_group))
    for i in range(num_tiles):
        load_keys_and_values(
            (desc_q, desc_k, desc_v), (q_slots, k_slots, v_slots),
            (own_ready, k_ready, k_free, v_ready, v_free),
            (row_q, row_k, col_q, col_k, col_v, num_tiles), i, BN, STAGES,
        )  # fmt: skip


@gluon.jit  # pragma: no cover
def add_self_gradient(
    b_dq, b_lse, b_delta, memory, strides, i_m, n, h, scale_log2, D: gl.constexpr, layout_acc: gl.constexpr
):
    """What a candidate among the 64 queries gets from its own key: the diagonal, a row-wise product."""
    p_q, p_g, p_k, p_v = memory
    stride_ql, stride_gl, stride_kl, stride_vl = strides
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    layout_row: gl.constexpr = gl.SliceLayout(1, layout_acc)
    o_m = i_m + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    m_candidate = ((o_m >= h) & (o_m < n))[:, None]
    rows = o_m.to(gl.int64)[:, None]
    b_q = gl.load(p_q + rows * stride_ql + o_d, mask=m_candidate, other=0.0).to(gl.float32)
    b_k = gl.load(p_k + rows * stride_kl + o_d, mask=m_candidate, other=0.0).to(gl.float32)
    b_s = gl.convert_layout(gl.sum(b_q * b_k, 1), layout_row)
    b_g = gl.load(p_g + rows * stride_gl + o_d, mask=m_candidate, other=0.0).to(gl.float32)
    b_v = gl.load(p_v + rows * stride_vl + o_d, mask=m_candidate, other=0.0).to(gl.float32)
    b_dp = gl.convert_layout(gl.sum(b_g * b_v, 1), layout_row)

    o_m = i_m + gl.arange(0, GROUP, layout_row)
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout_acc))[None, :]
    m_candidate = (o_m >= h) & (o_m < n)
    b_p = gl.exp2(b_s * scale_log2 - gl.convert_layout(b_lse, layout_row))
    b_ds = gl.where(m_candidate, b_p * (b_dp - gl.convert_layout(b_delta, layout_row)), 0.0)
    b_k = gl.load(p_k + o_m.to(gl.int64)[:, None] * stride_kl + o_d, mask=m_candidate[:, None], other=0.0)
    return b_dq + b_ds[:, None] * b_k.to(gl.float32)


@gluon.jit  # pragma: no cover
def dq_partition(
    slots, barriers, coordinates, memory, strides, rowwise, outputs, sizes,
    H: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """delta and dq of 64 queries, over the tiles of keys in the ring, of which the first alone has a mask."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # (64, BN)
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    layout_row: gl.constexpr = gl.SliceLayout(1, layout_s)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_slots, g_slots, k_slots, v_slots = slots
    own_ready, k_ready, k_free, v_ready, v_free = barriers
    p_lse, p_delta = rowwise
    p_out, p_dq = outputs
    num_tiles = coordinates[6]
    i_m, n, h, scale, scale_log2 = sizes
    dtype: gl.constexpr = q_slots.dtype

    i_m = i_m + GROUP_INDEX * GROUP
    num_own = count_key_tiles(i_m, h, GROUP, BN, CAUSAL)
    q_slot = q_slots.index(GROUP_INDEX)
    g_slot = g_slots.index(GROUP_INDEX)
    slot = 0
    phase = 0
    if num_own < num_tiles:  # the first tile is one that only the other group sees
        mbarrier.arrive(k_free.index(0))
        mbarrier.arrive(v_free.index(0))
        slot, phase = next_slot(slot, phase, STAGES)

    o_row = i_m + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    m_row = o_row < n
    o_out = o_row.to(gl.int64)[:, None] * (H * D) + o_d
    b_out = gl.load(p_out + o_out, mask=m_row[:, None], other=0.0)
    o_m = i_m + gl.arange(0, GROUP, layout_row)
    b_lse = gl.load(p_lse + o_m, mask=o_m < n, other=float("inf"))
    mbarrier.wait(own_ready, 0)
    b_delta = gl.sum(b_out.to(gl.float32) * g_slot.load(layout).to(gl.float32), 1)
    gl.store(p_delta + o_row, b_delta, mask=m_row)
    b_delta = gl.convert_layout(b_delta, layout_row)

    # The last tile of keys, the only one with a mask.
    i_n = (num_own - 1) * BN
    b_none = gl.zeros([GROUP, BN], gl.float32, layout_s)
    mbarrier.wait(k_ready.index(slot), phase)
    if i_n + BN > h:
        mbarrier.wait(v_ready.index(slot), phase)
        zero_rows_from(k_slots.index(slot), h - i_n, BN, D)
        zero_rows_from(v_slots.index(slot), h - i_n, BN, D)
    b_s = warpgroup_mma(q_slot, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False)
    o_n = (i_n + gl.arange(0, BN, gl.SliceLayout(0, layout_s)))[None, :]
    m_s = o_n < h
    if CAUSAL:
        m_s = m_s & (o_n <= o_m[:, None])
    b_s = gl.where(m_s, b_s, float("-inf"))

    b_dq = gl.zeros([GROUP, D], gl.float32, layout_acc)
    mbarrier.wait(v_ready.index(slot), phase)
    b_dp = warpgroup_mma(g_slot, v_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_p = gl.exp2(b_s * scale_log2 - b_lse[:, None])
    for _ in range(num_tiles - num_own + 1, num_tiles):
        last_slot = slot
        slot, phase = next_slot(slot, phase, STAGES)
        b_dp = warpgroup_mma_wait(0, deps=[b_dp])
        mbarrier.arrive(v_free.index(last_slot))
        b_ds = gl.convert_layout((b_p * (b_dp - b_delta[:, None])).to(dtype), layout_p)
        b_dq = warpgroup_mma(b_ds, k_slots.index(last_slot), b_dq, is_async=True)
        mbarrier.wait(k_ready.index(slot), phase)
        b_s = warpgroup_mma(q_slot, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(slot), phase)
        b_dp = warpgroup_mma(g_slot, v_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_s, b_dq, b_ds = warpgroup_mma_wait(1, deps=[b_s, b_dq, b_ds])
        mbarrier.arrive(k_free.index(last_slot))
        b_p = gl.exp2(b_s * scale_log2 - b_lse[:, None])
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    b_ds = gl.convert_layout((b_p * (b_dp - b_delta[:, None])).to(dtype), layout_p)
    b_dq = warpgroup_mma(b_ds, k_slots.index(slot), b_dq)
    if HAS_TARGETS:  # noqa: SIM102
        if gl.minimum(i_m + GROUP, n) > h:
            b_dq = add_self_gradient(b_dq, b_lse, b_delta, memory, strides, i_m, n, h, scale_log2, D, layout_acc)

    # By way of shared memory, where the queries were, so that a warp writes whole rows.
    q_slot.store((b_dq * scale).to(dtype))
    gl.store(p_dq + o_out, q_slot.load(layout), mask=m_row[:, None])


@gluon.jit(do_not_specialize=["L"])  # pragma: no cover
def hopper_dq_kernel(
    desc_q,  # (L, H * D), blocks of (64, D)
    desc_g,
    desc_k,  # (L, H_kv * D), blocks of (BN, D)
    desc_v,
    p_q,  # (L, H, D)
    p_g,  # dout, (L, H, D)
    p_k,  # (L, H_kv, D)
    p_v,
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2
    p_delta,  # (H, L), float32, written
    p_dq,  # (L, H, D), contiguous
    p_tiles,  # (capacity, 8), int32, tiles of 128 queries
    stride_ql,
    stride_qh,
    stride_gl,
    stride_gh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    L,
    scale,
    scale_log2,
    H: gl.constexpr,
    HEADS_PER_KV: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
):
    """One row of the tile list and one head: dq and delta of 128 queries of one user."""
    pid = gl.program_id(0)
    i_h = pid % H
    i_kv = i_h // HEADS_PER_KV
    p_tile = p_tiles + (pid // H).to(gl.int64) * 8
    bos = gl.load(p_tile)
    n = gl.load(p_tile + 1)
    i_m = gl.load(p_tile + 4) * (2 * GROUP)
    h = gl.load(p_tile + 5)
    if n == 0:
        return

    dtype: gl.constexpr = desc_q.dtype
    q_slots = gl.allocate_shared_memory(dtype, [2, GROUP, D], desc_q.layout)
    g_slots = gl.allocate_shared_memory(dtype, [2, GROUP, D], desc_g.layout)
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_v.layout)
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()

    num_tiles = count_key_tiles(i_m + GROUP, h, GROUP, BN, CAUSAL)  # of the second group, which sees no less
    row = bos.to(gl.int64)
    p_q += row * stride_ql + i_h * stride_qh
    p_g += row * stride_gl + i_h * stride_gh
    p_k += row * stride_kl + i_kv * stride_kh
    p_v += row * stride_vl + i_kv * stride_vh
    p_out += (row * H + i_h) * D
    p_dq += (row * H + i_h) * D
    i_rowwise = i_h.to(gl.int64) * L + row
    descs = (desc_q, desc_g, desc_k, desc_v)
    slots = (q_slots, g_slots, k_slots, v_slots)
    barriers = (own_ready, k_ready, k_free, v_ready, v_free)
    coordinates = (bos + i_m, bos, i_h * stride_qh, i_h * stride_gh, i_kv * stride_kh, i_kv * stride_vh, num_tiles)
    memory = (p_q, p_g, p_k, p_v)
    strides = (stride_ql, stride_gl, stride_kl, stride_vl)
    rowwise = (p_lse + i_rowwise, p_delta + i_rowwise)
    outputs = (p_out, p_dq)
    sizes = (i_m, n, h, scale, scale_log2)
    gl.warp_specialize(
        [
            (dq_partition, (
                slots, barriers, coordinates, memory, strides, rowwise, outputs, sizes,
                H, D, STAGES, CAUSAL, HAS_TARGETS, 0,
            )),
            (dq_partition, (
                slots, barriers, coordinates, memory, strides, rowwise, outputs, sizes,
                H, D, STAGES, CAUSAL, HAS_TARGETS, 1,
            )),
            (load_keys_partition, (descs, slots, barriers, coordinates, STAGES)),
        ],
        [4, 1],
        [GROUP_REGISTERS, 24],
    )  # fmt: skip


@dataclass(frozen=True)
class BackwardConfig:
    """How a program is laid out; no setting changes what is computed."""

    num_stages: int
    """Slots of the ring, at least 2; of dk and dv 3."""

    block: ClassVar[int] = BLOCK
    """Queries of a program; of dk and dv keys."""

    def __post_init__(self) -> None:
        check_fields(self, "a backward for Hopper", {"num_stages": range(2, 9)})


# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[BackwardConfig, ...]] = {128: (BackwardConfig(3), BackwardConfig(2))}

launch = Launcher(hopper_dq_kernel, "num_warps", "maxnreg")


def launch_hopper_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_tiles: Tensor,
    dq: Tensor,
    delta: Tensor,
    call: Call,
    config: BackwardConfig,
) -> None:
    """`dq` and `delta` of self attention; which calls it can do is what `common.supports` says.

    Args:
        dout: `(L, H, D)` in q's dtype; q, k, v, out, lse: as the forward took and gave them. All but out and lse as
            TMA can read them (`common.readable_by_tma`).
        query_tiles: `(entries, 8)`, the tiles of `BLOCK` queries.
        dq: `(L, H, D)`, contiguous, in q's dtype.
        delta: `(H, L)` float32, contiguous, for `launch_hopper_dkv` or the portable kernel.
        call: mask and scale.
        config: how to compute it.
    """
    L, H, D = q.shape
    if L == 0 or query_tiles.shape[0] == 0:
        return
    launch(
        grid_of(query_tiles, H),
        tuple([matrix_of_heads(x, GROUP.value) for x in (q, dout, k, v)]),
        (q, dout, k, v, out, lse, delta, dq, query_tiles),
        (*q.stride()[:2], *dout.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, call.scale, call.scale_log2),
        (H, H // k.shape[1], D, config.num_stages, call.causal, call.has_targets, GROUP_REGISTERS),
        (4, REGISTERS),
    )
