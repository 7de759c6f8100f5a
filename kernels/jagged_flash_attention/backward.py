"""Backward: two kernels without atomics, so that the same input always gives the same bits.

With p = exp2(s - lse), the probabilities recomputed from the forward's log-sum-exp, and g the gradient
of out:

    delta_i = sum_d g_id out_id
    dq_i    = scale · sum_j p_ij (g_i·v_j - delta_i) k_j     one program per tile of queries, over the keys they see
    dv_j    = sum_i p_ij g_i                                 one program per tile of keys, over the queries that
    dk_j    = scale · sum_i p_ij (g_i·v_j - delta_i) q_i     see it

(Dao, FlashAttention-2, 2023, algorithm 2.) The kernel of dq comes first and leaves delta for the other: backward_dq.py,
backward_dkv.py, or what stands for them in hopper/. Users that fit into one tile have a kernel of their own, in
backward_short.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jagged_flash_attention.backward_dkv import launch_dkv
from kernels.jagged_flash_attention.backward_dq import launch_dq
from kernels.jagged_flash_attention.backward_short import launch_short_users
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.hopper.common import readable_by_tma
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.hopper.one_group.dkv import launch_one_group_dkv
from kernels.jagged_flash_attention.hopper.one_group.dq import launch_one_group_dq
from kernels.jagged_flash_attention.hopper.two_groups.dkv import launch_two_group_dkv
from kernels.jagged_flash_attention.hopper.two_groups.dq import launch_two_group_dq
from kernels.jagged_flash_attention.tuning import Tiles


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    short_users: Tensor | None,
    call: Call,
    tiles: Tiles,
    for_hopper: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous and in their shapes; `out` and `lse` as the forward gave them.

    Args:
        dout: `(L, H, D)`, contiguous in the last dimension; q, k, v as for the forward.
        query_tiles, key_tiles: `(entries, 8)`, of `tiles.dq.block_m` queries and of `tiles.dkv.block_n` keys.
        short_users: `(entries, 8)`, users of at most `tiles.short.block_m` tokens, which the other lists leave out;
            None: there are none.
        call: as for the forward.
        tiles: how to compute it.
        for_hopper: the kernels written for Hopper can do the call; the lists are made for those that `tiles` names.
        seed: `(1,)` int64, where there is dropout.
    """
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)

    for_dq, for_dkv = (tiles.hopper_dq, tiles.hopper_dkv) if for_hopper else (None, None)
    if for_dq is not None or for_dkv is not None:  # once for both
        dout, q, k, v = (readable_by_tma(x) for x in (dout, q, k, v))
    if for_dq is None:
        launch_dq(dout, q, k, v, out, lse, query_tiles, dq, delta, call, tiles.dq, seed)
    elif isinstance(for_dq, OneGroupConfig):
        launch_one_group_dq(dout, q, k, v, out, lse, query_tiles, dq, delta, call, for_dq)
    else:
        launch_two_group_dq(dout, q, k, v, out, lse, query_tiles, dq, delta, call, for_dq)
    if for_dkv is None:
        launch_dkv(dout, q, k, v, lse, delta, key_tiles, dk, dv, call, tiles.dkv, seed)
    elif isinstance(for_dkv, OneGroupConfig):
        launch_one_group_dkv(dout, q, k, v, lse, delta, key_tiles, dk, dv, call, for_dkv)
    else:
        launch_two_group_dkv(dout, q, k, v, lse, delta, key_tiles, dk, dv, call, for_dkv)
    if tiles.short is not None and short_users is not None and short_users.shape[0] > 0:
        launch_short_users(dout, q, k, v, out, lse, (dq, dk, dv), short_users, call, tiles.short, seed)
    return dq, dk, dv
