# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward for Hopper (compute capability 9.x), head dim 128 and 16-bit types, by programs that stay (../items.py).

An item is 128 queries of one user and a head. The warps of a program take three parts, after FlashAttention-3
(arXiv:2407.08608):

- one warp loads: queries, then tiles of BN keys and values, by TMA into a ring of STAGES slots. It runs ahead into the
  next item, so that the tensor cores need not wait at its start;
- two groups of four warps compute, 64 queries each, each at its own pace: while one stores what it has, the other one
  uses the tensor cores. Matrix products run in the background (asynchronous wgmma): while the tensor cores do scores
  of one tile and P V of the tile before, the group does the softmax.

Tiles of keys are visited from the last to the first. The last is the only one that needs a mask, for the
diagonal as well as for the end of the history: a group's 64 queries lie in one tile of keys. It is done
before the loop, so the loop has no mask at all.

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
    GROUP,
    attend_self,
    count_key_tiles,
    matrix_of_heads,
    next_slot,
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
from kernels.jagged_flash_attention.hopper.two_groups.config import (
    BLOCK,
    GIVEN,
    GROUP_REGISTERS,
    REGISTERS,
    TwoGroupForwardConfig,
)
from kernels.jagged_flash_attention.hopper.two_groups.ring import load_tile, pass_tiles


