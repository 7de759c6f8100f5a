"""The operator: the torch.library custom ops with their gradient, and the public function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from kernels.jagged.checks import check_dropout, check_precision
from kernels.jagged.launch import INTERPRETED, interpretable, is_traced, readable_in_place, require_triton
from kernels.jagged.schedule import ListSpec, Schedule, make_lists, training_specs
from kernels.jagged_flash_attention.backward import launch_backward
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.checks import check_inputs, check_schedule
from kernels.jagged_flash_attention.forward import empty_lse, launch_forward
from kernels.jagged_flash_attention.hopper.common import readable_by_tma, supports
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.hopper.one_group.forward import launch_one_group_forward
from kernels.jagged_flash_attention.hopper.two_groups.forward import launch_two_group_forward
from kernels.jagged_flash_attention.tuning import Tiles, choose_tiles


def jagged_flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    window: int | None = None,
    num_targets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    max_key_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    precision: str = "ieee",
    schedule: Schedule | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v over sequences packed one after another, with gradients for q, k and v.

    User b owns rows offsets[b] ... offsets[b + 1] of q, k and v, and attends to those only. Its last
    num_targets[b] rows are candidates, the ones before history. History query i sees history key j if j <= i
    (`causal`) and |i - j| < `window`; a candidate sees the whole history and itself. For 4 history tokens and
    2 candidates (1 = visible):

        causal        causal, window=2   not causal
        1 0 0 0 0 0   1 0 0 0 0 0        1 1 1 1 0 0
        1 1 0 0 0 0   1 1 0 0 0 0        1 1 1 1 0 0
        1 1 1 0 0 0   0 1 1 0 0 0        1 1 1 1 0 0
        1 1 1 1 0 0   0 0 1 1 0 0        1 1 1 1 0 0
        1 1 1 1 1 0   1 1 1 1 1 0        1 1 1 1 1 0   candidate
        1 1 1 1 0 1   1 1 1 1 0 1        1 1 1 1 0 1   candidate

    With `key_offsets` it is cross attention: the keys of user b are rows key_offsets[b] ... key_offsets[b + 1] of k
    and v, and each of its queries sees all of them; the output of a user without keys is zero.

    Args:
        q: `(L, H, D)`, float32, float16 or bfloat16, 16 <= D <= 256.
        k, v: `(L, H / G, D)`, in cross attention `(keys, H / G, D)`: key head i serves the query heads i G to
            i G + G - 1 (grouped queries; G = 1 in the usual case). Slices of one projection are fine: any strides with
            a contiguous last dimension are read in place, others are copied. Kernels for Hopper also need a copy of
            what TMA can't read: strides that are no multiples of 16 bytes, heads that don't lie inside their row.
        offsets: `(B + 1,)` int32 or int64 on the same device, ascending from 0 to L. Empty users are allowed.
        max_seqlen: at least the longest length in tokens; a host integer, so that nothing waits for the GPU.
        causal: whether history sees only what came before it.
        window: how many tokens history sees, itself included (on each side when not causal); None: all.
        num_targets: `(B,)` int32 or int64, candidates at the end of each user, between 0 and its length.
        key_offsets, max_key_seqlen: as offsets and max_seqlen, of the keys, for cross attention. Then causal must be
            False, window and num_targets None.
        scale: of the scores; None: D ** -0.5.
        dropout_p: probability, 0 <= p < 1, of dropping a pair of query and key after the softmax.
        seed: `(1,)` int64 on the same device: the dropped pairs follow from it (`dropout_mask`). None: drawn from
            torch's generator of the device.
        precision: of float32 products: "ieee", or "tf32" for tensor cores with 10 bits of mantissa.
        schedule: of these offsets, targets and key offsets; one for all layers of a batch. None: made here, so that it
            serves this call and its backward.

    Returns:
        `(L, H, D)`, contiguous, in the dtype of q. Scores, softmax and sums are float32 whatever that is. The same
        inputs give the same bits, gradients included.

    Raises:
        ValueError: on shapes, dtypes, devices or numbers that don't fit. Values of `offsets`, `key_offsets` and
            `num_targets` are checked on a CPU, and on CUDA if KERNELS_CHECK_OFFSETS=1 (it waits for the GPU), unless a
            `schedule` made without `check_values` is given; wrong ones that nobody checked give undefined results, but
            touch no memory outside the tensors.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.

    FlashAttention-2 (Dao, 2023), on jagged sequences.
    """
    check_inputs(q, k, v, offsets, max_seqlen, causal, window, num_targets, key_offsets, max_key_seqlen)
    check_dropout(dropout_p, seed, q.device)
    check_precision(precision)
    head_dim = q.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0.0:  # the kernels want a positive one
        q, scale = q * (-1.0 if scale < 0.0 else 0.0), abs(scale) or 1.0
    q = q if readable_in_place(q) else q.contiguous()
    k = k if readable_in_place(k) else k.contiguous()
    v = v if readable_in_place(v) else v.contiguous()
    if window is not None and window >= max_seqlen:
        window = None  # too wide to hide anything
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**62, (1,), device=q.device)
    if schedule is not None:
        check_schedule(schedule, q, k, offsets, max_seqlen, num_targets, key_offsets, max_key_seqlen)
    device, dtype, is_cross = q.device, q.dtype, key_offsets is not None
    require_triton(device)
    longest = max_seqlen if max_key_seqlen is None else max(max_seqlen, max_key_seqlen)
    # Without a gradient only the first list is needed.
    has_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    mask = (causal, window, num_targets is not None)
    if is_traced(q, k, v, offsets):
        if schedule is None:
            schedule = Schedule(
                offsets, q.shape[0], max_seqlen, num_targets=num_targets,
                key_offsets=key_offsets, total_keys=k.shape[0] if is_cross else None, max_key_seqlen=max_key_seqlen,
                check_values=True,
            )  # fmt: skip
        for_hopper = not is_cross and supports(head_dim, dtype, window, dropout_p)
        blocks = _blocks(choose_tiles(head_dim, dtype, device, longest, causal), for_hopper)
        made = schedule.for_training(*blocks, causal) if has_gradient else schedule.query_tiles(blocks[:1], causal) * 4
        options = (list(blocks), longest, for_hopper, *mask, scale, dropout_p, precision)
        out, _ = _forward_op(q, k, v, *made, seed, *options)
        return out
    plan = _plan(choose_tiles, head_dim, dtype, device, longest, is_cross, *mask, float(scale), dropout_p, precision)
    if plan.uses_copy_engine:  # here, so that the forward and both kernels of the backward read the same copy
        q, k, v = readable_by_tma(q), readable_by_tma(k), readable_by_tma(v)
    specs = plan.specs if has_gradient else plan.specs[:1]
    if schedule is not None:
        lists = schedule.lists(specs)
    else:
        keys = None if key_offsets is None or max_key_seqlen is None else (key_offsets, k.shape[0], max_key_seqlen)
        lists = make_lists((offsets, q.shape[0], max_seqlen), keys, num_targets, specs, check_values=True)
    # Autograd would have nothing to record; only forward derivatives and torch.func are for it to refuse.
    if not has_gradient and forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return _run_forward(q, k, v, lists[0], seed, plan, None)
    out = _Attention.apply(q, k, v, (lists, seed), plan)
    assert isinstance(out, Tensor)
    return out


