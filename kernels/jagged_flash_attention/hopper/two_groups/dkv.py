# mypy: allow-untyped-defs, allow-incomplete-defs
"""dk and dv for Hopper (compute capability 9.x), head dim 128 and 16-bit types, by programs that stay (../items.py).

The equations are those of ../../backward.py. An item is 128 keys of one user and a key head. One warp loads, two groups
of four warps compute, 64 keys each, with k and v in shared memory, where those of the next item come meanwhile. What
streams by are tiles of 64 queries: q, dout, log-sum-exp and delta. The transposed scores (keys, queries) stay where
they are in registers as the left operand of both products.

A group issues the next scores before the products of the present tile are done, and during its exponentials
dP = dout vᵀ of the next tile is still running, so that the tensor cores seldom wait for it.

The only tile with a mask comes first, and the loop has none. A user's rows end inside a tile, and what follows there is
another user's, perhaps NaN: such rows are zeroed in shared memory, log-sum-exp and delta as well. Then they have a
probability of one, but of a dout of zero.

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
    matrix_of_heads,
    next_slot,
    replace_candidates,
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
from kernels.jagged_flash_attention.hopper.two_groups.config import (
    GIVEN,
    GROUP_REGISTERS,
    REGISTERS,
    TwoGroupBackwardConfig,
)

BM = gl.constexpr(64)  # queries of a tile in the ring


@gluon.jit  # pragma: no cover
def tiles_of_queries(i_n, n, h, CAUSAL: gl.constexpr):
    """The first tile of queries that sees the 128 keys from i_n on, and how many do; nobody else sees candidates."""
    first = 0
    if CAUSAL:
        first = i_n // BM
    return first, gl.where(i_n < h, gl.cdiv(n, BM) - first, 0)


@gluon.jit  # pragma: no cover
def load_partition(
    descs, slots, own_slots, barriers, p_tiles, num_items, p_lse, p_delta, strides, L, NUM_KV: gl.constexpr,
    HEADS_PER_KV: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Load keys and values of one item after the other, and the tiles of queries that see them, for every head: the
    first, the second, the last, the others.

    Log-sum-exp and delta can't come by TMA, which takes numbers from multiples of 16 bytes on, and a user begins
    anywhere: every lane copies its own in the background, and arrives on the barrier when they are there.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [LANES], [1], [0])
    desc_q, desc_g, desc_k, desc_v = descs
    q_slots, g_slots, lse_slots, delta_slots = slots
    k_slots, v_slots, item_slots = own_slots
    ready, free, item_ready, item_free = barriers
    stride_qh, stride_gh, stride_kh, stride_vh = strides
    item_slot = 0
    item_phase = 1  # a new barrier counts as having completed the phase before its first
    slot = 0
    phase = 1
    i_item = gl.program_id(0)
    is_busy = True
    while is_busy:
        i_kv, bos, n, i_n, h = load_item(p_tiles, i_item, num_items, NUM_KV, 2 * GROUP)
        is_busy = n > 0
        mbarrier.wait(item_free.index(item_slot), item_phase)
        put_item(i_kv, bos, n, i_n, h, item_slots, item_slot)
        own_ready = item_ready.index(item_slot)
        if is_busy:
            mbarrier.expect(own_ready, 4 * desc_k.block_type.nbytes)
            for i_group in gl.static_range(2):
                own = 2 * item_slot + i_group
                row = bos + i_n + i_group * GROUP
                tma.async_copy_global_to_shared(desc_k, [row, i_kv * stride_kh], own_ready, k_slots.index(own))
                tma.async_copy_global_to_shared(desc_v, [row, i_kv * stride_vh], own_ready, v_slots.index(own))
            first, count = tiles_of_queries(i_n, n, h, CAUSAL)
            for i_g in range(HEADS_PER_KV):
                i_h = i_kv * HEADS_PER_KV + i_g
                i_rowwise = i_h.to(gl.int64) * L + bos
                for i in range(count):
                    tile = first + gl.where(i == 2, count - 1, gl.where(i < 2, i, i - 1))
                    row = bos + tile * BM
                    mbarrier.wait(free.index(slot), phase)
                    is_ready = ready.index(slot)
                    mbarrier.expect(is_ready, 2 * desc_q.block_type.nbytes)
                    tma.async_copy_global_to_shared(desc_q, [row, i_h * stride_qh], is_ready, q_slots.index(slot))
                    tma.async_copy_global_to_shared(desc_g, [row, i_h * stride_gh], is_ready, g_slots.index(slot))
                    o_m = tile * BM + gl.arange(0, BM, layout)
                    o_rowwise = i_rowwise + o_m
                    async_copy.async_copy_global_to_shared(lse_slots.index(slot), p_lse + o_rowwise, mask=o_m < n)
                    async_copy.async_copy_global_to_shared(delta_slots.index(slot), p_delta + o_rowwise, mask=o_m < n)
                    async_copy.mbarrier_arrive(is_ready, increment_count=False)
                    slot, phase = next_slot(slot, phase, STAGES)
            i_item = draw(p_tiles, num_items, GIVEN)
        else:
            mbarrier.arrive(own_ready)
        item_slot, item_phase = next_slot(item_slot, item_phase, ITEM_SLOTS)
    leave(p_tiles, num_items, GIVEN)


@gluon.jit  # pragma: no cover
def load_rowwise(slots, slot, layout_s: gl.constexpr):
    """Log-sum-exp and delta of a tile of queries, each (1, BM)."""
    _, _, lse_slots, delta_slots = slots
    layout: gl.constexpr = gl.SliceLayout(0, layout_s)
    return lse_slots.index(slot).load(layout)[None, :], delta_slots.index(slot).load(layout)[None, :]


@gluon.jit  # pragma: no cover
def begin_dp(v_slot, g_slot, b_delta, layout_s: gl.constexpr):
    """dP - delta of the transposed scores, in flight. It starts from -delta, which then takes no registers later on."""
    b_start = gl.zeros([GROUP, BM], gl.float32, layout_s) - b_delta
    return warpgroup_mma(v_slot, g_slot.permute((1, 0)), b_start, is_async=True)


@gluon.jit  # pragma: no cover
def next_queries(
    b_dk, b_dv, b_p, b_dp, k_slot, v_slot, slots, barriers, last_slot, slot, phase, scale_log2,
    D: gl.constexpr,
):  # fmt: skip
    """Finish the tile of queries in last_slot, of which there is b_p, and dP in flight; get the next one as far."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    q_slots, g_slots, _, _ = slots
    ready, free, _, _ = barriers
    dtype: gl.constexpr = q_slots.dtype
    b_none = gl.zeros([GROUP, BM], gl.float32, layout_s)

    b_left = gl.convert_layout(b_p.to(dtype), layout_p)
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    b_ds = gl.convert_layout((b_p * b_dp).to(dtype), layout_p)
    # Not before b_p and b_dp have left their registers.
    b_dv = warpgroup_mma(b_left, g_slots.index(last_slot), b_dv, is_async=True)
    b_dk = warpgroup_mma(b_ds, q_slots.index(last_slot), b_dk, is_async=True)
    mbarrier.wait(ready.index(slot), phase)
    b_s = warpgroup_mma(k_slot, q_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_lse, b_delta = load_rowwise(slots, slot, layout_s)  # now, while everybody waits for products
    b_dk, b_dv, b_left, b_ds = warpgroup_mma_wait(1, deps=[b_dk, b_dv, b_left, b_ds])
    mbarrier.arrive(free.index(last_slot))
    b_dp = begin_dp(v_slot, g_slots.index(slot), b_delta, layout_s)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p = gl.exp2(b_s * scale_log2 - b_lse)
    return b_dk, b_dv, b_p, b_dp


@gluon.jit  # pragma: no cover
def pass_queries(barriers, count, slot, phase, STAGES: gl.constexpr):
    """Let the next tiles of queries go, which only the other group needs."""
    ready, free, _, _ = barriers
    for _ in range(count):
        mbarrier.wait(ready.index(slot), phase)
        mbarrier.arrive(free.index(slot))
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase


@gluon.jit  # pragma: no cover
def visit_head(
    b_dk, b_dv, k_slot, v_slot, slots, barriers, i_n, n, first, count, slot, phase, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """Add what the queries of a head give to 64 keys, of which the user has at least one.

    Causal, a group begins with the tile of queries that has its diagonal, the only one with a mask: the first group
    with the first tile, of which the second group sees nothing, the second group with the second. The third tile to
    come is the last of the user: its rows past the user's end are made harmless before the pipeline starts, for which
    it has to be in the ring then.
    """
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])  # (64, BM), transposed scores
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    q_slots, g_slots, _, _ = slots
    ready, free, _, _ = barriers
    dtype: gl.constexpr = q_slots.dtype
    gl.static_assert(STAGES >= 3, "the first three tiles have to be there at once")

    num_last = n - (first + count - 1) * BM
    if num_last < BM:
        last_slot = slot + gl.minimum(2, count - 1)
        is_next_round = last_slot >= STAGES
        last_slot = gl.where(is_next_round, last_slot - STAGES, last_slot)
        mbarrier.wait(ready.index(last_slot), gl.where(is_next_round, phase ^ 1, phase))
        zero_rows_from(q_slots.index(last_slot), num_last, BM, D)
        zero_rows_from(g_slots.index(last_slot), num_last, BM, D)
    if CAUSAL and GROUP_INDEX == 1:  # where the user has keys for this group there are two tiles, or more
        slot, phase = pass_queries(barriers, 1, slot, phase, STAGES)
        first += 1
        count -= 1

    b_none = gl.zeros([GROUP, BM], gl.float32, layout_s)
    mbarrier.wait(ready.index(slot), phase)
    b_s = warpgroup_mma(k_slot, q_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_lse, b_delta = load_rowwise(slots, slot, layout_s)
    b_dp = begin_dp(v_slot, g_slots.index(slot), b_delta, layout_s)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    if CAUSAL:  # the diagonal
        o_m = first * BM + gl.arange(0, BM, gl.SliceLayout(0, layout_s))
        o_n = i_n + gl.arange(0, GROUP, gl.SliceLayout(1, layout_s))
        b_s = gl.where(o_m[None, :] >= o_n[:, None], b_s, float("-inf"))
    b_p = gl.exp2(b_s * scale_log2 - b_lse)
    for _ in range(1, count):
        last_slot = slot
        slot, phase = next_slot(slot, phase, STAGES)
        b_dk, b_dv, b_p, b_dp = next_queries(
            b_dk, b_dv, b_p, b_dp, k_slot, v_slot, slots, barriers, last_slot, slot, phase, scale_log2, D
        )

    b_left = gl.convert_layout(b_p.to(dtype), layout_p)
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    b_dv = warpgroup_mma(b_left, g_slots.index(slot), b_dv, is_async=True)
    b_ds = gl.convert_layout((b_p * b_dp).to(dtype), layout_p)
    b_dk = warpgroup_mma(b_ds, q_slots.index(slot), b_dk, is_async=True)
    b_dk, b_dv, b_left, b_ds = warpgroup_mma_wait(0, deps=[b_dk, b_dv, b_left, b_ds])
    mbarrier.arrive(free.index(slot))
    slot, phase = next_slot(slot, phase, STAGES)
    return b_dk, b_dv, slot, phase


@gluon.jit  # pragma: no cover
def visit_item(
    slots, own_slots, barriers, memory, strides, outputs, sizes, item_slot, slot, phase,
    NUM_KV: gl.constexpr, HEADS_PER_KV: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """dk and dv of a group's keys of an item, of which it has at least one.

    The item's fields are read again after the loops, which have no registers to keep them in.
    """
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    k_slots, v_slots, item_slots = own_slots
    L, scale, scale_log2 = sizes
    p_dk, p_dv = outputs
    dtype: gl.constexpr = k_slots.dtype
    k_slot = k_slots.index(2 * item_slot + GROUP_INDEX)
    v_slot = v_slots.index(2 * item_slot + GROUP_INDEX)
    item = item_slot * NUM_FIELDS
    n = get(item_slots.index(item + 2))
    i_n = get(item_slots.index(item + 3))
    first, count = tiles_of_queries(i_n, n, get(item_slots.index(item + 4)), CAUSAL)
    b_dk = gl.zeros([GROUP, D], gl.float32, layout_acc)
    b_dv = gl.zeros([GROUP, D], gl.float32, layout_acc)
    for _ in range(gl.where(count > 0, HEADS_PER_KV, 0)):
        b_dk, b_dv, slot, phase = visit_head(
            b_dk, b_dv, k_slot, v_slot, slots, barriers, i_n + GROUP_INDEX * GROUP, n, first, count, slot, phase,
            scale_log2, D, STAGES, CAUSAL, GROUP_INDEX,
        )  # fmt: skip

    i_kv = get(item_slots.index(item))
    row = get(item_slots.index(item + 1)).to(gl.int64)
    n = get(item_slots.index(item + 2))
    i_n = get(item_slots.index(item + 3)) + GROUP_INDEX * GROUP
    # By way of shared memory, where the keys and values were, so that a warp writes whole rows.
    k_slot.store((b_dk * scale).to(dtype))
    v_slot.store(b_dv.to(dtype))
    b_out_dk = k_slot.load(layout_out)
    b_out_dv = v_slot.load(layout_out)
    if HAS_TARGETS:
        h = get(item_slots.index(item + 4))
        if gl.minimum(i_n + GROUP, n) > h:
            b_out_dk, b_out_dv = replace_candidates(
                b_out_dk, b_out_dv, memory, strides, row, i_kv, i_n, n, h, L, scale, scale_log2, HEADS_PER_KV, D,
                layout_out,
            )  # fmt: skip
    o_row = gl.arange(0, GROUP, gl.SliceLayout(1, layout_out))[:, None]
    o_out = o_row * (NUM_KV * D) + gl.arange(0, D, gl.SliceLayout(0, layout_out))[None, :]
    start = ((row + i_n) * NUM_KV + i_kv) * D
    gl.store(p_dk + start + o_out, b_out_dk, mask=o_row < n - i_n)
    gl.store(p_dv + start + o_out, b_out_dv, mask=o_row < n - i_n)
    fence_async_shared()
    return slot, phase


@gluon.jit  # pragma: no cover
def dkv_partition(
    slots, own_slots, barriers, memory, strides, outputs, sizes,
    NUM_KV: gl.constexpr, HEADS_PER_KV: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """A group's 64 keys of one item after the other."""
    item_slots = own_slots[2]
    item_ready, item_free = barriers[2], barriers[3]
    item_slot = 0
    item_phase = 0
    slot = 0
    phase = 0
    mbarrier.wait(item_ready.index(0), 0)
    n = get(item_slots.index(2))
    while n > 0:
        if GROUP_INDEX == 0:  # it always has rows, which saves it a branch around all it does
            slot, phase = visit_item(
                slots, own_slots, barriers, memory, strides, outputs, sizes, item_slot, slot, phase,
                NUM_KV, HEADS_PER_KV, D, STAGES, CAUSAL, HAS_TARGETS, GROUP_INDEX,
            )  # fmt: skip
        else:
            i_n = get(item_slots.index(item_slot * NUM_FIELDS + 3))
            if i_n + GROUP < n:
                slot, phase = visit_item(
                    slots, own_slots, barriers, memory, strides, outputs, sizes, item_slot, slot, phase,
                    NUM_KV, HEADS_PER_KV, D, STAGES, CAUSAL, HAS_TARGETS, GROUP_INDEX,
                )  # fmt: skip
            else:  # the user ends before this group's keys
                h = get(item_slots.index(item_slot * NUM_FIELDS + 4))
                num_passed = tiles_of_queries(i_n, n, h, CAUSAL)[1] * HEADS_PER_KV
                slot, phase = pass_queries(barriers, num_passed, slot, phase, STAGES)
        mbarrier.arrive(item_free.index(item_slot))
        item_slot, item_phase = next_slot(item_slot, item_phase, ITEM_SLOTS)
        mbarrier.wait(item_ready.index(item_slot), item_phase)
        n = get(item_slots.index(item_slot * NUM_FIELDS + 2))


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@gluon.jit(do_not_specialize=["L", "num_items"])  # pragma: no cover
def hopper_two_group_dkv_kernel(
    desc_q,  # (L, H * D), blocks of (BM, D)
    desc_g,
    desc_k,  # (L, H_kv * D), blocks of (64, D)
    desc_v,
    p_q,  # (L, H, D)
    p_g,  # dout, (L, H, D)
    p_k,  # (L, H_kv, D)
    p_v,
    p_lse,  # (H, L), float32, base 2
    p_delta,  # (H, L), float32
    p_dk,  # (L, H_kv, D), contiguous
    p_dv,
    p_tiles,  # (capacity, 8), int32, tiles of 128 keys
    stride_ql,
    stride_qh,
    stride_gl,
    stride_gh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    L,
    num_items,  # capacity * H_kv
    scale,
    scale_log2,
    NUM_KV: gl.constexpr,
    HEADS_PER_KV: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
):
    """Items until there are no more."""
    dtype: gl.constexpr = desc_q.dtype
    layout_rowwise: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_slots = gl.allocate_shared_memory(dtype, [STAGES, BM, D], desc_q.layout)
    g_slots = gl.allocate_shared_memory(dtype, [STAGES, BM, D], desc_g.layout)
    lse_slots = gl.allocate_shared_memory(gl.float32, [STAGES, BM], layout_rowwise)
    delta_slots = gl.allocate_shared_memory(gl.float32, [STAGES, BM], layout_rowwise)
    k_slots = gl.allocate_shared_memory(dtype, [2 * ITEM_SLOTS, GROUP, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [2 * ITEM_SLOTS, GROUP, D], desc_v.layout)
    item_slots = gl.allocate_shared_memory(gl.int32, [ITEM_SLOTS * NUM_FIELDS, 1], layout_rowwise)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    item_ready = gl.allocate_shared_memory(gl.int64, [ITEM_SLOTS, 1], mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, [ITEM_SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1 + LANES)  # the copy engine, and every lane of the loading warp
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(ITEM_SLOTS):
        mbarrier.init(item_ready.index(i), count=1)
        mbarrier.init(item_free.index(i), count=2)
    fence_async_shared()

    descs = (desc_q, desc_g, desc_k, desc_v)
    slots = (q_slots, g_slots, lse_slots, delta_slots)
    own_slots = (k_slots, v_slots, item_slots)
    barriers = (ready, free, item_ready, item_free)
    memory = (p_q, p_g, p_k, p_v, p_lse, p_delta)
    strides = (stride_ql, stride_qh, stride_gl, stride_gh, stride_kl, stride_kh, stride_vl, stride_vh)
    outputs = (p_dk, p_dv)
    sizes = (L, scale, scale_log2)
    gl.warp_specialize(
        [
            (dkv_partition, (
                slots, own_slots, barriers, memory, strides, outputs, sizes,
                NUM_KV, HEADS_PER_KV, D, STAGES, CAUSAL, HAS_TARGETS, 0,
            )),
            (dkv_partition, (
                slots, own_slots, barriers, memory, strides, outputs, sizes,
                NUM_KV, HEADS_PER_KV, D, STAGES, CAUSAL, HAS_TARGETS, 1,
            )),
            (load_partition, (
                descs, slots, own_slots, barriers, p_tiles, num_items, p_lse, p_delta,
                (stride_qh, stride_gh, stride_kh, stride_vh), L, NUM_KV, HEADS_PER_KV, STAGES, CAUSAL,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, 24],
    )  # fmt: skip


# Head dim -> configurations worth a try on another GPU, the best first. Four stages don't fit.
CONFIGS: dict[int, tuple[TwoGroupBackwardConfig, ...]] = {128: (TwoGroupBackwardConfig(3),)}

launch = Launcher(hopper_two_group_dkv_kernel, "num_warps", "maxnreg")


def launch_two_group_dkv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_tiles: Tensor,
    dk: Tensor,
    dv: Tensor,
    call: Call,
    config: TwoGroupBackwardConfig,
) -> None:
    """`dk` and `dv`, `(L, H_kv, D)` and contiguous, from the delta that the kernel of dq left; else as for that."""
    L, H, D = q.shape
    num_kv = k.shape[1]
    if L == 0 or key_tiles.shape[0] == 0:
        return
    (num_items,) = grid_of(key_tiles, num_kv)
    launch(
        (num_programs(key_tiles, num_items, 1),),
        tuple([matrix_of_heads(x, GROUP.value) for x in (q, dout, k, v)]),
        (q, dout, k, v, lse, delta, dk, dv, key_tiles),
        (*q.stride()[:2], *dout.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, num_items, call.scale, call.scale_log2),
        (num_kv, H // num_kv, D, config.num_stages, call.causal, call.has_targets, GROUP_REGISTERS),
        (4, REGISTERS),
    )
