# mypy: allow-untyped-defs, allow-incomplete-defs
"""delta and dq for Hopper (compute capability 9.x), head dim 128 and 16-bit types, by programs that stay (../items.py).

The equations are those of ../../backward.py. An item is 128 queries of one user and a head. One warp loads, two groups
of four warps compute, 64 queries each, with q and dout in shared memory; the groups know nothing of each other.

While the groups finish an item, the loading warp has the next one on its way: `out`, which is needed for delta alone,
and log-sum-exp; as many tiles of keys and values as the ring has free slots; q and dout as soon as a group has issued
its last products with them, so they come during the last dS K and while dq is stored. Log-sum-exp can't come by TMA,
which takes numbers from multiples of 16 bytes on, and a user begins anywhere: every lane of the loading warp copies its
own in the background, and arrives on the barrier of the item when they are there.

A group issues the next scores before the product of the present tile is done, and during its exponentials
dP = dout vᵀ of the next tile is still running, so that the tensor cores seldom wait for it.

The only tile with a mask comes first, and the loop has none. A user's rows end inside a tile, and what follows there is
another user's, perhaps NaN: such keys and values are zeroed in shared memory. Such queries make rows of their own,
which nobody stores.

Nobody waits in a circle: before q and dout of an item are on their way, the loading warp waits only for slots whose
last use belongs to an item before, for which all is on its way already.

Names: see ../common.py.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.jagged.launch import Launcher, grid_of
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.hopper.common import (
    GROUP,
    LANES,
    count_key_tiles,
    matrix_of_heads,
    next_slot,
    zero_rows_from,
)
from kernels.jagged_flash_attention.hopper.items import (
    ITEM_SLOTS,
    NUM_FIELDS,
    draw,
    get,
    leave,
    load_item,
    num_programs,
    put_item,
)
from kernels.jagged_flash_attention.hopper.softmax import mask_scores
from kernels.jagged_flash_attention.hopper.two_groups.config import (
    BLOCK,
    GIVEN,
    GROUP_REGISTERS,
    REGISTERS,
    TwoGroupBackwardConfig,
)
from kernels.jagged_flash_attention.hopper.two_groups.ring import load_tile, pass_tiles

BN = gl.constexpr(64)  # keys of a tile in the ring
# Of dq in front of the store: whole rows, and of the rows those that the warp has anyway.
ROWS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
        [[0, 8], [0, 16], [0, 32], [0, 64], [1, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 128],
    )
)


@gluon.jit  # pragma: no cover
def load_partition(
    descs, slots, barriers, p_lse, p_tiles, L, num_items, strides, H: gl.constexpr, HEADS_PER_KV: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Load out, log-sum-exp, keys and values, q and dout of one item after the other.

    q and dout come after the tiles of keys and values that have a slot before the groups let q and dout of the last
    item go, which is in its last tile. What has one slot for all items changes phase with every item, as the number of
    an item's slot does.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [LANES], [1], [0])
    desc_q, desc_g, desc_out, desc_k, desc_v = descs
    q_slots, g_slots, out_slots, lse_slots, k_slots, v_slots, item_slots = slots
    item_ready, item_free, out_free, own_ready, own_free, k_ready, k_free, v_ready, v_free = barriers
    stride_qh, stride_gh, stride_kh, stride_vh = strides
    gl.static_assert(ITEM_SLOTS == 2)
    item_slot = 0
    item_phase = 1  # a new barrier counts as having completed the phase before its first
    slot = 0
    phase = 1
    i_item = gl.program_id(0)
    is_busy = True
    while is_busy:
        i_h, bos, n, i_m, h = load_item(p_tiles, i_item, num_items, H, 2 * GROUP)
        is_busy = n > 0
        mbarrier.wait(item_free.index(item_slot), item_phase)
        put_item(i_h, bos, n, i_m, h, item_slots, item_slot)
        ready = item_ready.index(item_slot)
        if is_busy:
            row = bos + i_m
            mbarrier.wait(out_free, item_slot ^ 1)
            mbarrier.expect(ready, 2 * desc_out.block_type.nbytes)
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(desc_out, [row + i * GROUP, i_h * D], ready, out_slots.index(i))
            o_m = gl.arange(0, 2 * GROUP, layout)
            p_rows = p_lse + i_h.to(gl.int64) * L + row
            async_copy.async_copy_global_to_shared(lse_slots.index(item_slot), p_rows + o_m, mask=o_m < n - i_m)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            num_tiles = count_key_tiles(i_m + GROUP, h, GROUP, BN, CAUSAL)  # the second group sees no less
            row_k = bos + (num_tiles - 1) * BN
            i_kv = i_h // HEADS_PER_KV
            for i in range(num_tiles):
                load_tile(desc_k, row_k, i_kv * stride_kh, k_slots, k_ready, k_free, slot, phase)
                load_tile(desc_v, row_k, i_kv * stride_vh, v_slots, v_ready, v_free, slot, phase)
                slot, phase = next_slot(slot, phase, STAGES)
                row_k -= BN
                if i == gl.minimum(STAGES - 2, num_tiles - 1):
                    for i_group in gl.static_range(2):
                        own = own_ready.index(i_group)
                        own_row = row + i_group * GROUP
                        mbarrier.wait(own_free.index(i_group), item_slot ^ 1)
                        mbarrier.expect(own, 2 * desc_q.block_type.nbytes)
                        tma.async_copy_global_to_shared(desc_q, [own_row, i_h * stride_qh], own, q_slots.index(i_group))
                        tma.async_copy_global_to_shared(desc_g, [own_row, i_h * stride_gh], own, g_slots.index(i_group))
            i_item = draw(p_tiles, num_items, GIVEN)
        else:
            mbarrier.arrive(ready, count=1 + LANES)
        item_slot, item_phase = next_slot(item_slot, item_phase, ITEM_SLOTS)
    leave(p_tiles, num_items, GIVEN)


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
def visit_item(
    slots, barriers, memory, strides, p_delta, p_dq, L, scale, scale_log2, item_slot, num_tiles, slot, phase,
    H: gl.constexpr, HEADS_PER_KV: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """delta and dq of a group's queries of an item, of which it has at least one, over the next tiles in the ring.

    The item's fields are read again where they are needed: the loop over tiles has no registers to keep them in.
    """
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # (64, BN)
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    layout_row: gl.constexpr = gl.SliceLayout(1, layout_s)
    q_slots, g_slots, out_slots, lse_slots, k_slots, v_slots, item_slots = slots
    _, _, out_free, own_ready, own_free, k_ready, k_free, v_ready, v_free = barriers
    q_slot = q_slots.index(GROUP_INDEX)
    g_slot = g_slots.index(GROUP_INDEX)
    dtype: gl.constexpr = q_slots.dtype
    FIRST: gl.constexpr = GROUP_INDEX * GROUP  # row of the item
    item = item_slot * NUM_FIELDS
    n = get(item_slots.index(item + 2))
    i_m = get(item_slots.index(item + 3)) + FIRST
    h = get(item_slots.index(item + 4))

    # The last tile of keys, the only one with a mask.
    i_n = (num_tiles - 1) * BN
    b_none = gl.zeros([GROUP, BN], gl.float32, layout_s)
    mbarrier.wait(own_ready.index(GROUP_INDEX), item_slot)
    mbarrier.wait(k_ready.index(slot), phase)
    mbarrier.wait(v_ready.index(slot), phase)
    if i_n + BN > h:
        zero_rows_from(k_slots.index(slot), h - i_n, BN, D)
        zero_rows_from(v_slots.index(slot), h - i_n, BN, D)
    b_s = warpgroup_mma(q_slot, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(g_slot, v_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)

    # Meanwhile delta. As left operands, a row lies in four lanes, which are also those of its scores.
    b_out = out_slots.index(GROUP_INDEX).load(layout_p).to(gl.float32)
    b_delta = gl.sum(b_out * g_slot.load(layout_p).to(gl.float32), 1)
    b_delta = gl.convert_layout(b_delta, layout_row)
    b_lse = lse_slots.index(item_slot).slice(FIRST, GROUP).load(layout_row)
    mbarrier.arrive(out_free)
    i_h = get(item_slots.index(item))
    bos = get(item_slots.index(item + 1))
    o_m = gl.arange(0, GROUP, layout_row)
    gl.store(p_delta + (i_h.to(gl.int64) * L + (bos + i_m)) + o_m, b_delta, mask=o_m < n - i_m)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_s = mask_scores(b_s, i_m, i_n, h, CAUSAL)
    b_p = gl.exp2(b_s * scale_log2 - b_lse[:, None])

    b_dq = gl.zeros([GROUP, D], gl.float32, layout_acc)
    for _ in range(1, num_tiles):
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
    mbarrier.arrive(own_free.index(GROUP_INDEX))  # q and dout of the next item may come
    mbarrier.arrive(v_free.index(slot))
    b_ds = gl.convert_layout((b_p * (b_dp - b_delta[:, None])).to(dtype), layout_p)
    b_dq = warpgroup_mma(b_ds, k_slots.index(slot), b_dq)

    i_h = get(item_slots.index(item))
    row = get(item_slots.index(item + 1)).to(gl.int64)
    n = get(item_slots.index(item + 2))
    i_m = get(item_slots.index(item + 3)) + FIRST
    mbarrier.arrive(k_free.index(slot))
    slot, phase = next_slot(slot, phase, STAGES)
    if HAS_TARGETS:
        h = get(item_slots.index(item + 4))
        if gl.minimum(i_m + GROUP, n) > h:
            p_q, p_g, p_k, p_v = memory
            stride_ql, stride_qh, stride_gl, stride_gh, stride_kl, stride_kh, stride_vl, stride_vh = strides
            i_kv = i_h // HEADS_PER_KV
            own = (
                p_q + row * stride_ql + i_h * stride_qh, p_g + row * stride_gl + i_h * stride_gh,
                p_k + row * stride_kl + i_kv * stride_kh, p_v + row * stride_vl + i_kv * stride_vh,
            )  # fmt: skip
            b_dq = add_self_gradient(
                b_dq, b_lse, b_delta, own, (stride_ql, stride_gl, stride_kl, stride_vl), i_m, n, h, scale_log2, D,
                layout_acc,
            )  # fmt: skip

    # Out of the registers: in shared memory there are q and dout of the next item, or soon will be.
    b_out = gl.convert_layout((b_dq * scale).to(dtype), ROWS)
    o_m = gl.arange(0, GROUP, gl.SliceLayout(1, ROWS))[:, None]
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))[None, :]
    p_rows = p_dq + ((row + i_m) * H + i_h) * D
    gl.store(p_rows + (o_m * (H * D) + o_d), b_out, mask=o_m < n - i_m)
    return slot, phase


@gluon.jit  # pragma: no cover
def dq_partition(
    slots, barriers, memory, strides, p_delta, p_dq, L, scale, scale_log2, H: gl.constexpr, HEADS_PER_KV: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_TARGETS: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """A group's 64 queries of one item after the other."""
    item_slots = slots[6]
    item_ready, item_free, out_free, own_ready, own_free, k_ready, k_free, v_ready, v_free = barriers
    item_slot = 0
    item_phase = 0
    slot = 0
    phase = 0
    mbarrier.wait(item_ready.index(0), 0)
    n = get(item_slots.index(2))
    while n > 0:
        first = get(item_slots.index(item_slot * NUM_FIELDS + 3))
        h = get(item_slots.index(item_slot * NUM_FIELDS + 4))
        num_tiles = count_key_tiles(first + GROUP_INDEX * GROUP, h, GROUP, BN, CAUSAL)
        if GROUP_INDEX == 0:  # it always has rows, which saves it a branch around all it does
            # The first tile may be one that only the other group sees.
            num_passed = count_key_tiles(first + GROUP, h, GROUP, BN, CAUSAL) - num_tiles
            slot, phase = pass_tiles(k_ready, k_free, v_ready, v_free, num_passed, slot, phase, STAGES)
            slot, phase = visit_item(
                slots, barriers, memory, strides, p_delta, p_dq, L, scale, scale_log2, item_slot, num_tiles, slot,
                phase, H, HEADS_PER_KV, D, STAGES, CAUSAL, HAS_TARGETS, GROUP_INDEX,
            )  # fmt: skip
        else:
            if first + GROUP < n:
                slot, phase = visit_item(
                    slots, barriers, memory, strides, p_delta, p_dq, L, scale, scale_log2, item_slot, num_tiles, slot,
                    phase, H, HEADS_PER_KV, D, STAGES, CAUSAL, HAS_TARGETS, GROUP_INDEX,
                )  # fmt: skip
            else:  # the user ends before this group's rows
                mbarrier.wait(own_ready.index(GROUP_INDEX), item_slot)
                mbarrier.arrive(own_free.index(GROUP_INDEX))
                mbarrier.arrive(out_free)
                slot, phase = pass_tiles(k_ready, k_free, v_ready, v_free, num_tiles, slot, phase, STAGES)
        mbarrier.arrive(item_free.index(item_slot))
        item_slot, item_phase = next_slot(item_slot, item_phase, ITEM_SLOTS)
        mbarrier.wait(item_ready.index(item_slot), item_phase)
        n = get(item_slots.index(item_slot * NUM_FIELDS + 2))


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@gluon.jit(do_not_specialize=["L", "num_items"])  # pragma: no cover
def hopper_two_group_dq_kernel(
    desc_q,  # (L, H * D), blocks of (64, D)
    desc_g,
    desc_out,
    desc_k,  # (L, H_kv * D), blocks of (BN, D)
    desc_v,
    p_q,  # (L, H, D)
    p_g,  # dout, (L, H, D)
    p_k,  # (L, H_kv, D)
    p_v,
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
    num_items,  # capacity * H
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
    """Items until there are no more."""
    gl.static_assert(STAGES >= 2, "a tile is waited for while another one is held")
    dtype: gl.constexpr = desc_q.dtype
    layout_rowwise: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_slots = gl.allocate_shared_memory(dtype, [2, GROUP, D], desc_q.layout)
    g_slots = gl.allocate_shared_memory(dtype, [2, GROUP, D], desc_g.layout)
    out_slots = gl.allocate_shared_memory(dtype, [2, GROUP, D], desc_out.layout)
    lse_slots = gl.allocate_shared_memory(gl.float32, [ITEM_SLOTS, 2 * GROUP], layout_rowwise)
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_v.layout)
    item_slots = gl.allocate_shared_memory(gl.int32, [ITEM_SLOTS * NUM_FIELDS, 1], layout_rowwise)
    item_ready = gl.allocate_shared_memory(gl.int64, [ITEM_SLOTS, 1], mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, [ITEM_SLOTS, 1], mbarrier.MBarrierLayout())
    out_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    own_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    own_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ITEM_SLOTS):
        mbarrier.init(item_ready.index(i), count=1 + LANES)  # the copy engine, and every lane of the loading warp
        mbarrier.init(item_free.index(i), count=2)
    mbarrier.init(out_free, count=2)
    for i in gl.static_range(2):
        mbarrier.init(own_ready.index(i), count=1)
        mbarrier.init(own_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()

    descs = (desc_q, desc_g, desc_out, desc_k, desc_v)
    slots = (q_slots, g_slots, out_slots, lse_slots, k_slots, v_slots, item_slots)
    barriers = (item_ready, item_free, out_free, own_ready, own_free, k_ready, k_free, v_ready, v_free)
    memory = (p_q, p_g, p_k, p_v)
    strides = (stride_ql, stride_qh, stride_gl, stride_gh, stride_kl, stride_kh, stride_vl, stride_vh)
    gl.warp_specialize(
        [
            (dq_partition, (
                slots, barriers, memory, strides, p_delta, p_dq, L, scale, scale_log2,
                H, HEADS_PER_KV, D, STAGES, CAUSAL, HAS_TARGETS, 0,
            )),
            (dq_partition, (
                slots, barriers, memory, strides, p_delta, p_dq, L, scale, scale_log2,
                H, HEADS_PER_KV, D, STAGES, CAUSAL, HAS_TARGETS, 1,
            )),
            (load_partition, (
                descs, slots, barriers, p_lse, p_tiles, L, num_items, (stride_qh, stride_gh, stride_kh, stride_vh),
                H, HEADS_PER_KV, D, STAGES, CAUSAL,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, 24],
    )  # fmt: skip


# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[TwoGroupBackwardConfig, ...]] = {
    128: (TwoGroupBackwardConfig(3), TwoGroupBackwardConfig(2)),
}

launch = Launcher(hopper_two_group_dq_kernel, "num_warps", "maxnreg")


def launch_two_group_dq(
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
    config: TwoGroupBackwardConfig,
) -> None:
    """`dq` and `delta` of self attention; which calls it can do is what `common.supports` says.

    Args:
        dout: `(L, H, D)` in q's dtype; q, k, v, out, lse: as the forward took and gave them. All but out and lse as
            TMA can read them (`common.readable_by_tma`).
        query_tiles: `(entries, 8)`, the tiles of `BLOCK` queries. Not to be used on two streams at once.
        dq: `(L, H, D)`, contiguous, in q's dtype.
        delta: `(H, L)` float32, contiguous, for `launch_two_group_dkv` or the portable kernel.
        call: mask and scale.
        config: how to compute it.
    """
    L, H, D = q.shape
    if L == 0 or query_tiles.shape[0] == 0:
        return
    (num_items,) = grid_of(query_tiles, H)
    launch(
        (num_programs(query_tiles, num_items, 1),),
        tuple([matrix_of_heads(x, BLOCK // 2) for x in (q, dout, out, k, v)]),
        (q, dout, k, v, lse, delta, dq, query_tiles),
        (*q.stride()[:2], *dout.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, num_items, call.scale, call.scale_log2),
        (H, H // k.shape[1], D, config.num_stages, call.causal, call.has_targets, GROUP_REGISTERS),
        (4, REGISTERS),
    )