class Plan(NamedTuple):
    """How a call is computed. Nothing of its batch is in it: one serves all layers and steps."""

    call: Call
    tiles: Tiles
    blocks: tuple[int, int, int, int]
    """See `_blocks`."""

    specs: tuple[ListSpec, ...]
    """The lists of a forward and its backward, that of the forward first."""

    longest: int
    for_hopper: bool
    """The kernels written for Hopper can do the call."""

    uses_copy_engine: bool
    """One of them does, and reads what TMA can read only."""

    def options(self) -> tuple[Any, ...]:
        """What the operators are told."""
        call = self.call
        mask = (call.causal, call.window, call.has_targets)
        return list(self.blocks), self.longest, self.for_hopper, *mask, call.scale, call.dropout_p, call.precision


@functools.lru_cache(maxsize=4096)
def _plan(
    choose: Callable[..., Tiles],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    is_cross: bool,
    causal: bool,
    window: int | None,
    has_targets: bool,
    scale: float,
    dropout_p: float,
    precision: str,
) -> Plan:
    """Of eager calls, which ask in every layer and step."""
    tiles = choose(head_dim, dtype, device, longest, causal)
    for_hopper = not is_cross and supports(head_dim, dtype, window, dropout_p)
    blocks = _blocks(tiles, for_hopper)
    call = Call(causal, window, has_targets, scale, dropout_p, precision)
    of_hopper = (tiles.hopper_forward, tiles.hopper_dq, tiles.hopper_dkv)
    uses_copy_engine = for_hopper and any(config is not None for config in of_hopper)
    specs = training_specs(*blocks, causal, is_cross)
    return Plan(call, tiles, blocks, specs, longest, for_hopper, uses_copy_engine)


def _blocks(tiles: Tiles, for_hopper: bool) -> tuple[int, int, int, int]:
    """Rows of a tile on the lists of the forward, of dq, of dk and dv, and of short users; 0: there is no such list."""
    forward, dq, dkv = tiles.forward.block_m, tiles.dq.block_m, tiles.dkv.block_n
    if for_hopper:
        forward = forward if tiles.hopper_forward is None else tiles.hopper_forward.block
        dq = dq if tiles.hopper_dq is None else tiles.hopper_dq.block
        dkv = dkv if tiles.hopper_dkv is None else tiles.hopper_dkv.block
    return forward, dq, dkv, 0 if tiles.short is None else tiles.short.block_m


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, query_tiles: Tensor, seed: Tensor | None, plan: Plan, lse: Tensor | None
) -> Tensor:
    """Output, and `lse` is written, if somebody wants it."""
    call, tiles = plan.call, plan.tiles
    config = tiles.hopper_forward if plan.for_hopper else None
    if isinstance(config, OneGroupConfig):
        return launch_one_group_forward(q, k, v, query_tiles, call, config, lse)
    if config is not None:
        return launch_two_group_forward(q, k, v, query_tiles, call, config, lse)
    dtype = q.dtype
    if INTERPRETED:
        q, k, v = map(interpretable, (q, k, v))
    out = launch_forward(q, k, v, query_tiles, call, tiles.forward, lse, seed)
    return out.to(dtype) if INTERPRETED else out


