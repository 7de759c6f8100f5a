# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward for Hopper (compute capability 9.x), head dim 32 or 64 and 16-bit types, by programs that stay (Gluon).

A program of its own for every tile would spend most of a short user's time on waiting: for its row of the tile list,
its queries, its keys. Here as many programs as fit on the GPU take one item, a tile of queries and a head, after the
other, the longest users first. The warps of a program take two parts:

- one warp loads: queries, then tiles of BN keys and values, by TMA into rings of slots. It runs ahead, into the
  items to come, as far as there are slots;
- four warps compute, BM queries of the item, with asynchronous matrix products (wgmma).

The first item of a program is that of its index, further ones it draws from a counter, so that all programs end at
about the same time. The counter is a spare field of the tile list, zero before and after.

Tiles of keys are visited from the last to the first. The last is the only one that needs a mask, for the diagonal as
well as for the end of the history: an item's queries lie in one tile of keys. The loop over the others has none.

Names: see tiles.py; `ready` barriers say that a slot is filled, `free` barriers that the warps that compute are done
with it. Scores stay unscaled; the scale (in base 2) goes into the one fused multiply-add in front of `exp2`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

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

from kernels.jagged_flash_attention.hopper_forward import _readable_by_tma, matrix_of_heads, next_slot
from kernels.jagged_flash_attention.launch import Call, Launcher, grid_of

BLOCK = 64  # queries of an item: rows of a tile of the tile list
QUERY_SLOTS = 2  # items that are on the chip
NUM_FIELDS = gl.constexpr(8)  # of an item in shared memory: head, first row, rows, first query, history keys
COUNTER = gl.constexpr(7)  # field of the tile list's first row: items drawn; of the second row: programs done


