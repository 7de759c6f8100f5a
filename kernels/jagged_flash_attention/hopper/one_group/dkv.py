# mypy: allow-untyped-defs, allow-incomplete-defs
"""dk and dv for Hopper (compute capability 9.x), head dim 32 or 64 and 16-bit types, by programs that stay (Gluon).

The equations are those of ../../backward.py, the programs those of ../items.py: an item is a tile of 64 keys and a key
head; the ring holds tiles of 64 queries that see them: q, dout, log-sum-exp and delta.

Scores are transposed (keys, queries): their rows stay where they are in registers as the left operand of both products.

Causal, the tiles of queries on the diagonal come first, the only ones with a mask. A user's rows end inside the last
tile, and what follows there is another user's, perhaps NaN: such rows are zeroed in shared memory, log-sum-exp and
delta as well. Then they have a probability of one, but of a dout of zero.

Long users have two tiles in a turn (IN_PAIRS): three products are asked for at once, and the tensor cores have work
left during the exponentials of both tiles. Short users would lose by the longer way to the loop for what is left over.

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
    meet,
    next_slot,
    replace_candidates,
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
    put,
    put_item,
)
from kernels.jagged_flash_attention.hopper.one_group.config import BLOCK, GIVEN, OneGroupConfig, registers_of


@gluon.jit  # pragma: no cover
def queries_of(i_n, n, h, CAUSAL: gl.constexpr):
    """The queries that see the 64 keys from i_n on: from the first to below the second, none where all keys are
    candidates."""
    begin = 0
    if CAUSAL:
        begin = i_n
    return begin, gl.where(i_n < h, n, begin)


@gluon.jit  # pragma: no cover
def load_queries_partition(
    descs, slots, barriers, p_tiles, num_items, p_lse, p_delta, strides, L, NUM_KV: gl.constexpr,
    HEADS_PER_KV: gl.constexpr, BM: gl.constexpr, KEY_STAGES: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Load keys and values of one item after the other, and the queries that see them.

    Log-sum-exp and delta can't come by TMA, which takes numbers from multiples of 16 bytes on, and a user begins
    anywhere: every lane copies its own in the background, and arrives on the barrier when they are there.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [LANES], [1], [0])
    desc_q, desc_g, desc_k, desc_v = descs
    q_slots, g_slots, lse_slots, delta_slots, k_slots, v_slots, item_slots = slots
    q_ready, q_free, kv_ready, kv_free = barriers
    stride_qh, stride_gh, stride_kh, stride_vh = strides
    item_slot = 0
    item_phase = 1  # a new barrier counts as having completed the phase before its first
    slot = 0
    phase = 1
    i_item = gl.program_id(0)
    i_kv, bos, n, i_n, h = load_item(p_tiles, i_item, num_items, NUM_KV, GROUP)
    i_item += gl.num_programs(0)
    next_i_kv, next_bos, next_n, next_i_n, next_h = load_item(p_tiles, i_item, num_items, NUM_KV, GROUP)
    is_busy = True
    while is_busy:
        is_busy = n > 0
        mbarrier.wait(kv_free.index(item_slot), item_phase)
        put_item(i_kv, bos, n, i_n, h, item_slots, item_slot)
        begin, end = queries_of(i_n, n, h, CAUSAL)
        put(begin, item_slots.index(item_slot * NUM_FIELDS + 5))
        kv_bar = kv_ready.index(item_slot)
        if is_busy:
            mbarrier.expect(kv_bar, 2 * desc_k.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_k, [bos + i_n, i_kv * stride_kh], kv_bar, k_slots.index(item_slot))
            tma.async_copy_global_to_shared(desc_v, [bos + i_n, i_kv * stride_vh], kv_bar, v_slots.index(item_slot))
            for i_g in range(HEADS_PER_KV):
                i_h = i_kv * HEADS_PER_KV + i_g
                i_rowwise = i_h.to(gl.int64) * L + bos
                for i_m in range(begin, end, BM):
                    mbarrier.wait(q_free.index(slot), phase)
                    q_bar = q_ready.index(slot)
                    mbarrier.expect(q_bar, 2 * desc_q.block_type.nbytes)
                    tma.async_copy_global_to_shared(desc_q, [bos + i_m, i_h * stride_qh], q_bar, q_slots.index(slot))
                    tma.async_copy_global_to_shared(desc_g, [bos + i_m, i_h * stride_gh], q_bar, g_slots.index(slot))
                    o_m = i_m + gl.arange(0, BM, layout)
                    o_rowwise = i_rowwise + o_m
                    async_copy.async_copy_global_to_shared(lse_slots.index(slot), p_lse + o_rowwise, mask=o_m < n)
                    async_copy.async_copy_global_to_shared(delta_slots.index(slot), p_delta + o_rowwise, mask=o_m < n)
                    async_copy.mbarrier_arrive(q_bar, increment_count=False)
                    slot, phase = next_slot(slot, phase, STAGES)
            i_item = draw(p_tiles, num_items, GIVEN)
        else:
            mbarrier.arrive(kv_bar)
        item_slot, item_phase = next_slot(item_slot, item_phase, KEY_STAGES)
        i_kv, bos, n, i_n, h = next_i_kv, next_bos, next_n, next_i_n, next_h
        next_i_kv, next_bos, next_n, next_i_n, next_h = load_item(p_tiles, i_item, num_items, NUM_KV, GROUP)
    leave(p_tiles, num_items, GIVEN)


@gluon.jit  # pragma: no cover
def zero_past_end(q_slots, g_slots, slot, num_rows, D: gl.constexpr, BM: gl.constexpr):
    """Rows of q and dout that are not the user's, if there are any in the tile."""
    if num_rows < BM:
        zero_rows_from(q_slots.index(slot), num_rows, BM, D)
        zero_rows_from(g_slots.index(slot), num_rows, BM, D)
        meet()  # here, so that there is none where nothing was zeroed


