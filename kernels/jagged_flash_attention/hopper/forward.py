# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward of long users for Hopper (compute capability 9.x), head dim 128 and 16-bit types, written in Gluon.

One program per row of a tile list and head: 128 queries of one user. Its warps take three parts, after
FlashAttention-3 (arXiv:2407.08608):

- one warp loads: queries once, then tiles of BN keys and values, by TMA into a ring of STAGES slots;
- two groups of four warps compute, 64 queries each. Matrix products run in the background (asynchronous
  wgmma): while the tensor cores do scores of one tile and P V of the tile before, the group does the softmax.

Tiles of keys are visited from the last to the first. The last is the only one that needs a mask, for the
diagonal as well as for the end of the history: a group's 64 queries lie in one tile of keys. It is done
before the loop, so the loop has no mask at all.

The softmax is that of softmax.py. A program begins while the lists may still be being made, and waits for them.

Names: see common.py.
"""

from __future__ import annotations

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

from kernels.jagged_flash_attention.hopper.common import (
    GROUP,
    attend_self,
    count_key_tiles,
    matrix_of_heads,
    next_slot,
    wait_for_earlier_kernels,
    zero_rows_from,
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
from kernels.jagged_flash_attention.launch import Call, Launcher, check_fields, grid_of

BLOCK = 128  # queries of a program: rows of a tile of the tile list


@gluon.jit  # pragma: no cover
def load_keys_and_values(descs, slots, barriers, coordinates, i, BN: gl.constexpr, STAGES: gl.constexpr):
    """Tile i in the order of visits, the last of the user being the first, into its slot once that is free."""
    _, desc_k, desc_v = descs
    _, k_slots, v_slots = slots
    _, k_ready, k_free, v_ready, v_free = barriers
    _, row_k, _, col_k, col_v, num_tiles = coordinates
    row = row_k + (num_tiles - 1 - i) * BN
    slot = i % STAGES
    phase = (i // STAGES & 1) ^ 1  # a new barrier counts as having completed the phase before its first
    mbarrier.wait(k_free.index(slot), phase)
    mbarrier.expect(k_ready.index(slot), desc_k.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_k, [row, col_k], k_ready.index(slot), k_slots.index(slot))
    mbarrier.wait(v_free.index(slot), phase)
    mbarrier.expect(v_ready.index(slot), desc_v.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_v, [row, col_v], v_ready.index(slot), v_slots.index(slot))


@gluon.jit  # pragma: no cover
def load_partition(descs, slots, barriers, coordinates, BN: gl.constexpr, STAGES: gl.constexpr):
    """A warp that does nothing but load, as far ahead as there are slots."""
    desc_q, _, _ = descs
    q_slots, _, _ = slots
    q_ready = barriers[0]
    row_q, _, col_q, _, _, num_tiles = coordinates
    mbarrier.expect(q_ready, 2 * desc_q.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_q, [row_q, col_q], q_ready, q_slots.index(0))
    tma.async_copy_global_to_shared(desc_q, [row_q + GROUP, col_q], q_ready, q_slots.index(1))
    for i in range(num_tiles):
        load_keys_and_values(descs, slots, barriers, coordinates, i, BN, STAGES)


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
def attend_partition(
    slots, barriers, coordinates, memory, sizes,
    H: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr, GROUP_INDEX: gl.constexpr,
):  # fmt: skip
    """Softmax attention of 64 queries over the tiles in the ring."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # (64, BN)
    layout_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (64, D)
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_acc, 2)
    q_slots, k_slots, v_slots = slots
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    p_q, p_k, p_v, p_out, p_lse, stride_ql, stride_kl, stride_vl = memory
    num_tiles = coordinates[5]
    i_m, n, h, scale_log2 = sizes
    dtype: gl.constexpr = q_slots.dtype

    i_m = i_m + GROUP_INDEX * GROUP
    num_own = count_key_tiles(i_m, h, GROUP, BN, CAUSAL)
    q_slot = q_slots.index(GROUP_INDEX)
    slot = 0
    phase = 0
    if BN == GROUP:  # noqa: SIM102 (known when compiling, the inner one only when running)
        if num_own < num_tiles:  # the first tile is one that only the other group sees
            mbarrier.arrive(k_free.index(0))
            mbarrier.arrive(v_free.index(0))
            slot, phase = next_slot(slot, phase, STAGES)

    # The last tile of keys, the only one with a mask.
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(slot), phase)
    b_none = gl.zeros([GROUP, BN], gl.float32, layout_s)
    b_s = warpgroup_mma(q_slot, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False)  # (64, BN)
    mbarrier.arrive(k_free.index(slot))
    i_n = (num_own - 1) * BN
    b_s = mask_scores(b_s, i_m, i_n, h, CAUSAL)
    b_p4, b_sum4, b_shift4 = begin_softmax(b_s, scale_log2)
    b_p = gl.convert_layout(from_quads(b_p4, layout_s).to(dtype), layout_p)
    if i_n + BN > h:
        mbarrier.wait(v_ready.index(slot), phase)
        zero_rows_from(v_slots.index(slot), h - i_n, BN, D)

    # Scores of a tile run together with P V of the one before.
    b_acc = gl.zeros([GROUP, D], gl.float32, layout_acc)
    for _ in range(num_tiles - num_own + 1, num_tiles):
        v_slot, v_phase = slot, phase
        slot, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(k_ready.index(slot), phase)
        b_s = warpgroup_mma(q_slot, k_slots.index(slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
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

    b_shift, b_sum = end_softmax(b_sum4, b_shift4, gl.SliceLayout(1, layout_acc))
    if HAS_TARGETS:  # noqa: SIM102
        if gl.minimum(i_m + GROUP, n) > h:
            first = i_m.to(gl.int64)
            b_acc, b_shift, b_sum = attend_self(
                b_acc, b_shift, b_sum, p_q + first * stride_ql, p_k + first * stride_kl, p_v + first * stride_vl,
                stride_ql, stride_kl, stride_vl, h - i_m, n - i_m, scale_log2, GROUP, D, layout_acc,
            )  # fmt: skip

    o_m = i_m + gl.arange(0, GROUP, gl.SliceLayout(1, layout_acc))
    gl.store(p_lse + o_m, b_shift + log2(b_sum), mask=o_m < n)

    # By way of shared memory, where the queries were, so that a warp writes whole rows.
    q_slot.store((b_acc * reciprocal(b_sum)[:, None]).to(dtype))
    layout_out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_m = i_m + gl.arange(0, GROUP, gl.SliceLayout(1, layout_out))
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout_out))
    p_rows = p_out + o_m.to(gl.int64)[:, None] * (H * D) + o_d[None, :]
    gl.store(p_rows, q_slot.load(layout_out), mask=(o_m < n)[:, None])


