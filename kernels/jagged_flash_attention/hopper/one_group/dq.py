# mypy: allow-untyped-defs, allow-incomplete-defs
"""delta and dq for Hopper (compute capability 9.x), head dim 32 or 64 and 16-bit types, by programs that stay (Gluon).

The equations are those of ../../backward.py, the programs those of ../items.py: an item is a tile of queries and a
head.

Of an item q, dout and log-sum-exp stay in a slot until its dq is stored. `out` is read only once, for delta, and has a
single slot with a barrier of its own. Log-sum-exp can't come by TMA, which takes numbers from multiples of 16 bytes on,
and a user begins anywhere: every lane of the loading warp copies its own in the background, and arrives on the barrier
of the item when they are there.

Tiles of keys are visited from the last to the first, of which only the last has a mask. Where there are candidates
among the queries one more tile follows, that of the queries themselves, with a mask that leaves them the diagonal.

A tile's last rows may be another user's, perhaps NaN. The mask is laid on dS, not on the scores: whatever comes of such
values is dropped there. Such keys are zeroed, since a product with them follows. Such queries make rows of their own,
which nobody stores.

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
    LANES,
    count_key_tiles,
    matrix_of_heads,
    next_slot,
    resident,
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
from kernels.jagged_flash_attention.hopper.one_group.config import BLOCK, GIVEN, OneGroupConfig, registers_of
from kernels.jagged_flash_attention.hopper.one_group.ring import load_keys_with_values


@gluon.jit  # pragma: no cover
def has_candidates(i_m, n, h, BM: gl.constexpr):
    """Whether there are candidates among an item's queries."""
    return gl.minimum(i_m + BM, n) > h


@gluon.jit  # pragma: no cover
def load_partition(
    descs, slots, barriers, p_lse, p_tiles, L, num_items, strides, H: gl.constexpr, HEADS_PER_KV: gl.constexpr,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
):  # fmt: skip
    """Load q, dout, out, log-sum-exp, keys and values of one item after the other."""
    layout: gl.constexpr = gl.BlockedLayout([1], [LANES], [1], [0])
    desc_q, desc_g, desc_out, desc_k, desc_v = descs
    q_slots, g_slots, out_slot, lse_slots, k_slots, v_slots, item_slots = slots
    q_ready, q_free, out_free, kv_ready, kv_free = barriers
    stride_qh, stride_gh, stride_kh, stride_vh = strides
    q_slot = 0
    q_phase = 1  # a new barrier counts as having completed the phase before its first
    out_phase = 1
    slot = 0
    phase = 1
    i_item = gl.program_id(0)
    i_h, bos, n, i_m, h = load_item(p_tiles, i_item, num_items, H, BM)
    i_item += gl.num_programs(0)
    next_i_h, next_bos, next_n, next_i_m, next_h = load_item(p_tiles, i_item, num_items, H, BM)
    is_busy = True
    while is_busy:
        is_busy = n > 0
        mbarrier.wait(q_free.index(q_slot), q_phase)
        put_item(i_h, bos, n, i_m, h, item_slots, q_slot)
        ready = q_ready.index(q_slot)
        if is_busy:
            row = bos + i_m
            mbarrier.wait(out_free, out_phase)
            out_phase ^= 1
            mbarrier.expect(ready, 3 * desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [row, i_h * stride_qh], ready, q_slots.index(q_slot))
            tma.async_copy_global_to_shared(desc_g, [row, i_h * stride_gh], ready, g_slots.index(q_slot))
            tma.async_copy_global_to_shared(desc_out, [row, i_h * D], ready, out_slot)
            o_m = gl.arange(0, BM, layout)
            p_rows = p_lse + i_h.to(gl.int64) * L + row
            async_copy.async_copy_global_to_shared(lse_slots.index(q_slot), p_rows + o_m, mask=o_m < n - i_m)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            i_kv = i_h // HEADS_PER_KV
            num_tiles = count_key_tiles(i_m, h, BM, BN, CAUSAL)
            num_visits = num_tiles
            if HAS_TARGETS:
                num_visits += has_candidates(i_m, n, h, BM).to(gl.int32)
            for i in range(num_visits):
                row = bos + (num_tiles - 1 - i) * BN
                if HAS_TARGETS:
                    row = gl.where(i < num_tiles, row, bos + i_m)
                load_keys_with_values(
                    desc_k, desc_v, row, i_kv * stride_kh, i_kv * stride_vh, k_slots, v_slots, kv_free, kv_ready,
                    slot, phase,
                )  # fmt: skip
                slot, phase = next_slot(slot, phase, STAGES)
            i_item = draw(p_tiles, num_items, GIVEN)
        else:
            mbarrier.arrive(ready, count=1 + LANES)
        q_slot, q_phase = next_slot(q_slot, q_phase, Q_STAGES)
        i_h, bos, n, i_m, h = next_i_h, next_bos, next_n, next_i_m, next_h
        next_i_h, next_bos, next_n, next_i_m, next_h = load_item(p_tiles, i_item, num_items, H, BM)
    leave(p_tiles, num_items, GIVEN)