@gluon.jit  # pragma: no cover
def begin_queries(
    a_k, a_v, slots, barriers, slot, phase, num_rows, D: gl.constexpr, BM: gl.constexpr, layout_s: gl.constexpr
):
    """Transposed scores and dP of a tile of queries, in flight; num_rows of its rows or more are the user's."""
    q_slots, g_slots, _, _, _, _, _ = slots
    mbarrier.wait(barriers[0].index(slot), phase)
    zero_past_end(q_slots, g_slots, slot, num_rows, D, BM)
    b_none = gl.zeros([GROUP, BM], gl.float32, layout_s)
    b_s = warpgroup_mma(a_k, q_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(a_v, g_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    return b_s, b_dp


@gluon.jit  # pragma: no cover
def mask_diagonal(b_s, o_diagonal, BM: gl.constexpr, layout_s: gl.constexpr):
    """-inf where key i comes after query i + o_diagonal."""
    o_m = gl.arange(0, BM, gl.SliceLayout(0, layout_s))[None, :]
    o_n = gl.arange(0, GROUP, gl.SliceLayout(1, layout_s)) + o_diagonal
    return gl.where(o_m >= o_n[:, None], b_s, float("-inf"))


@gluon.jit  # pragma: no cover
def visit_queries(
    b_dk, b_dv, a_k, a_v, slots, barriers, slot, phase, num_rows, o_diagonal, scale_log2,
    D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Add what a tile of queries gives; with EDGE it is on the diagonal."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    layout_row: gl.constexpr = gl.SliceLayout(0, layout_s)
    q_slots, g_slots, lse_slots, delta_slots, _, _, _ = slots
    dtype: gl.constexpr = q_slots.dtype
    b_s, b_dp = begin_queries(a_k, a_v, slots, barriers, slot, phase, num_rows, D, BM, layout_s)
    b_lse = lse_slots.index(slot).load(layout_row)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    if EDGE:
        b_s = mask_diagonal(b_s, o_diagonal, BM, layout_s)
    b_p = gl.exp2(b_s * scale_log2 - b_lse[None, :])
    b_delta = delta_slots.index(slot).load(layout_row)  # not earlier, it would cost registers
    b_left = gl.convert_layout(b_p.to(dtype), layout_p)
    b_dv = warpgroup_mma(b_left, g_slots.index(slot), b_dv, is_async=True)
    b_dp = warpgroup_mma_wait(1, deps=[b_dp])
    b_ds = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(dtype), layout_p)
    b_dk = warpgroup_mma(b_ds, q_slots.index(slot), b_dk, is_async=True)
    b_dk, b_dv, b_left, b_ds = warpgroup_mma_wait(0, deps=[b_dk, b_dv, b_left, b_ds])
    mbarrier.arrive(barriers[1].index(slot))
    slot, phase = next_slot(slot, phase, STAGES)
    return b_dk, b_dv, slot, phase


@gluon.jit  # pragma: no cover
def probabilities(b_s, lse_slots, slot, scale_log2):
    """Of transposed scores; not more of log-sum-exp at a time, it would cost registers."""
    b_lse = lse_slots.index(slot).load(gl.SliceLayout(0, b_s.type.layout))
    return gl.exp2(b_s * scale_log2 - b_lse[None, :])


@gluon.jit  # pragma: no cover
def visit_pair(
    b_dk, b_dv, a_k, a_v, slots, barriers, slot, phase, num_rows, scale_log2,
    D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add what two tiles of queries give, a and b, with products of one behind the exponentials of the other.

    num_rows: of the user, from b's first on.
    """
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    layout_row: gl.constexpr = gl.SliceLayout(0, layout_s)
    q_slots, g_slots, lse_slots, delta_slots, _, _, _ = slots
    dtype: gl.constexpr = q_slots.dtype
    b_none = gl.zeros([GROUP, BM], gl.float32, layout_s)
    slot_a = slot + 0  # two names of one value are one in the eyes of the compiler's loop
    slot_b, phase_b = next_slot(slot, phase, STAGES)
    mbarrier.wait(barriers[0].index(slot_b), phase_b)
    zero_past_end(q_slots, g_slots, slot_b, num_rows, D, BM)
    mbarrier.wait(barriers[0].index(slot_a), phase)
    b_s = warpgroup_mma(a_k, q_slots.index(slot_a).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(a_v, g_slots.index(slot_a).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_s_b = warpgroup_mma(a_k, q_slots.index(slot_b).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(2, deps=[b_s])
    b_p = probabilities(b_s, lse_slots, slot_a, scale_log2)
    b_delta = delta_slots.index(slot_a).load(layout_row)
    b_left = gl.convert_layout(b_p.to(dtype), layout_p)
    b_dv = warpgroup_mma(b_left, g_slots.index(slot_a), b_dv, is_async=True)
    b_dp = warpgroup_mma_wait(2, deps=[b_dp])
    b_ds = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(dtype), layout_p)
    b_dk = warpgroup_mma(b_ds, q_slots.index(slot_a), b_dk, is_async=True)
    b_dp_b = warpgroup_mma(a_v, g_slots.index(slot_b).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_s_b = warpgroup_mma_wait(3, deps=[b_s_b])
    b_p = probabilities(b_s_b, lse_slots, slot_b, scale_log2)
    b_delta = delta_slots.index(slot_b).load(layout_row)
    b_left_b = gl.convert_layout(b_p.to(dtype), layout_p)
    b_dv = warpgroup_mma(b_left_b, g_slots.index(slot_b), b_dv, is_async=True)
    b_dp_b, b_left, b_ds = warpgroup_mma_wait(1, deps=[b_dp_b, b_left, b_ds])
    b_ds_b = gl.convert_layout((b_p * (b_dp_b - b_delta[None, :])).to(dtype), layout_p)
    b_dk = warpgroup_mma(b_ds_b, q_slots.index(slot_b), b_dk, is_async=True)
    b_dk, b_dv, b_left_b, b_ds_b = warpgroup_mma_wait(0, deps=[b_dk, b_dv, b_left_b, b_ds_b])
    mbarrier.arrive(barriers[1].index(slot_a))
    mbarrier.arrive(barriers[1].index(slot_b))
    slot, phase = next_slot(slot_b, phase_b, STAGES)
    return b_dk, b_dv, slot, phase


@gluon.jit  # pragma: no cover
def dkv_partition(
    slots, barriers, memory, strides, outputs, sizes, NUM_KV: gl.constexpr, HEADS_PER_KV: gl.constexpr,
    D: gl.constexpr, BM: gl.constexpr, KEY_STAGES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, IN_REGISTERS: gl.constexpr, IN_PAIRS: gl.constexpr,
):  # fmt: skip
    """dk and dv of one item after the other."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])  # (64, BM), transposed scores
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_slots, _, _, _, k_slots, v_slots, item_slots = slots
    _, _, kv_ready, kv_free = barriers
    p_dk, p_dv = outputs
    L, scale, scale_log2 = sizes
    dtype: gl.constexpr = q_slots.dtype

    item_slot = 0
    item_phase = 0
    slot = 0
    phase = 0
    mbarrier.wait(kv_ready.index(0), 0)
    n = get(item_slots.index(2))
    while n > 0:
        i_n = get(item_slots.index(item_slot * NUM_FIELDS + 3))
        h = get(item_slots.index(item_slot * NUM_FIELDS + 4))
        k_slot = k_slots.index(item_slot)
        v_slot = v_slots.index(item_slot)
        a_k = resident(k_slot, layout_s, IN_REGISTERS)
        a_v = resident(v_slot, layout_s, IN_REGISTERS)
        b_dk = gl.zeros([GROUP, D], gl.float32, layout_acc)
        b_dv = gl.zeros([GROUP, D], gl.float32, layout_acc)
        begin = get(item_slots.index(item_slot * NUM_FIELDS + 5))
        end = gl.where(i_n < h, n, begin)
        for _i_head in range(HEADS_PER_KV):
            i_m = begin + 0
            if CAUSAL:  # noqa: SIM102 (known when compiling, the inner one only when running)
                if i_m < end:
                    b_dk, b_dv, slot, phase = visit_queries(
                        b_dk, b_dv, a_k, a_v, slots, barriers, slot, phase, n - i_m, i_n - i_m, scale_log2,
                        D, BM, STAGES, True,
                    )  # fmt: skip
                    i_m += BM
            if IN_PAIRS:
                for i_pair in range(i_m, end - BM, 2 * BM):
                    b_dk, b_dv, slot, phase = visit_pair(
                        b_dk, b_dv, a_k, a_v, slots, barriers, slot, phase, n - i_pair - BM, scale_log2, D, BM, STAGES
                    )
                i_m += gl.maximum(gl.cdiv(end - BM - i_m, 2 * BM), 0) * (2 * BM)
            for i_full in range(i_m, end, BM):
                b_dk, b_dv, slot, phase = visit_queries(
                    b_dk, b_dv, a_k, a_v, slots, barriers, slot, phase, n - i_full, 0, scale_log2,
                    D, BM, STAGES, False,
                )  # fmt: skip

        # By way of shared memory, where the keys and values were, so that a warp writes whole rows.
        i_kv = get(item_slots.index(item_slot * NUM_FIELDS))
        bos = get(item_slots.index(item_slot * NUM_FIELDS + 1))
        k_slot.store((b_dk * scale).to(dtype))
        v_slot.store(b_dv.to(dtype))
        b_out_dk = k_slot.load(layout_out)
        b_out_dv = v_slot.load(layout_out)
        row = bos.to(gl.int64)
        if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
            if gl.minimum(i_n + GROUP, n) > h:
                b_out_dk, b_out_dv = replace_candidates(
                    b_out_dk, b_out_dv, memory, strides, row, i_kv, i_n, n, h, L, scale, scale_log2,
                    HEADS_PER_KV, D, layout_out,
                )  # fmt: skip
        o_row = gl.arange(0, GROUP, gl.SliceLayout(1, layout_out))[:, None]
        o_out = o_row * (NUM_KV * D) + gl.arange(0, D, gl.SliceLayout(0, layout_out))[None, :]
        first = ((row + i_n) * NUM_KV + i_kv) * D
        gl.store(p_dk + first + o_out, b_out_dk, mask=o_row < n - i_n)
        gl.store(p_dv + first + o_out, b_out_dv, mask=o_row < n - i_n)
        fence_async_shared()
        mbarrier.arrive(kv_free.index(item_slot))
        item_slot, item_phase = next_slot(item_slot, item_phase, KEY_STAGES)
        mbarrier.wait(kv_ready.index(item_slot), item_phase)
        n = get(item_slots.index(item_slot * NUM_FIELDS + 2))


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@gluon.jit(do_not_specialize=["L", "num_items"])  # pragma: no cover
def hopper_one_group_dkv_kernel(
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
    p_tiles,  # (capacity, 8), int32, tiles of 64 keys
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
    BM: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
    IN_PAIRS: gl.constexpr,
):
    """Items until there are no more."""
    dtype: gl.constexpr = desc_q.dtype
    layout_rowwise: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_slots = gl.allocate_shared_memory(dtype, [STAGES, BM, D], desc_q.layout)
    g_slots = gl.allocate_shared_memory(dtype, [STAGES, BM, D], desc_g.layout)
    lse_slots = gl.allocate_shared_memory(gl.float32, [STAGES, BM], layout_rowwise)
    delta_slots = gl.allocate_shared_memory(gl.float32, [STAGES, BM], layout_rowwise)
    k_slots = gl.allocate_shared_memory(dtype, [KEY_STAGES, GROUP, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [KEY_STAGES, GROUP, D], desc_v.layout)
    item_slots = gl.allocate_shared_memory(gl.int32, [KEY_STAGES * NUM_FIELDS, 1], layout_rowwise)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_ready = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    kv_free = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1 + LANES)  # the copy engine, and every lane of the loading warp
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(KEY_STAGES):
        mbarrier.init(kv_ready.index(i), count=1)
        mbarrier.init(kv_free.index(i), count=1)
    fence_async_shared()

    descs = (desc_q, desc_g, desc_k, desc_v)
    slots = (q_slots, g_slots, lse_slots, delta_slots, k_slots, v_slots, item_slots)
    barriers = (q_ready, q_free, kv_ready, kv_free)
    memory = (p_q, p_g, p_k, p_v, p_lse, p_delta)
    strides = (stride_ql, stride_qh, stride_gl, stride_gh, stride_kl, stride_kh, stride_vl, stride_vh)
    gl.warp_specialize(
        [
            (dkv_partition, (
                slots, barriers, memory, strides, (p_dk, p_dv), (L, scale, scale_log2),
                NUM_KV, HEADS_PER_KV, D, BM, KEY_STAGES, STAGES, CAUSAL, HAS_TARGETS, IN_REGISTERS, IN_PAIRS,
            )),
            (load_queries_partition, (
                descs, slots, barriers, p_tiles, num_items, p_lse, p_delta,
                (stride_qh, stride_gh, stride_kh, stride_vh), L,
                NUM_KV, HEADS_PER_KV, BM, KEY_STAGES, STAGES, CAUSAL,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[OneGroupConfig, ...]] = {
    32: (OneGroupConfig(6, 3), OneGroupConfig(4, 3)),
    64: (
        OneGroupConfig(4, 2, in_registers=True),
        OneGroupConfig(4, 2, in_registers=True, in_pairs=True),
        OneGroupConfig(4, 2),
    ),
}

launch = Launcher(hopper_one_group_dkv_kernel, "num_warps", "maxnreg")


def launch_one_group_dkv(
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
    config: OneGroupConfig,
) -> None:
    """`dk` and `dv`, `(L, H_kv, D)` and contiguous, from the delta that the kernel of dq left.

    Args:
        dout: `(L, H, D)` in q's dtype; q, k, v, lse: as the forward took and gave them. All but lse as TMA can
            read them (`common.readable_by_tma`).
        delta: `(H, L)` float32, contiguous.
        key_tiles: `(entries, 8)`, tiles of 64 keys. Not to be used on two streams at once.
        dk, dv: written, as far as the tiles go.
        call: mask and scale.
        config: how to compute it.
    """
    L, H, D = q.shape
    num_kv = k.shape[1]
    if L == 0 or key_tiles.shape[0] == 0:
        return
    (num_items,) = grid_of(key_tiles, num_kv)
    launch(
        (num_programs(key_tiles, num_items, config.programs_per_sm),),
        tuple([matrix_of_heads(x, BLOCK) for x in (q, dout, k, v)]),
        (q, dout, k, v, lse, delta, dk, dv, key_tiles),
        (*q.stride()[:2], *dout.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, num_items, call.scale, call.scale_log2),
        (
            num_kv, H // num_kv, D, BLOCK, ITEM_SLOTS.value, config.num_stages, call.causal, call.has_targets,
            config.in_registers, config.in_pairs,
        ),
        (4, registers_of(config.programs_per_sm)),
    )  # fmt: skip