# Totals differ in every batch: a kernel specialised on them would be compiled over and over.
@gluon.jit(do_not_specialize=["L"])  # pragma: no cover
def hopper_forward_kernel(
    desc_q,  # (L, H * D), blocks of (64, D)
    desc_k,  # (L, H_kv * D), blocks of (BN, D)
    desc_v,
    p_q,  # (L, H, D)
    p_k,  # (L, H_kv, D)
    p_v,
    p_out,  # (L, H, D), contiguous
    p_lse,  # (H, L), float32, base 2
    p_tiles,  # (capacity, 8), int32
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    L,
    scale_log2,
    H: gl.constexpr,
    HEADS_PER_KV: gl.constexpr,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_TARGETS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
):
    """One row of the tile list and one head: 128 queries of one user."""
    pid = gl.program_id(0)
    i_h = pid % H
    i_kv = i_h // HEADS_PER_KV
    p_tile = p_tiles + (pid // H).to(gl.int64) * 8
    wait_for_earlier_kernels()
    bos = gl.load(p_tile)
    n = gl.load(p_tile + 1)
    i_m = gl.load(p_tile + 4) * (2 * GROUP)
    h = gl.load(p_tile + 5)
    if n == 0:
        return

    dtype: gl.constexpr = desc_q.dtype
    q_slots = gl.allocate_shared_memory(dtype, [2, GROUP, D], desc_q.layout)
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_k.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()

    num_tiles = count_key_tiles(i_m + GROUP, h, GROUP, BN, CAUSAL)  # of the second group, which sees no less
    row = bos.to(gl.int64)
    p_q += row * stride_ql + i_h * stride_qh
    p_k += row * stride_kl + i_kv * stride_kh
    p_v += row * stride_vl + i_kv * stride_vh
    p_out += (row * H + i_h) * D
    p_lse += i_h.to(gl.int64) * L + row
    descs = (desc_q, desc_k, desc_v)
    slots = (q_slots, k_slots, v_slots)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    coordinates = (bos + i_m, bos, i_h * stride_qh, i_kv * stride_kh, i_kv * stride_vh, num_tiles)
    memory = (p_q, p_k, p_v, p_out, p_lse, stride_ql, stride_kl, stride_vl)
    sizes = (i_m, n, h, scale_log2)
    gl.warp_specialize(
        [
            (attend_partition, (
                slots, barriers, coordinates, memory, sizes, H, D, BN, STAGES, CAUSAL, HAS_TARGETS, 0,
            )),
            (attend_partition, (
                slots, barriers, coordinates, memory, sizes, H, D, BN, STAGES, CAUSAL, HAS_TARGETS, 1,
            )),
            (load_partition, (descs, slots, barriers, coordinates, BN, STAGES)),
        ],
        [4, 1],
        [GROUP_REGISTERS, 24],
    )  # fmt: skip


@dataclass(frozen=True)
class ForwardConfig:
    """How a program is laid out; no setting changes what is computed."""

    block_n: int
    """Keys of a tile, 64 or 128."""

    num_stages: int
    """Slots of the ring."""

    block: ClassVar[int] = BLOCK
    """Queries of a program."""

    def __post_init__(self) -> None:
        check_fields(self, "a forward for Hopper", {"block_n": (64, 128), "num_stages": range(2, 9)})


# Registers per thread: 168 for the 12 warps of a program when it starts, which then has an SM to itself; the warp that
# loads and its 3 idle ones keep 24, so that 240 are left for the two groups.
REGISTERS, GROUP_REGISTERS = 168, 240

# Head dim -> configurations worth a try on another GPU, the best first.
CONFIGS: dict[int, tuple[ForwardConfig, ...]] = {
    128: (ForwardConfig(block_n=128, num_stages=2), ForwardConfig(block_n=64, num_stages=4)),
}


launch = Launcher(hopper_forward_kernel, "num_warps", "maxnreg", "launch_pdl")


def launch_hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call, config: ForwardConfig
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of self attention, as `launch_forward` gives them.

    Args:
        q: `(L, H, D)`, see `common.supports`; like k and v as TMA can read it (`common.readable_by_tma`).
        k, v: `(L, H / G, D)`; query head i attends to key head i // G.
        tiles: `(entries, 8)`, the tiles of `BLOCK` queries; see tile_lists.py.
        call: mask and scale.
        config: how to compute it.
    """
    L, H, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((H, L), dtype=torch.float32)
    if L == 0 or tiles.shape[0] == 0:
        return out, lse
    launch(
        grid_of(tiles, H),
        (matrix_of_heads(q, BLOCK // 2), matrix_of_heads(k, config.block_n), matrix_of_heads(v, config.block_n)),
        (q, k, v, out, lse, tiles),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (L, call.scale_log2),
        (
            H, H // k.shape[1], D, config.block_n, config.num_stages, call.causal, call.has_targets, GROUP_REGISTERS,
        ),
        (4, REGISTERS, True),
    )  # fmt: skip
    return out, lse