@gluon.jit  # pragma: no cover
def keep_visible(
    b_ds, i_m, i_n, n, h, BM: gl.constexpr, BN: gl.constexpr, OWN: gl.constexpr, CAUSAL: gl.constexpr,
    layout_s: gl.constexpr,
):  # fmt: skip
    """0 where a query does not see a key of the history; OWN: but where a candidate meets itself.

    The column is 8 eight + 2 lane + one, of which only `lane` differs between threads and the others are constants to
    the compiler. It would keep the numbers of whole columns in 16 registers, from one item to the next.
    """
    b_ds = gl.reshape(b_ds, [BM, BN // 8, 4, 2])
    layout: gl.constexpr = b_ds.type.layout
    o_m = gl.arange(0, BM, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[:, None, None, None]
    o_eight = gl.arange(0, BN // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    o_lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))[None, None, :, None]
    o_one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    o_n = 8 * o_eight[None, :, None, None] + o_one[None, None, None, :]
    if OWN:
        is_candidate = (o_m >= h - i_m) & (o_m < n - i_m)
        is_visible = o_n == gl.where(is_candidate, o_m, -1) - 2 * o_lane
    else:
        end = h - i_n - 2 * o_lane
        if CAUSAL:
            end = gl.minimum(i_m - i_n + 1 + o_m - 2 * o_lane, end)
        is_visible = o_n < end
    return gl.convert_layout(gl.reshape(gl.where(is_visible, b_ds, 0.0), [BM, BN]), layout_s)


@gluon.jit  # pragma: no cover
def visit_next_tile(
    b_dq, b_ds, b_lse, b_delta, a_q, a_g, k_slots, v_slots, kv_ready, kv_free, slot, phase, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add dS K of the tile at hand, and make dS of the next one.

    The products are waited for in two steps, because the registers don't hold the operands of all three at once. dS
    goes from tile to tile in float32, because the compiler takes pairs of 16-bit numbers apart there.
    """
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    b_none = gl.zeros([BM, BN], gl.float32, layout_s)
    last_slot = slot + 0  # two names of one value are one in the eyes of the compiler's loop
    b_left = gl.convert_layout(b_ds.to(a_q.dtype), gl.DotOperandLayout(0, layout_acc, 2))
    b_dq = warpgroup_mma(b_left, k_slots.index(last_slot), b_dq, is_async=True)
    slot, phase = next_slot(slot, phase, STAGES)
    mbarrier.wait(kv_ready.index(slot), phase)
    b_s = warpgroup_mma(a_q, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_dq, b_s, b_left = warpgroup_mma_wait(0, deps=[b_dq, b_s, b_left])
    b_dp = warpgroup_mma(a_g, v_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    mbarrier.arrive(kv_free.index(last_slot))
    b_p = gl.exp2(b_s * scale_log2 - b_lse[:, None])
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    return b_dq, b_p * (b_dp - b_delta[:, None]), slot, phase


@gluon.jit  # pragma: no cover
def gradient_partition(
    slots, barriers, p_delta, p_dq, L, scale, scale_log2, H: gl.constexpr, D: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """delta and dq of one item after the other."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # (BM, BN)
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (BM, D)
    layout_left: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    layout_row: gl.constexpr = gl.SliceLayout(1, layout_s)
    layout_out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_slots, g_slots, out_slot, lse_slots, k_slots, v_slots, item_slots = slots
    q_ready, q_free, out_free, kv_ready, kv_free = barriers
    dtype: gl.constexpr = q_slots.dtype

    q_slot = 0
    q_phase = 0
    slot = 0
    phase = 0
    mbarrier.wait(q_ready.index(0), 0)
    n = get(item_slots.index(2))
    while n > 0:
        i_h = get(item_slots.index(q_slot * NUM_FIELDS))
        bos = get(item_slots.index(q_slot * NUM_FIELDS + 1))
        i_m = get(item_slots.index(q_slot * NUM_FIELDS + 3))
        h = get(item_slots.index(q_slot * NUM_FIELDS + 4))
        row = (bos + i_m).to(gl.int64)
        num_rows = n - i_m
        q_tile = q_slots.index(q_slot)
        g_tile = g_slots.index(q_slot)

        # As left operands, a row lies in four lanes, which are also those of its scores.
        b_out = out_slot.load(layout_left).to(gl.float32)
        b_delta = gl.sum(b_out * g_tile.load(layout_left).to(gl.float32), 1)
        b_delta = gl.convert_layout(b_delta, layout_row)
        b_lse = lse_slots.index(q_slot).load(layout_row)
        o_m = gl.arange(0, BM, layout_row)
        gl.store(p_delta + (i_h.to(gl.int64) * L + row) + o_m, b_delta, mask=o_m < num_rows)

        num_tiles = count_key_tiles(i_m, h, BM, BN, CAUSAL)
        i_n = (num_tiles - 1) * BN
        b_none = gl.zeros([BM, BN], gl.float32, layout_s)
        mbarrier.wait(kv_ready.index(slot), phase)
        a_q = resident(q_tile, layout_s, IN_REGISTERS)
        a_g = resident(g_tile, layout_s, IN_REGISTERS)
        b_s = warpgroup_mma(a_q, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_dp = warpgroup_mma(a_g, v_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        mbarrier.arrive(out_free)  # here and below: where the meeting of the warps that it costs serves others too
        b_s, b_dp = warpgroup_mma_wait(0, deps=[b_s, b_dp])
        if h - i_n < BN:
            zero_rows_from(k_slots.index(slot), h - i_n, BN, D)
        b_ds = gl.exp2(b_s * scale_log2 - b_lse[:, None]) * (b_dp - b_delta[:, None])
        b_ds = keep_visible(b_ds, i_m, i_n, n, h, BM, BN, False, CAUSAL, layout_s)

        b_dq = gl.zeros([BM, D], gl.float32, layout_acc)
        for _ in range(1, num_tiles):
            b_dq, b_ds, slot, phase = visit_next_tile(
                b_dq, b_ds, b_lse, b_delta, a_q, a_g, k_slots, v_slots, kv_ready, kv_free, slot, phase,
                scale_log2, BM, BN, D, STAGES,
            )  # fmt: skip
        if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
            if has_candidates(i_m, n, h, BM):  # a last tile, of which every candidate sees itself
                b_dq, b_ds, slot, phase = visit_next_tile(
                    b_dq, b_ds, b_lse, b_delta, a_q, a_g, k_slots, v_slots, kv_ready, kv_free, slot, phase,
                    scale_log2, BM, BN, D, STAGES,
                )  # fmt: skip
                b_ds = keep_visible(b_ds, i_m, i_m, n, h, BM, BN, True, CAUSAL, layout_s)
                if num_rows < BN:
                    zero_rows_from(k_slots.index(slot), num_rows, BN, D)
        b_dq = warpgroup_mma(gl.convert_layout(b_ds.to(dtype), layout_left), k_slots.index(slot), b_dq)

        # By way of shared memory, where the queries were, so that a warp writes whole rows.
        q_tile.store((b_dq * scale).to(dtype))
        mbarrier.arrive(kv_free.index(slot))
        slot, phase = next_slot(slot, phase, STAGES)
        o_m = gl.arange(0, BM, gl.SliceLayout(1, layout_out))[:, None]
        o_d = gl.arange(0, D, gl.SliceLayout(0, layout_out))[None, :]
        p_rows = p_dq + (row * H + i_h) * D
        gl.store(p_rows + (o_m * (H * D) + o_d), q_tile.load(layout_out), mask=o_m < num_rows)
        fence_async_shared()
        mbarrier.arrive(q_free.index(q_slot))
        q_slot, q_phase = next_slot(q_slot, q_phase, Q_STAGES)
        mbarrier.wait(q_ready.index(q_slot), q_phase)
        n = get(item_slots.index(q_slot * NUM_FIELDS + 2))


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@gluon.jit(do_not_specialize=["L", "num_items"])  # pragma: no cover
def hopper_one_group_dq_kernel(
    desc_q,  # (L, H * D), blocks of (BM, D)
    desc_g,
    desc_out,
    desc_k,  # (L, H_kv * D), blocks of (BN, D)
    desc_v,
    p_lse,  # (H, L), float32, base 2
    p_delta,  # (H, L), float32, written
    p_dq,  # (L, H, D), contiguous
    p_tiles,  # (capacity, 8), int32, tiles of BM queries
    stride_qh,
    stride_gh,
    stride_kh,
    stride_vh,
    L,
    num_items,  # capacity * H
    scale,
    scale_log2,
    H: gl.constexpr,
    HEADS_PER_KV: gl.constexpr,
    D: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
):
    """Items until there are no more."""
    gl.static_assert(Q_STAGES >= 2, "an item is worked on while the next one is loaded")
    gl.static_assert(STAGES >= 2, "a tile is waited for while another one is held")
    dtype: gl.constexpr = desc_q.dtype
    layout_rowwise: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_slots = gl.allocate_shared_memory(dtype, [Q_STAGES, BM, D], desc_q.layout)
    g_slots = gl.allocate_shared_memory(dtype, [Q_STAGES, BM, D], desc_g.layout)
    out_slot = gl.allocate_shared_memory(dtype, [BM, D], desc_out.layout)
    lse_slots = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BM], layout_rowwise)
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_v.layout)
    item_slots = gl.allocate_shared_memory(gl.int32, [Q_STAGES * NUM_FIELDS, 1], layout_rowwise)
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    out_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_ready.index(i), count=1 + LANES)  # the copy engine, and every lane of the loading warp
        mbarrier.init(q_free.index(i), count=1)
    mbarrier.init(out_free, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(kv_ready.index(i), count=1)
        mbarrier.init(kv_free.index(i), count=1)
    fence_async_shared()

    descs = (desc_q, desc_g, desc_out, desc_k, desc_v)
    slots = (q_slots, g_slots, out_slot, lse_slots, k_slots, v_slots, item_slots)
    barriers = (q_ready, q_free, out_free, kv_ready, kv_free)
    strides = (stride_qh, stride_gh, stride_kh, stride_vh)
    gl.warp_specialize(
        [
            (gradient_partition, (
                slots, barriers, p_delta, p_dq, L, scale, scale_log2,
                H, D, BM, BN, Q_STAGES, STAGES, CAUSAL, HAS_TARGETS, IN_REGISTERS,
            )),
            (load_partition, (
                descs, slots, barriers, p_lse, p_tiles, L, num_items, strides,
                H, HEADS_PER_KV, D, BM, BN, Q_STAGES, STAGES, CAUSAL, HAS_TARGETS,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[OneGroupConfig, ...]] = {
    32: (OneGroupConfig(4, 3), OneGroupConfig(6, 3)),
    64: (OneGroupConfig(4, 2, in_registers=True), OneGroupConfig(2, 3)),
}

launch = Launcher(hopper_one_group_dq_kernel, "num_warps", "maxnreg")


def launch_one_group_dq(
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
    config: OneGroupConfig,
) -> None:
    """`dq` and `delta` of self attention, as `launch_two_group_dq` gives them.

    Args:
        dout: `(L, H, D)` in q's dtype; q, k, v, out, lse: as the forward took and gave them. All but out and lse as
            TMA can read them (`common.readable_by_tma`).
        query_tiles: `(entries, 8)`, the tiles of `BLOCK` queries; see tile_lists.py. Not to be used on two streams at
            once.
        dq: `(L, H, D)`, contiguous, in q's dtype.
        delta: `(H, L)` float32, contiguous.
        call: mask and scale.
        config: how to compute it.
    """
    L, H, D = q.shape
    if L == 0 or query_tiles.shape[0] == 0:
        return
    (num_items,) = grid_of(query_tiles, H)
    launch(
        (num_programs(query_tiles, num_items, config.programs_per_sm),),
        tuple([matrix_of_heads(x, BLOCK) for x in (q, dout, out, k, v)]),
        (lse, delta, dq, query_tiles),
        (q.stride(1), dout.stride(1), k.stride(1), v.stride(1)),
        (L, num_items, call.scale, call.scale_log2),
        (
            H, H // k.shape[1], D, BLOCK, BLOCK, ITEM_SLOTS.value, config.num_stages, call.causal, call.has_targets,
            config.in_registers,
        ),
        (4, registers_of(config.programs_per_sm)),
    )  # fmt: skip