@gluon.jit  # pragma: no cover
def load_partition(
    descs, slots, barriers, p_tiles, num_items, strides, H: gl.constexpr, HEADS_PER_KV: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A warp that does nothing but load, one item after the other, as far ahead as there are slots."""
    desc_q, desc_k, desc_v = descs
    q_slots, k_slots, v_slots, item_slots = slots
    item_ready, item_free, k_ready, k_free, v_ready, v_free = barriers
    stride_qh, stride_kh, stride_vh = strides
    item_slot = 0
    item_phase = 1  # a new barrier counts as having completed the phase before its first
    slot = 0
    phase = 1
    wait_for_earlier_kernels()  # those who compute touch memory only once an item has come from here
    i_item = gl.program_id(0)
    is_busy = True
    while is_busy:
        i_h, bos, n, i_m, h = load_item(p_tiles, i_item, num_items, H, 2 * GROUP)
        is_busy = n > 0
        mbarrier.wait(item_free.index(item_slot), item_phase)
        put_item(i_h, bos, n, i_m, h, item_slots, item_slot)
        ready = item_ready.index(item_slot)
        if is_busy:
            mbarrier.expect(ready, 2 * desc_q.block_type.nbytes)
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    desc_q, [bos + i_m + i * GROUP, i_h * stride_qh], ready, q_slots.index(2 * item_slot + i)
                )
            column_k = i_h // HEADS_PER_KV * stride_kh
            column_v = i_h // HEADS_PER_KV * stride_vh
            row = bos + count_key_tiles(i_m + GROUP, h, GROUP, BN, CAUSAL) * BN  # the second group sees no less
            while row > bos:
                row -= BN
                load_tile(desc_k, row, column_k, k_slots, k_ready, k_free, slot, phase)
                if row == bos:  # the counter answers while the slot of the last values is still in use
                    i_item = draw(p_tiles, num_items, GIVEN)
                load_tile(desc_v, row, column_v, v_slots, v_ready, v_free, slot, phase)
                slot, phase = next_slot(slot, phase, STAGES)
        else:
            mbarrier.arrive(ready)
        item_slot, item_phase = next_slot(item_slot, item_phase, ITEM_SLOTS)
    leave(p_tiles, num_items, GIVEN)


@gluon.jit  # pragma: no cover
def pin(b_sum):
    """b_sum, and with it the softmax, computed before what follows in the program.

    Otherwise ptxas moves the wait for P V up in front of the exponentials, and nothing overlaps. It won't move it
    across a store to shared memory which needs b_sum, even one that is never done: b_sum is not negative.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; setp.lt.f32 p, $2, 0f00000000; setp.lt.or.f32 p, $3, 0f00000000, p; "
        "mov.b32 a, 0; @p st.shared.f32 [a], $2; mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=&f,=&f,f,f",
        [b_sum],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit  # pragma: no cover
def attend(
    q_slot, k_slots, v_slots, barriers, num_tiles, i_m, h, slot, phase, scale_log2, D: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Softmax attention of 64 queries over the next tiles in the ring: not normalised, sums and shifts of rows.

    Scores of a tile run together with P V of the one before.
    """
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # (64, BN)
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    _, _, k_ready, k_free, v_ready, v_free = barriers
    dtype: gl.constexpr = q_slot.dtype

    # The last tile of keys, the only one with a mask.
    mbarrier.wait(k_ready.index(slot), phase)
    b_none = gl.zeros([GROUP, BN], gl.float32, layout_s)
    b_s = warpgroup_mma(q_slot, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False)  # (64, BN)
    mbarrier.arrive(k_free.index(slot))
    i_n = (num_tiles - 1) * BN
    b_s = mask_scores(b_s, i_m, i_n, h, CAUSAL)
    b_p4, b_sum4, b_shift4 = begin_softmax(b_s, scale_log2)
    if i_n + BN > h:
        mbarrier.wait(v_ready.index(slot), phase)
        zero_rows_from(v_slots.index(slot), h - i_n, BN, D)

    b_acc = gl.zeros([GROUP, D], gl.float32, layout_acc)
    for _ in range(1, num_tiles):
        v_slot, v_phase = slot, phase
        slot, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(k_ready.index(slot), phase)
        b_s = warpgroup_mma(q_slot, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_p = gl.convert_layout(from_quads(b_p4, layout_s).to(dtype), layout_p)
        mbarrier.wait(v_ready.index(v_slot), v_phase)
        b_acc = warpgroup_mma(b_p, v_slots.index(v_slot), b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        mbarrier.arrive(k_free.index(slot))
        b_p4, b_shift4, b_decay4, b_new4 = next_probabilities(b_s, b_shift4, scale_log2)
        b_sum4 = b_sum4 * b_decay4 + pin(sum_of_thread(b_p4))
        b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
        mbarrier.arrive(v_free.index(v_slot))
        b_acc = rescale(b_acc, b_decay4, b_new4)

    b_p = gl.convert_layout(from_quads(b_p4, layout_s).to(dtype), layout_p)
    mbarrier.wait(v_ready.index(slot), phase)
    b_acc = warpgroup_mma(b_p, v_slots.index(slot), b_acc)
    mbarrier.arrive(v_free.index(slot))
    slot, phase = next_slot(slot, phase, STAGES)
    b_shift, b_sum = end_softmax(b_sum4, b_shift4, gl.SliceLayout(1, layout_acc))
    return b_acc, b_shift, b_sum, slot, phase


@gluon.jit  # pragma: no cover
def attend_item(
    slots, barriers, memory, L, scale_log2, item_slot, num_tiles, slot, phase, H: gl.constexpr,
    HEADS_PER_KV: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, HAS_LSE: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a group's queries of an item, of which it has at least one.

    The item's fields are read again after the loop, because registers are scarce in it.
    """
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_slots, k_slots, v_slots, item_slots = slots
    p_q, p_k, p_v, p_out, p_lse, stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh = memory
    dtype: gl.constexpr = q_slots.dtype
    q_slot = q_slots.index(2 * item_slot + GROUP_INDEX)
    item = item_slot * NUM_FIELDS
    i_m = get(item_slots.index(item + 3)) + GROUP_INDEX * GROUP
    h = get(item_slots.index(item + 4))
    b_acc, b_shift, b_sum, slot, phase = attend(
        q_slot, k_slots, v_slots, barriers, num_tiles, i_m, h, slot, phase, scale_log2, D, BN, STAGES, CAUSAL
    )

    i_h = get(item_slots.index(item))
    i_m = get(item_slots.index(item + 3)) + GROUP_INDEX * GROUP
    row = (get(item_slots.index(item + 1)) + i_m).to(gl.int64)
    num_rows = get(item_slots.index(item + 2)) - i_m
    if HAS_TARGETS:
        num_before = get(item_slots.index(item + 4)) - i_m
        if gl.minimum(GROUP, num_rows) > num_before:
            i_kv = i_h // HEADS_PER_KV
            b_acc, b_shift, b_sum = attend_self(
                b_acc, b_shift, b_sum, p_q + row * stride_ql + i_h * stride_qh,
                p_k + row * stride_kl + i_kv * stride_kh, p_v + row * stride_vl + i_kv * stride_vh,
                stride_ql, stride_kl, stride_vl, num_before, num_rows, scale_log2, GROUP, D, layout_acc,
            )  # fmt: skip

    if HAS_LSE:
        o_m = gl.arange(0, GROUP, gl.SliceLayout(1, layout_acc))
        p_rows = p_lse + i_h.to(gl.int64) * L + row
        gl.store(p_rows + o_m, b_shift + log2(b_sum), mask=o_m < num_rows)
    # By way of shared memory, where the queries were, so that a warp writes whole rows.
    q_slot.store((b_acc * reciprocal(b_sum)[:, None]).to(dtype))
    o_m = gl.arange(0, GROUP, gl.SliceLayout(1, layout_out))[:, None]
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout_out))[None, :]
    p_rows = p_out + (row * H + i_h) * D
    gl.store(p_rows + (o_m * (H * D) + o_d), q_slot.load(layout_out), mask=o_m < num_rows)
    fence_async_shared()
    return slot, phase


