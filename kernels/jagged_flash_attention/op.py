"""The operator: the torch.library custom ops with their gradient, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.jagged_flash_attention.backward import launch_backward
from kernels.jagged_flash_attention.checks import check_inputs, check_options, check_schedule
from kernels.jagged_flash_attention.forward import launch_forward
from kernels.jagged_flash_attention.hopper_forward import BLOCK as HOPPER_BLOCK
from kernels.jagged_flash_attention.hopper_forward import launch_hopper_forward, supports
from kernels.jagged_flash_attention.launch import INTERPRETED, Call, is_traced, readable_in_place, require_triton
from kernels.jagged_flash_attention.schedule import Schedule
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
            a contiguous last dimension are read in place, others are copied.
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
    check_options(q, dropout_p, seed, precision)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0.0:  # the kernels want a positive one
        q, scale = q * (-1.0 if scale < 0.0 else 0.0), abs(scale) or 1.0
    q, k, v = (x if readable_in_place(x) else x.contiguous() for x in (q, k, v))
    if window is not None and window >= max_seqlen:
        window = None  # too wide to hide anything
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**62, (1,), device=q.device)
    if schedule is None:
        schedule = Schedule(
            offsets, q.shape[0], max_seqlen, num_targets=num_targets,
            key_offsets=key_offsets, total_keys=None if key_offsets is None else k.shape[0],
            max_key_seqlen=max_key_seqlen, check_values=True,
        )  # fmt: skip
    else:
        check_schedule(schedule, q, k, offsets, max_seqlen, num_targets, key_offsets, max_key_seqlen)
    require_triton(q.device)
    longest = max(max_seqlen, max_key_seqlen or 0)
    tiles = choose_tiles(q.shape[-1], q.dtype, q.device, longest, causal)
    for_hopper = key_offsets is None and supports(q, window, dropout_p)
    blocks = _blocks(tiles, for_hopper)
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # Without a gradient only the first list is needed.
    lists = schedule.for_training(*blocks, causal) if has_gradient else schedule.query_tiles(blocks[:1], causal) * 4
    arguments = (
        q, k, v, *lists, seed, list(blocks), longest, for_hopper,
        causal, window, num_targets is not None, scale, dropout_p, precision,
    )  # fmt: skip
    if is_traced(q, k, v, offsets):
        out, _ = _forward_op(*arguments)
        return out
    out = _Attention.apply(*arguments)
    assert isinstance(out, Tensor)
    return out


def _blocks(tiles: Tiles, for_hopper: bool) -> tuple[int, int, int, int]:
    """Rows of a tile on the lists of the forward, of dq, of dk and dv, and of short users; 0: there is no such list."""
    forward = HOPPER_BLOCK if for_hopper and tiles.hopper_forward is not None else tiles.forward.block_m
    dq = HOPPER_BLOCK if for_hopper and tiles.hopper_dq is not None else tiles.dq.block_m
    dkv = HOPPER_BLOCK if for_hopper and tiles.hopper_dkv is not None else tiles.dkv.block_n
    return forward, dq, dkv, 0 if tiles.short is None else tiles.short.block_m


def _chosen_tiles(q: Tensor, blocks: list[int], longest: int, for_hopper: bool, causal: bool) -> Tiles:
    """The tiles that the lists were made for.

    Raises:
        ValueError: a program that was traced elsewhere, where other tiles were chosen.
    """
    tiles = choose_tiles(q.shape[-1], q.dtype, q.device, longest, causal)
    if list(_blocks(tiles, for_hopper)) != list(blocks):
        raise ValueError(
            f"this program was traced with tiles of {blocks} rows, for another GPU or tuning; here they have "
            f"{list(_blocks(tiles, for_hopper))}: trace it again"
        )
    return tiles


def _interpretable(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """bfloat16 as float32 where Triton interprets: its interpreter multiplies the bit patterns of bfloat16.

    The result is rounded to bfloat16 once, at the end, so the interpreter tests logic and not the rounding of
    bfloat16 probabilities; float16, which it does multiply, and a GPU test that.
    """
    if not INTERPRETED:
        return tensors
    return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)


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
    call = Call(causal, window, has_targets, scale, dropout_p, precision)
    tiles = _chosen_tiles(q, blocks, longest, for_hopper, causal)
    if for_hopper and tiles.hopper_forward is not None:
        return launch_hopper_forward(q, k, v, forward_tiles, call, tiles.hopper_forward)
    q_, k_, v_ = _interpretable((q, k, v))
    out, lse = launch_forward(q_, k_, v_, forward_tiles, call, tiles.forward, seed)
    return out.to(q.dtype), lse


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
    call = Call(causal, window, has_targets, scale, dropout_p, precision)
    tiles = _chosen_tiles(q, blocks, longest, for_hopper, causal)
    dout = dout if readable_in_place(dout) else dout.contiguous()
    dout_, q_, k_, v_, out_ = _interpretable((dout, q, k, v, out))
    dq, dk, dv = launch_backward(
        dout_, q_, k_, v_, out_, lse, dq_tiles, dkv_tiles, short_users, call, tiles, for_hopper, seed
    )
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _forward_tiles, dq_tiles, dkv_tiles, short_users, seed, *options = inputs
    ctx.save_for_backward(q, k, v, *output, dq_tiles, dkv_tiles, short_users, seed)
    ctx.options = options


class _Attention(torch.autograd.Function):
    """Forward and backward without an operator in between."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, lse = _forward(*inputs)
        _save(ctx, inputs, (out, lse))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward_op if is_traced(dout) else _backward
        return (*run(dout, *ctx.saved_tensors, *ctx.options), *[None] * 14)


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
    _save(ctx, inputs, output)


def _op_backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_op(dout, *ctx.saved_tensors, *ctx.options), *[None] * 14)


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
