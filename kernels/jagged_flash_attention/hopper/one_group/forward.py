# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward for Hopper (compute capability 9.x), head dim 32 or 64 and 16-bit types, by programs that stay (../items.py).

Of an item, the queries stay; tiles of BN keys and values stream by, from the last to the first. The last is the only
one that needs a mask, for the diagonal as well as for the end of the history: an item's queries lie in one tile of
keys. The loop over the others has none.

The softmax is that of ../softmax.py. A program begins while the lists may still be being made; the loading warp waits.

Names: see ../common.py.
"""

from __future__ import annotations

import torch
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

from kernels.jagged.launch import Launcher, grid_of
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.hopper.common import (
    attend_self,
    count_key_tiles,
    matrix_of_heads,
    next_slot,
    resident,
    wait_for_earlier_kernels,
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
from kernels.jagged_flash_attention.hopper.softmax import (
    begin_softmax,
    end_softmax,
    from_quads,
    log2,
    mask_scores,
    next_probabilities,
    reciprocal,
    rescale,
    sum_of_thread,
)


@gluon.jit  # pragma: no cover
def load_partition(
    descs, slots, barriers, p_tiles, num_items, strides, H: gl.constexpr, HEADS_PER_KV: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Load queries, keys and values of one item after the other."""
    desc_q, desc_k, desc_v = descs
    q_slots, k_slots, v_slots, item_slots = slots
    q_ready, q_free, kv_ready, kv_free = barriers
    stride_qh, stride_kh, stride_vh = strides
    q_slot = 0
    q_phase = 1  # a new barrier counts as having completed the phase before its first
    slot = 0
    phase = 1
    wait_for_earlier_kernels()  # those who compute touch memory only once an item has come from here
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
            mbarrier.expect(ready, desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [bos + i_m, i_h * stride_qh], ready, q_slots.index(q_slot))
            i_kv = i_h // HEADS_PER_KV
            num_tiles = count_key_tiles(i_m, h, BM, BN, CAUSAL)
            for i in range(num_tiles):
                row = bos + (num_tiles - 1 - i) * BN
                load_keys_with_values(
                    desc_k, desc_v, row, i_kv * stride_kh, i_kv * stride_vh, k_slots, v_slots, kv_free, kv_ready,
                    slot, phase,
                )  # fmt: skip
                slot, phase = next_slot(slot, phase, STAGES)
            i_item = draw(p_tiles, num_items, GIVEN)
        else:
            mbarrier.arrive(ready)
        q_slot, q_phase = next_slot(q_slot, q_phase, Q_STAGES)
        i_h, bos, n, i_m, h = next_i_h, next_bos, next_n, next_i_m, next_h
        next_i_h, next_bos, next_n, next_i_m, next_h = load_item(p_tiles, i_item, num_items, H, BM)
    leave(p_tiles, num_items, GIVEN)