@gluon.jit  # pragma: no cover
def attend_partition(
    slots, barriers, memory, L, scale_log2, H: gl.constexpr, HEADS_PER_KV: gl.constexpr, D: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_TARGETS: gl.constexpr, HAS_LSE: gl.constexpr,
    GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """A group's 64 queries of one item after the other."""
    _, _, _, item_slots = slots
    item_ready, item_free, k_ready, k_free, v_ready, v_free = barriers
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
            # With tiles of 64 keys, the first one may be one that only the other group sees.
            num_passed = count_key_tiles(first + GROUP, h, GROUP, BN, CAUSAL) - num_tiles
            slot, phase = pass_tiles(k_ready, k_free, v_ready, v_free, num_passed, slot, phase, STAGES)
            slot, phase = attend_item(
                slots, barriers, memory, L, scale_log2, item_slot, num_tiles, slot, phase,
                H, HEADS_PER_KV, D, BN, STAGES, CAUSAL, HAS_TARGETS, HAS_LSE, GROUP_INDEX,
            )  # fmt: skip
        else:
            if first + GROUP < n:
                slot, phase = attend_item(
                    slots, barriers, memory, L, scale_log2, item_slot, num_tiles, slot, phase,
                    H, HEADS_PER_KV, D, BN, STAGES, CAUSAL, HAS_TARGETS, HAS_LSE, GROUP_INDEX,
                )  # fmt: skip
            else:  # the user ends before this group's rows
                slot, phase = pass_tiles(k_ready, k_free, v_ready, v_free, num_tiles, slot, phase, STAGES)
        mbarrier.arrive(item_free.index(item_slot))
        item_slot, item_phase = next_slot(item_slot, item_phase, ITEM_SLOTS)
        mbarrier.wait(item_ready.index(item_slot), item_phase)
        n = get(item_slots.index(item_slot * NUM_FIELDS + 2))


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@gluon.jit(do_not_specialize=["L", "num_items"])  # pragma: no cover
def hopper_two_group_forward_kernel(
    desc_q,  # (L, H * D), blocks of (64, D)
    desc_k,  # (L, H_kv * D), blocks of (BN, D)
    desc_v,
    p_q,  # (L, H, D)
    p_k,  # (L, H_kv, D)
    p_v,
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2, written only with HAS_LSE
    p_tiles,  # (capacity, 8), int32, tiles of 128 queries
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
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr,
    HAS_LSE: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
):
    """Items until there are no more."""
    gl.static_assert(STAGES >= 2, "a tile is waited for while another one is held")
    dtype: gl.constexpr = desc_q.dtype
    layout_fields: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_slots = gl.allocate_shared_memory(dtype, [2 * ITEM_SLOTS, GROUP, D], desc_q.layout)
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_v.layout)
    item_slots = gl.allocate_shared_memory(gl.int32, [ITEM_SLOTS * NUM_FIELDS, 1], layout_fields)
    item_ready = gl.allocate_shared_memory(gl.int64, [ITEM_SLOTS, 1], mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, [ITEM_SLOTS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ITEM_SLOTS):
        mbarrier.init(item_ready.index(i), count=1)
        mbarrier.init(item_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()

    descs = (desc_q, desc_k, desc_v)
    slots = (q_slots, k_slots, v_slots, item_slots)
    barriers = (item_ready, item_free, k_ready, k_free, v_ready, v_free)
    memory = (p_q, p_k, p_v, p_out, p_lse, stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh)
    gl.warp_specialize(
        [
            (attend_partition, (
                slots, barriers, memory, L, scale_log2, H, HEADS_PER_KV, D, BN, STAGES, CAUSAL, HAS_TARGETS, HAS_LSE, 0,
            )),
            (attend_partition, (
                slots, barriers, memory, L, scale_log2, H, HEADS_PER_KV, D, BN, STAGES, CAUSAL, HAS_TARGETS, HAS_LSE, 1,
            )),
            (load_partition, (
                descs, slots, barriers, p_tiles, num_items, (stride_qh, stride_kh, stride_vh),
                H, HEADS_PER_KV, BN, STAGES, CAUSAL,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, 24],
    )  # fmt: skip


# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[TwoGroupForwardConfig, ...]] = {
    128: (TwoGroupForwardConfig(block_n=128, num_stages=2), TwoGroupForwardConfig(block_n=64, num_stages=4)),
}

launch = Launcher(hopper_two_group_forward_kernel, "num_warps", "maxnreg", "launch_pdl")


def launch_two_group_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call, config: TwoGroupForwardConfig, lse: Tensor | None
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
        (num_programs(tiles, num_items, 1),),
        (matrix_of_heads(q, BLOCK // 2), matrix_of_heads(k, config.block_n), matrix_of_heads(v, config.block_n)),
        (q, k, v, out, out if lse is None else lse, tiles),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, num_items, call.scale_log2),
        (
            H, H // k.shape[1], D, config.block_n, config.num_stages, call.causal, call.has_targets, lse is not None,
            GROUP_REGISTERS,
        ),
        (4, REGISTERS, True),
    )  # fmt: skip
    return out