def _run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq_tiles: Tensor,
    dkv_tiles: Tensor,
    short_users: Tensor | None,
    seed: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dout = dout if readable_in_place(dout) else dout.contiguous()
    dtype = q.dtype
    if INTERPRETED:
        dout, q, k, v, out = map(interpretable, (dout, q, k, v, out))
    dq, dk, dv = launch_backward(
        dout, q, k, v, out, lse, dq_tiles, dkv_tiles, short_users, plan.call, plan.tiles, plan.for_hopper, seed
    )
    return (dq.to(dtype), dk.to(dtype), dv.to(dtype)) if INTERPRETED else (dq, dk, dv)


class _Attention(torch.autograd.Function):
    """Forward and backward without an operator in between."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, batch: tuple[list[Tensor], Tensor | None], plan: Plan
    ) -> Tensor:
        lists, seed = batch
        lse = empty_lse(q)
        out = _run_forward(q, k, v, lists[0], seed, plan, lse)
        ctx.save_for_backward(q, k, v, out, lse, *lists[1:], seed)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, dq_tiles, dkv_tiles, *short, seed = ctx.saved_tensors
        if is_traced(dout):
            lists = (dq_tiles, dkv_tiles, short[0] if short else dq_tiles[:0])
            gradients = _backward_op(dout, q, k, v, out, lse, *lists, seed, *ctx.plan.options())
        else:
            short_users = short[0] if short else None
            gradients = _run_backward(dout, q, k, v, out, lse, dq_tiles, dkv_tiles, short_users, seed, ctx.plan)
        return *gradients, None, None


# The same as operators, for whoever records them


def _plan_of_traced(q: Tensor, blocks: list[int], longest: int, for_hopper: bool, *call: Any) -> Plan:
    """The plan that the lists were made for.

    Raises:
        ValueError: a program that was traced elsewhere, where other tiles were chosen.
    """
    is_cross = False  # only what lists are asked for depends on it
    plan = _plan(choose_tiles, q.shape[-1], q.dtype, q.device, longest, is_cross, *call)
    chosen = _blocks(plan.tiles, for_hopper)
    if list(chosen) != list(blocks):
        raise ValueError(
            f"this program was traced with tiles of {blocks} rows, for another GPU or tuning; here they have "
            f"{list(chosen)}: trace it again"
        )
    return plan._replace(for_hopper=for_hopper, uses_copy_engine=plan.uses_copy_engine and for_hopper)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_tiles: Tensor,
    dq_tiles: Tensor,
    dkv_tiles: Tensor,
    short_users: Tensor,
    seed: Tensor | None,
    blocks: list[int],
    longest: int,
    for_hopper: bool,
    causal: bool,
    window: int | None,
    has_targets: bool,
    scale: float,
    dropout_p: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    call = (causal, window, has_targets, scale, dropout_p, precision)
    plan = _plan_of_traced(q, blocks, longest, for_hopper, *call)
    if plan.uses_copy_engine:
        q, k, v = readable_by_tma(q), readable_by_tma(k), readable_by_tma(v)
    lse = empty_lse(q)
    return _run_forward(q, k, v, forward_tiles, seed, plan, lse), lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq_tiles: Tensor,
    dkv_tiles: Tensor,
    short_users: Tensor,
    seed: Tensor | None,
    blocks: list[int],
    longest: int,
    for_hopper: bool,
    causal: bool,
    window: int | None,
    has_targets: bool,
    scale: float,
    dropout_p: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan_of_traced(q, blocks, longest, for_hopper, causal, window, has_targets, scale, dropout_p, precision)
    return _run_backward(dout, q, k, v, out, lse, dq_tiles, dkv_tiles, short_users, seed, plan)


_forward_op = torch.library.custom_op("recsys_kernels::jagged_flash_attention", _forward, mutates_args=())
_backward_op = torch.library.custom_op("recsys_kernels::jagged_flash_attention_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _forward_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    L, H, _D = q.shape
    return q.new_empty(q.shape), q.new_empty((H, L), dtype=torch.float32)


@_backward_op.register_fake
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # the log-sum-exp is not public: don't make zeros for its gradient
    q, k, v, _forward_tiles, dq_tiles, dkv_tiles, short_users, seed, *options = inputs
    ctx.save_for_backward(q, k, v, *output, dq_tiles, dkv_tiles, short_users, seed)
    ctx.options = options


def _op_backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_op(dout, *ctx.saved_tensors, *ctx.options), *[None] * 14)


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
