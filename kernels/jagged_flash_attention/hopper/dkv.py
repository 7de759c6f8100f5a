# mypy: allow-untyped-defs, allow-incomplete-defs
"""dk and dv of long users for Hopper (compute capability 9.x), head dim 128 and 16-bit types, written in Gluon.

The equations are those of ../backward.py, the parts that the warps take those of forward.py: one warp loads into rings
of slots, two groups of four warps compute, 64 keys each, with k and v in shared memory. What streams by are tiles of 64
queries: q, dout, log-sum-exp and delta. The transposed scores (keys, queries) stay where they are in registers as the
left operand of both products.

A group issues the next scores before the products of the present tile are done, and during its exponentials
dP = dout vᵀ of the next tile is still running, so that the tensor cores seldom wait for it.

The only tile with a mask comes first, and the loop has none. A user's rows end inside a tile, and what follows there is
another user's, perhaps NaN: such rows are zeroed in shared memory, log-sum-exp and delta as well. Then they have a
probability of one, but of a dout of zero.

Names: see common.py.
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

from kernels.jagged_flash_attention.hopper.common import (
    GROUP,
    LANES,
    matrix_of_heads,
    next_slot,
    replace_candidates,
    zero_rows_from,
)
from kernels.jagged_flash_attention.hopper.dq import BackwardConfig
from kernels.jagged_flash_attention.hopper.forward import GROUP_REGISTERS, REGISTERS
from kernels.jagged_flash_attention.launch import Call, Launcher, grid_of

BM = gl.constexpr(64)  # queries of a tile in the ring


@gluon.jit  # pragma: no cover
def tile_of_keys(p_tiles, NUM_KV: gl.constexpr):
    """This program's key head and its row of the tile list: first row and rows of the user, first key, history."""
    pid = gl.program_id(0)
    p_tile = p_tiles + (pid // NUM_KV).to(gl.int64) * 8
    return pid % NUM_KV, gl.load(p_tile), gl.load(p_tile + 1), gl.load(p_tile + 4) * (2 * GROUP), gl.load(p_tile + 5)


@gluon.jit  # pragma: no cover
def load_queries_partition(
    descs, slots, barriers, coordinates, rowwise, n, L, HEADS_PER_KV: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Keys and values once, then for every head the tiles of queries: the first, the second, the last, the others.

    Log-sum-exp and delta can't come by TMA, which takes numbers from multiples of 16 bytes on, and a user begins
    anywhere: every lane copies its own in the background, and arrives on the barrier when they are there.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [LANES], [1], [0])
    desc_q, desc_g, desc_k, desc_v = descs
    q_slots, g_slots, k_slots, v_slots, lse_slots, delta_slots = slots
    kv_ready, ready, free = barriers
    row_q, row_k, col_q, col_g, col_k, col_v, stride_qh, stride_gh, first, count = coordinates
    p_lse, p_delta, i_h = rowwise
    mbarrier.expect(kv_ready, 4 * desc_k.block_type.nbytes, pred=count > 0)
    for i_group in gl.static_range(2):
        row = row_k + i_group * GROUP
        tma.async_copy_global_to_shared(desc_k, [row, col_k], kv_ready, k_slots.index(i_group), pred=count > 0)
        tma.async_copy_global_to_shared(desc_v, [row, col_v], kv_ready, v_slots.index(i_group), pred=count > 0)
    for i_g in range(HEADS_PER_KV):
        i_rowwise = (i_h + i_g).to(gl.int64) * L + row_q
        for i in range(count):
            tile = first + gl.where(i == 2, count - 1, gl.where(i < 2, i, i - 1))
            visit = i_g * count + i
            slot = visit % STAGES
            row = row_q + tile * BM
            mbarrier.wait(free.index(slot), (visit // STAGES & 1) ^ 1)  # the first wait passes at once
            is_ready = ready.index(slot)
            mbarrier.expect(is_ready, 2 * desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [row, col_q + i_g * stride_qh], is_ready, q_slots.index(slot))
            tma.async_copy_global_to_shared(desc_g, [row, col_g + i_g * stride_gh], is_ready, g_slots.index(slot))
            o_m = tile * BM + gl.arange(0, BM, layout)
            o_rowwise = i_rowwise + o_m
            async_copy.async_copy_global_to_shared(lse_slots.index(slot), p_lse + o_rowwise, mask=o_m < n)
            async_copy.async_copy_global_to_shared(delta_slots.index(slot), p_delta + o_rowwise, mask=o_m < n)
            async_copy.mbarrier_arrive(is_ready, increment_count=False)


@gluon.jit  # pragma: no cover
def load_rowwise(slots, slot, layout_s: gl.constexpr):
    """Log-sum-exp and delta of a tile of queries, each (1, BM)."""
    _, _, _, _, lse_slots, delta_slots = slots
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
    q_slots, g_slots, _, _, _, _ = slots
    _, ready, free = barriers
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
def dkv_partition(
    slots, barriers, coordinates, memory, strides, outputs, p_tiles, sizes,
    HEADS_PER_KV: gl.constexpr, NUM_KV: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """dk and dv of 64 keys.

    Causal, a group begins with the tile of queries that has its diagonal, the only one with a mask: the first group
    with the first tile, of which the second group sees nothing, the second group with the second. The third tile to
    come is the last of the user: its rows past the user's end are made harmless before the pipeline starts, for which
    it has to be in the ring then.
    """
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])  # (64, BM), transposed scores
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    q_slots, g_slots, k_slots, v_slots, _, _ = slots
    kv_ready, ready, free = barriers
    _, _, _, _, _, _, _, _, first, count = coordinates
    i_n, n, L, scale, scale_log2 = sizes
    dtype: gl.constexpr = q_slots.dtype
    gl.static_assert(STAGES >= 3, "the first three tiles have to be there at once")

    i_n = i_n + GROUP_INDEX * GROUP
    k_slot = k_slots.index(GROUP_INDEX)
    v_slot = v_slots.index(GROUP_INDEX)
    b_dk = gl.zeros([GROUP, D], gl.float32, layout_acc)
    b_dv = gl.zeros([GROUP, D], gl.float32, layout_acc)
    b_none = gl.zeros([GROUP, BM], gl.float32, layout_s)

    mbarrier.wait(kv_ready, 0, pred=count > 0)
    slot = 0
    phase = 0
    for i_head in range(gl.where(count > 0, HEADS_PER_KV, 0)):
        i_last = (first + count - 1) * BM
        if i_last + BM > n:
            visit = i_head * count + gl.minimum(2, count - 1)
            last_slot = visit % STAGES
            mbarrier.wait(ready.index(last_slot), visit // STAGES & 1)
            zero_rows_from(q_slots.index(last_slot), n - i_last, BM, D)
            zero_rows_from(g_slots.index(last_slot), n - i_last, BM, D)
        begin = 0
        if CAUSAL and GROUP_INDEX == 1:  # the first tile is one that only the other group sees
            begin = gl.minimum(1, count - 1)
            if begin == 1:
                mbarrier.wait(ready.index(slot), phase)
                mbarrier.arrive(free.index(slot))
                slot, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(ready.index(slot), phase)
        b_s = warpgroup_mma(k_slot, q_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_lse, b_delta = load_rowwise(slots, slot, layout_s)
        b_dp = begin_dp(v_slot, g_slots.index(slot), b_delta, layout_s)
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        if CAUSAL:  # the diagonal
            o_m = (first + begin) * BM + gl.arange(0, BM, gl.SliceLayout(0, layout_s))
            o_n = i_n + gl.arange(0, GROUP, gl.SliceLayout(1, layout_s))
            b_s = gl.where(o_m[None, :] >= o_n[:, None], b_s, float("-inf"))
        b_p = gl.exp2(b_s * scale_log2 - b_lse)
        for _ in range(begin + 1, count):
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

    i_kv, bos, n, i_n, h = tile_of_keys(p_tiles, NUM_KV)  # again: the loops have no registers to keep it in
    i_n = i_n + GROUP_INDEX * GROUP
    row = bos.to(gl.int64)
    # By way of shared memory, where the keys and values were, so that a warp writes whole rows.
    k_slot.store((b_dk * scale).to(dtype))
    v_slot.store(b_dv.to(dtype))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    b_out_dk = k_slot.load(layout)
    b_out_dv = v_slot.load(layout)
    if HAS_TARGETS:  # noqa: SIM102
        if gl.minimum(i_n + GROUP, n) > h:
            b_out_dk, b_out_dv = replace_candidates(
                b_out_dk, b_out_dv, memory, strides, row, i_kv, i_n, n, h, L, scale, scale_log2, HEADS_PER_KV, D, layout
            )
    p_dk, p_dv = outputs
    o_row = i_n + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    o_out = ((row + o_row)[:, None] * NUM_KV + i_kv) * D + o_d
    gl.store(p_dk + o_out, b_out_dk, mask=(o_row < n)[:, None])
    gl.store(p_dv + o_out, b_out_dv, mask=(o_row < n)[:, None])


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@gluon.jit(do_not_specialize=["L"])  # pragma: no cover
def hopper_dkv_kernel(
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
    """One row of the tile list and one key head: dk and dv of 128 keys of one user."""
    i_kv, bos, n, i_n, h = tile_of_keys(p_tiles, NUM_KV)
    if n == 0:
        return

    dtype: gl.constexpr = desc_q.dtype
    q_slots = gl.allocate_shared_memory(dtype, [STAGES, BM, D], desc_q.layout)
    g_slots = gl.allocate_shared_memory(dtype, [STAGES, BM, D], desc_g.layout)
    k_slots = gl.allocate_shared_memory(dtype, [2, GROUP, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [2, GROUP, D], desc_v.layout)
    layout_rowwise: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_slots = gl.allocate_shared_memory(gl.float32, [STAGES, BM], layout_rowwise)
    delta_slots = gl.allocate_shared_memory(gl.float32, [STAGES, BM], layout_rowwise)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1 + LANES)  # the copy engine, and every lane of the loading warp
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()

    first = 0  # tile of queries that sees these keys, and how many do; nobody sees candidates but themselves
    if CAUSAL:
        first = i_n // BM
    count = gl.where(i_n < h, gl.cdiv(n, BM) - first, 0)

    i_h = i_kv * HEADS_PER_KV
    descs = (desc_q, desc_g, desc_k, desc_v)
    slots = (q_slots, g_slots, k_slots, v_slots, lse_slots, delta_slots)
    barriers = (kv_ready, ready, free)
    coordinates = (
        bos, bos + i_n, i_h * stride_qh, i_h * stride_gh, i_kv * stride_kh, i_kv * stride_vh, stride_qh, stride_gh,
        first, count,
    )  # fmt: skip
    rowwise = (p_lse, p_delta, i_h)
    memory = (p_q, p_g, p_k, p_v, p_lse, p_delta)
    strides = (stride_ql, stride_qh, stride_gl, stride_gh, stride_kl, stride_kh, stride_vl, stride_vh)
    outputs = (p_dk, p_dv)
    sizes = (i_n, n, L, scale, scale_log2)
    gl.warp_specialize(
        [
            (dkv_partition, (
                slots, barriers, coordinates, memory, strides, outputs, p_tiles, sizes,
                HEADS_PER_KV, NUM_KV, D, STAGES, CAUSAL, HAS_TARGETS, 0,
            )),
            (dkv_partition, (
                slots, barriers, coordinates, memory, strides, outputs, p_tiles, sizes,
                HEADS_PER_KV, NUM_KV, D, STAGES, CAUSAL, HAS_TARGETS, 1,
            )),
            (load_queries_partition, (
                descs, slots, barriers, coordinates, rowwise, n, L, HEADS_PER_KV, STAGES,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, 24],
    )  # fmt: skip


# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[BackwardConfig, ...]] = {128: (BackwardConfig(4), BackwardConfig(3))}

launch = Launcher(hopper_dkv_kernel, "num_warps", "maxnreg")


def launch_hopper_dkv(
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
    config: BackwardConfig,
) -> None:
    """`dk` and `dv`, `(L, H_kv, D)` and contiguous, from the delta that the kernel of dq left; else as for that."""
    L, H, D = q.shape
    num_kv = k.shape[1]
    if L == 0 or key_tiles.shape[0] == 0:
        return
    launch(
        grid_of(key_tiles, num_kv),
        tuple([matrix_of_heads(x, GROUP.value) for x in (q, dout, k, v)]),
        (q, dout, k, v, lse, delta, dk, dv, key_tiles),
        (*q.stride()[:2], *dout.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, call.scale, call.scale_log2),
        (
            num_kv, H // num_kv, D, config.num_stages, call.causal, call.has_targets, GROUP_REGISTERS,
        ),
        (4, REGISTERS),
    )  # fmt: skip