@gluon.jit  # pragma: no cover
def visit_next_tile(
    b_acc, b_p4, b_sum4, b_shift4, a_q, k_slots, v_slots, kv_ready, kv_free, slot, phase, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SERIAL: gl.constexpr,
):  # fmt: skip
    """Add P V of the tile at hand, and make P of the next one.

    Both products are waited for at once: other programs of the multiprocessor fill the gap, and every further barrier
    costs all warps a meeting. SERIAL, one after the other, takes fewer registers.
    """
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    last_slot = slot
    b_left = gl.convert_layout(from_quads(b_p4, layout_s).to(a_q.dtype), gl.DotOperandLayout(0, layout_acc, 2))
    b_acc = warpgroup_mma(b_left, v_slots.index(last_slot), b_acc, is_async=True)
    slot, phase = next_slot(slot, phase, STAGES)
    if SERIAL:
        b_acc, b_left = warpgroup_mma_wait(0, deps=[b_acc, b_left])
        mbarrier.arrive(kv_free.index(last_slot))
    mbarrier.wait(kv_ready.index(slot), phase)
    b_none = gl.zeros([BM, BN], gl.float32, layout_s)
    b_s = warpgroup_mma(a_q, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    if SERIAL:
        b_s = warpgroup_mma_wait(0, deps=[b_s])
    else:
        b_acc, b_s, b_left = warpgroup_mma_wait(0, deps=[b_acc, b_s, b_left])
        mbarrier.arrive(kv_free.index(last_slot))
    b_p4, b_shift4, b_decay4, b_new4 = next_probabilities(b_s, b_shift4, scale_log2)
    b_sum4 = b_sum4 * b_decay4 + sum_of_thread(b_p4)
    b_acc = rescale(b_acc, b_decay4, b_new4)
    return b_acc, b_p4, b_sum4, b_shift4, slot, phase


@gluon.jit  # pragma: no cover
def attend_partition(
    slots, barriers, memory, L, scale_log2, H: gl.constexpr, HEADS_PER_KV: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, IN_REGISTERS: gl.constexpr, SERIAL: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Softmax attention of one item after the other."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # (BM, BN)
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (BM, D)
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    layout_acc_row: gl.constexpr = gl.SliceLayout(1, layout_acc)
    layout_out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_slots, k_slots, v_slots, item_slots = slots
    q_ready, q_free, kv_ready, kv_free = barriers
    p_q, p_k, p_v, p_out, p_lse, stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh = memory
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
        num_tiles = count_key_tiles(i_m, h, BM, BN, CAUSAL)
        i_n = (num_tiles - 1) * BN
        q_tile = q_slots.index(q_slot)

        mbarrier.wait(kv_ready.index(slot), phase)
        b_none = gl.zeros([BM, BN], gl.float32, layout_s)
        a_q = resident(q_tile, layout_s, IN_REGISTERS)
        b_s = warpgroup_mma(a_q, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False)
        b_s = mask_scores(b_s, i_m, i_n, h, CAUSAL)
        b_p4, b_sum4, b_shift4 = begin_softmax(b_s, scale_log2)
        if h - i_n < BN:
            zero_rows_from(v_slots.index(slot), h - i_n, BN, D)

        b_acc = gl.zeros([BM, D], gl.float32, layout_acc)
        for _ in range(1, num_tiles):
            b_acc, b_p4, b_sum4, b_shift4, slot, phase = visit_next_tile(
                b_acc, b_p4, b_sum4, b_shift4, a_q, k_slots, v_slots, kv_ready, kv_free, slot, phase, scale_log2,
                BM, BN, D, STAGES, SERIAL,
            )  # fmt: skip
        b_left = gl.convert_layout(from_quads(b_p4, layout_s).to(dtype), layout_p)
        b_acc = warpgroup_mma(b_left, v_slots.index(slot), b_acc)

        row = (bos + i_m).to(gl.int64)
        num_rows = n - i_m
        b_shift, b_sum = end_softmax(b_sum4, b_shift4, layout_acc_row)
        if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
            if gl.minimum(BM, num_rows) > h - i_m:
                i_kv = i_h // HEADS_PER_KV
                b_acc, b_shift, b_sum = attend_self(
                    b_acc, b_shift, b_sum, p_q + row * stride_ql + i_h * stride_qh,
                    p_k + row * stride_kl + i_kv * stride_kh, p_v + row * stride_vl + i_kv * stride_vh,
                    stride_ql, stride_kl, stride_vl, h - i_m, num_rows, scale_log2, BM, D, layout_acc,
                )  # fmt: skip

        # By way of shared memory, where the queries were, so that a warp writes whole rows.
        q_tile.store((b_acc * reciprocal(b_sum)[:, None]).to(dtype))
        mbarrier.arrive(kv_free.index(slot))  # here, because warps meet before the next step anyway
        slot, phase = next_slot(slot, phase, STAGES)
        if HAS_LSE:
            o_m = gl.arange(0, BM, layout_acc_row)
            p_rows = p_lse + i_h.to(gl.int64) * L + row
            gl.store(p_rows + o_m, b_shift + log2(b_sum), mask=o_m < num_rows)
        o_m = gl.arange(0, BM, gl.SliceLayout(1, layout_out))[:, None]
        o_d = gl.arange(0, D, gl.SliceLayout(0, layout_out))[None, :]
        p_rows = p_out + (row * H + i_h) * D
        gl.store(p_rows + (o_m * (H * D) + o_d), q_tile.load(layout_out), mask=o_m < num_rows)
        fence_async_shared()
        mbarrier.arrive(q_free.index(q_slot))
        q_slot, q_phase = next_slot(q_slot, q_phase, Q_STAGES)
        mbarrier.wait(q_ready.index(q_slot), q_phase)
        n = get(item_slots.index(q_slot * NUM_FIELDS + 2))


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@gluon.jit(do_not_specialize=["L", "num_items"])  # pragma: no cover
def hopper_one_group_forward_kernel(
    desc_q,  # (L, H * D), blocks of (BM, D)
    desc_k,  # (L, H_kv * D), blocks of (BN, D)
    desc_v,
    p_q,  # (L, H, D)
    p_k,  # (L, H_kv, D)
    p_v,
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2, written only with HAS_LSE
    p_tiles,  # (capacity, 8), int32, tiles of BM queries
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    L,
    num_items,  # capacity * H
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
    SERIAL: gl.constexpr,
    HAS_LSE: gl.constexpr,
):
    """Items until there are no more."""
    gl.static_assert(STAGES >= 2, "a tile is waited for while another one is held")
    gl.static_assert(BN >= BM, "one tile of keys alone has a mask")
    dtype: gl.constexpr = desc_q.dtype
    q_slots = gl.allocate_shared_memory(dtype, [Q_STAGES, BM, D], desc_q.layout)
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_v.layout)
    item_slots = gl.allocate_shared_memory(gl.int32, [Q_STAGES * NUM_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    kv_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(kv_ready.index(i), count=1)
        mbarrier.init(kv_free.index(i), count=1)
    fence_async_shared()

    descs = (desc_q, desc_k, desc_v)
    slots = (q_slots, k_slots, v_slots, item_slots)
    barriers = (q_ready, q_free, kv_ready, kv_free)
    memory = (p_q, p_k, p_v, p_out, p_lse, stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh)
    strides = (stride_qh, stride_kh, stride_vh)
    gl.warp_specialize(
        [
            (attend_partition, (
                slots, barriers, memory, L, scale_log2,
                H, HEADS_PER_KV, D, BM, BN, Q_STAGES, STAGES, CAUSAL, HAS_TARGETS, IN_REGISTERS, SERIAL, HAS_LSE,
            )),
            (load_partition, (
                descs, slots, barriers, p_tiles, num_items, strides,
                H, HEADS_PER_KV, BM, BN, Q_STAGES, STAGES, CAUSAL,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[OneGroupConfig, ...]] = {
    32: (OneGroupConfig(4, 4), OneGroupConfig(4, 3)),
    64: (
        OneGroupConfig(3, 3),
        OneGroupConfig(3, 3, in_registers=True),
        OneGroupConfig(2, 4),
        OneGroupConfig(3, 2, block_n=128, in_registers=True),
    ),
}


def is_serial(head_dim: int, programs_per_sm: int) -> bool:
    """Whether scores wait for P V: four programs on an SM leave 104 registers a thread, too few for both."""
    return head_dim == 64 and programs_per_sm > 3


launch = Launcher(hopper_one_group_forward_kernel, "num_warps", "maxnreg", "launch_pdl")


def launch_one_group_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call, config: OneGroupConfig, lse: Tensor | None
) -> Tensor:
    """Output of self attention, as `launch_forward` gives it.

    Args:
        q: `(L, H, D)`, see `common.supports`; like k and v as TMA can read it (`common.readable_by_tma`).
        k, v: `(L, H / G, D)`; query head i attends to key head i // G.
        tiles: `(entries, 8)`, the tiles of `BLOCK` queries; see tile_lists.py. Not to be used on two streams at once.
        call: mask and scale.
        config: how to compute it.
        lse: as for `launch_forward`.
    """
    L, H, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if L == 0 or tiles.shape[0] == 0:
        return out
    (num_items,) = grid_of(tiles, H)
    launch(
        (num_programs(tiles, num_items, config.programs_per_sm),),
        (matrix_of_heads(q, BLOCK), matrix_of_heads(k, config.block_n), matrix_of_heads(v, config.block_n)),
        (q, k, v, out, out if lse is None else lse, tiles),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, num_items, call.scale_log2),
        (
            H, H // k.shape[1], D, BLOCK, config.block_n, ITEM_SLOTS.value, config.num_stages, call.causal,
            call.has_targets, config.in_registers, is_serial(D, config.programs_per_sm), lse is not None,
        ),
        (4, registers_of(config.programs_per_sm), True),
    )  # fmt: skip
    return out