@gluon.jit  # pragma: no cover
def load_item(p_tiles, i_item, num_items, H: gl.constexpr, BM: gl.constexpr):
    """An item's head, first row, rows, first query and history keys; no rows past the end of the list."""
    is_there = i_item < num_items
    p_tile = p_tiles + (gl.where(is_there, i_item, 0) // H).to(gl.int64) * 8
    bos = gl.load(p_tile)
    n = gl.load(p_tile + 1)
    tile = gl.load(p_tile + 4)
    h = gl.load(p_tile + 5)
    return i_item % H, bos, gl.where(is_there, n, 0), tile * BM, h


@gluon.jit  # pragma: no cover
def draw(p_tiles, num_items):
    """The next item that nobody has; the first two of every program are given."""
    num_given = 2 * gl.num_programs(0)
    i_item = num_items
    if num_given < num_items:
        i_item = num_given + gl.atomic_add(p_tiles + COUNTER, 1, sem="relaxed")
    return i_item


@gluon.jit  # pragma: no cover
def put(number, slot):
    """A number into shared memory."""
    slot.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit  # pragma: no cover
def get(slot):
    """A number out of shared memory."""
    return gl.sum(slot.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit  # pragma: no cover
def count_key_tiles(i_m, h, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """Tiles of history keys that the BM queries from i_m on visit; at least one, if all of it is masked."""
    hi = h
    if CAUSAL:
        hi = gl.where(i_m + BM <= h, i_m + BM, h)  # a candidate sees the whole history
    return gl.maximum(gl.cdiv(hi, BN), 1)


@gluon.jit  # pragma: no cover
def zero_rows_from(slot, num_rows, BN: gl.constexpr, D: gl.constexpr):
    """Zero the rows of a tile of values from num_rows on: they are not this user's, and 0 * NaN is NaN."""
    swizzle: gl.constexpr = slot.type.layout.swizzle_byte_width
    pairs = slot._reinterpret(gl.int32, [BN, D // 2], gl.NVMMASharedLayout(swizzle, element_bitwidth=32, rank=2))
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [256 // D, D // 8], [4, 1], [1, 0])
    m_row = (gl.arange(0, BN, gl.SliceLayout(1, layout)) < num_rows)[:, None]
    pairs.store(gl.where(m_row, pairs.load(layout), 0))
    fence_async_shared()


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
    i_item = gl.program_id(0)
    i_h, bos, n, i_m, h = load_item(p_tiles, i_item, num_items, H, BM)
    i_item += gl.num_programs(0)
    next_i_h, next_bos, next_n, next_i_m, next_h = load_item(p_tiles, i_item, num_items, H, BM)
    is_busy = True
    while is_busy:
        is_busy = n > 0
        mbarrier.wait(q_free.index(q_slot), q_phase)
        put(i_h, item_slots.index(q_slot * NUM_FIELDS))
        put(bos, item_slots.index(q_slot * NUM_FIELDS + 1))
        put(n, item_slots.index(q_slot * NUM_FIELDS + 2))
        put(i_m, item_slots.index(q_slot * NUM_FIELDS + 3))
        put(h, item_slots.index(q_slot * NUM_FIELDS + 4))
        ready = q_ready.index(q_slot)
        if is_busy:
            mbarrier.expect(ready, desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [bos + i_m, i_h * stride_qh], ready, q_slots.index(q_slot))
            i_kv = i_h // HEADS_PER_KV
            num_tiles = count_key_tiles(i_m, h, BM, BN, CAUSAL)
            for i in range(num_tiles):
                row = bos + (num_tiles - 1 - i) * BN
                mbarrier.wait(kv_free.index(slot), phase)
                ready = kv_ready.index(slot)
                mbarrier.expect(ready, 2 * desc_k.block_type.nbytes)
                tma.async_copy_global_to_shared(desc_k, [row, i_kv * stride_kh], ready, k_slots.index(slot))
                tma.async_copy_global_to_shared(desc_v, [row, i_kv * stride_vh], ready, v_slots.index(slot))
                slot, phase = next_slot(slot, phase, STAGES)
            i_item = draw(p_tiles, num_items)
        else:
            mbarrier.arrive(ready)
        q_slot, q_phase = next_slot(q_slot, q_phase, Q_STAGES)
        i_h, bos, n, i_m, h = next_i_h, next_bos, next_n, next_i_m, next_h
        next_i_h, next_bos, next_n, next_i_m, next_h = load_item(p_tiles, i_item, num_items, H, BM)
    if 2 * gl.num_programs(0) < num_items:  # noqa: SIM102 (only then the field may be touched)
        if gl.atomic_add(p_tiles + 8 + COUNTER, 1) == gl.num_programs(0) - 1:  # nobody will draw again
            gl.store(p_tiles + COUNTER, 0)
            gl.store(p_tiles + 8 + COUNTER, 0)


@gluon.jit  # pragma: no cover
def mask_scores(b_s, i_m, i_n, h, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr, layout_s: gl.constexpr):
    """-inf where a query does not see a history key."""
    o_n = gl.arange(0, BN, gl.SliceLayout(0, layout_s))[None, :]
    if CAUSAL:
        end = gl.minimum(i_m - i_n + 1 + gl.arange(0, BM, gl.SliceLayout(1, layout_s)), h - i_n)
        return gl.where(o_n < end[:, None], b_s, float("-inf"))
    else:
        return gl.where(o_n < h - i_n, b_s, float("-inf"))


@gluon.jit  # pragma: no cover
def visit_next_tile(
    b_acc, b_max, b_sum, b_p, q_tile, k_slots, v_slots, kv_ready, kv_free, slot, phase, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add P V of the tile at hand, and make P of the next one.

    Both products are waited for at once: other programs of the multiprocessor fill the gap, and every further barrier
    costs all warps a meeting.
    """
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    last_slot = slot
    b_acc = warpgroup_mma(b_p, v_slots.index(last_slot), b_acc, is_async=True)
    slot, phase = next_slot(slot, phase, STAGES)
    mbarrier.wait(kv_ready.index(slot), phase)
    b_none = gl.zeros([BM, BN], gl.float32, layout_s)
    b_s = warpgroup_mma(q_tile, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_acc, b_s, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_s, b_p])
    mbarrier.arrive(kv_free.index(last_slot))
    b_new_max = gl.maximum(b_max, gl.max(b_s, 1))
    b_shift = b_new_max * scale_log2
    b_decay = gl.exp2(b_max * scale_log2 - b_shift)
    b_prob = gl.exp2(b_s * scale_log2 - b_shift[:, None])
    b_sum = b_sum * b_decay + gl.sum(b_prob, 1)
    b_acc = b_acc * gl.convert_layout(b_decay, gl.SliceLayout(1, layout_acc))[:, None]
    b_p = gl.convert_layout(b_prob.to(q_tile.dtype), gl.DotOperandLayout(0, layout_acc, 2))
    return b_acc, b_new_max, b_sum, b_p, slot, phase


@gluon.jit  # pragma: no cover
def attend_self(
    b_acc, b_max, b_sum, p_q, p_k, p_v, stride_ql, stride_kl, stride_vl, num_before, num_rows, scale_log2,
    BM: gl.constexpr, D: gl.constexpr, layout_acc: gl.constexpr,
):  # fmt: skip
    """Let every candidate among the queries see itself: the diagonal, one row-wise product.

    Rows of the pointers from num_before to below num_rows are candidates.
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
    b_s = gl.where(m_candidate, b_s, float("-inf"))
    b_new_max = gl.maximum(b_max, b_s)
    b_shift = gl.where(b_new_max == float("-inf"), 0.0, b_new_max) * scale_log2  # rows past the end see nothing
    b_p = gl.exp2(b_s * scale_log2 - b_shift)
    b_decay = gl.exp2(b_max * scale_log2 - b_shift)
    b_acc = b_acc * b_decay[:, None] + b_p[:, None] * b_v.to(gl.float32)
    return b_acc, b_new_max, b_sum * b_decay + b_p


@gluon.jit  # pragma: no cover
def attend_partition(
    slots, barriers, memory, L, scale_log2, H: gl.constexpr, HEADS_PER_KV: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr,
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
        b_s = warpgroup_mma(q_tile, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False)
        b_s = mask_scores(b_s, i_m, i_n, h, BM, BN, CAUSAL, layout_s)
        b_max = gl.max(b_s, 1)
        b_shift = gl.where(b_max == float("-inf"), 0.0, b_max) * scale_log2  # nothing seen yet
        b_p = gl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_sum = gl.sum(b_p, 1)
        b_p = gl.convert_layout(b_p.to(dtype), layout_p)
        if h - i_n < BN:
            zero_rows_from(v_slots.index(slot), h - i_n, BN, D)

        b_acc = gl.zeros([BM, D], gl.float32, layout_acc)
        for _ in range(1, num_tiles):
            b_acc, b_max, b_sum, b_p, slot, phase = visit_next_tile(
                b_acc, b_max, b_sum, b_p, q_tile, k_slots, v_slots, kv_ready, kv_free, slot, phase, scale_log2,
                BM, BN, D, STAGES,
            )  # fmt: skip
        b_acc = warpgroup_mma(b_p, v_slots.index(slot), b_acc)
        mbarrier.arrive(kv_free.index(slot))
        slot, phase = next_slot(slot, phase, STAGES)

        row = (bos + i_m).to(gl.int64)
        num_rows = n - i_m
        b_max = gl.convert_layout(b_max, layout_acc_row)
        b_sum = gl.convert_layout(b_sum, layout_acc_row)
        if HAS_TARGETS:  # noqa: SIM102 (known when compiling, the inner one only when running)
            if gl.minimum(BM, num_rows) > h - i_m:
                i_kv = i_h // HEADS_PER_KV
                b_acc, b_max, b_sum = attend_self(
                    b_acc, b_max, b_sum, p_q + row * stride_ql + i_h * stride_qh,
                    p_k + row * stride_kl + i_kv * stride_kh, p_v + row * stride_vl + i_kv * stride_vh,
                    stride_ql, stride_kl, stride_vl, h - i_m, num_rows, scale_log2, BM, D, layout_acc,
                )  # fmt: skip

        # By way of shared memory, where the queries were, so that a warp writes whole rows.
        q_tile.store((b_acc * (1.0 / b_sum)[:, None]).to(dtype))
        o_m = gl.arange(0, BM, layout_acc_row)
        p_rows = p_lse + i_h.to(gl.int64) * L + row
        gl.store(p_rows + o_m, b_max * scale_log2 + gl.log2(b_sum), mask=o_m < num_rows)
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
def hopper_persistent_forward_kernel(
    desc_q,  # (L, H * D), blocks of (BM, D)
    desc_k,  # (L, H_kv * D), blocks of (BN, D)
    desc_v,
    p_q,  # (L, H, D)
    p_k,  # (L, H_kv, D)
    p_v,
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2
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
):
    """Items until there are no more."""
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
                H, HEADS_PER_KV, D, BM, BN, Q_STAGES, STAGES, CAUSAL, HAS_TARGETS,
            )),
            (load_partition, (
                descs, slots, barriers, p_tiles, num_items, strides,
                H, HEADS_PER_KV, BM, BN, Q_STAGES, STAGES, CAUSAL,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


@dataclass(frozen=True)
class PersistentConfig:
    """How the programs are laid out; no setting changes what is computed."""

    num_stages: int
    """Slots of the ring of tiles, at least 2."""

    programs_per_sm: int
    """Programs that share a multiprocessor."""

    block_n: int = 64
    """Rows of a tile in the ring: 64, in the forward also 128."""

    block: ClassVar[int] = BLOCK
    """Rows of an item."""


# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[PersistentConfig, ...]] = {
    32: (PersistentConfig(4, 4), PersistentConfig(4, 3)),
    64: (PersistentConfig(3, 3), PersistentConfig(3, 2, block_n=128)),
}


def registers_of(programs_per_sm: int) -> int:
    """Per thread when a program starts with its 8 warps. Four of them keep 24, the others share what these leave."""
    return min(65536 // (256 * programs_per_sm) // 8 * 8, 128)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(tiles: Tensor, num_items: int, programs_per_sm: int) -> int:
    """As many as run at once; one per item, where the list is too short to have both counters."""
    if tiles.shape[0] < 2:
        return num_items
    return min(num_items, _num_multiprocessors(tiles.device) * programs_per_sm)


launch = Launcher(hopper_persistent_forward_kernel, "num_warps", "maxnreg")


def launch_persistent_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call, config: PersistentConfig
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of self attention, as `launch_forward` gives them.

    Args:
        q: `(L, H, D)`, see `hopper_forward.supports`.
        k, v: `(L, H / G, D)`; query head i attends to key head i // G.
        tiles: `(entries, 8)`, the tiles of `BLOCK` queries; see schedule.py. Not to be used on two streams at once.
        call: mask and scale.
        config: how to compute it.
    """
    L, H, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((H, L), dtype=torch.float32)
    if L == 0 or tiles.shape[0] == 0:
        return out, lse
    q, k, v = _readable_by_tma(q), _readable_by_tma(k), _readable_by_tma(v)
    (num_items,) = grid_of(tiles, H)
    launch(
        (num_programs(tiles, num_items, config.programs_per_sm),),
        (matrix_of_heads(q, BLOCK), matrix_of_heads(k, config.block_n), matrix_of_heads(v, config.block_n)),
        (q, k, v, out, lse, tiles),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, num_items, call.scale_log2),
        (
            H, H // k.shape[1], D, BLOCK, config.block_n, QUERY_SLOTS, config.num_stages, call.causal,
            call.has_targets,
        ),
        (4, registers_of(config.programs_per_sm)),
    )  # fmt: skip
    return out, lse
