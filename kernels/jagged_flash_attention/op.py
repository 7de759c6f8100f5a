"""The operator: checks, the torch.library custom ops with their gradient, and the public function."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kernels.jagged_flash_attention.backward import launch_backward
from kernels.jagged_flash_attention.forward import launch_forward
from kernels.jagged_flash_attention.launch import INTERPRETED, require_triton, unavailable_reason

__all__ = ["check_offsets", "jagged_flash_attention", "unavailable_reason"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 256)  # least and greatest
CHECK_OFFSETS_VARIABLE = "KERNELS_CHECK_OFFSETS"


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
    scale: float | None = None,
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

    Args:
        q, k, v: `(L, H, D)`, float32, float16 or bfloat16, 16 <= D <= 256. Slices of one projection are fine:
            any strides with a contiguous last dimension are read in place, others are copied.
        offsets: `(B + 1,)` int32 or int64 on the same device, ascending from 0 to L. Empty users are allowed.
        max_seqlen: at least the longest length in tokens; a host integer, so that nothing waits for the GPU.
        causal: whether history sees only what came before it.
        window: how many tokens history sees, itself included (on each side when not causal); None: all.
        num_targets: `(B,)` int32 or int64, candidates at the end of each user, between 0 and its length.
        scale: of the scores; None: D ** -0.5.

    Returns:
        `(L, H, D)`, contiguous, in the dtype of q. Scores, softmax and sums are float32 whatever that is, and
        float32 inputs are multiplied without TF32. The same inputs give the same bits, gradients included.

    Raises:
        ValueError: on shapes, dtypes, devices or numbers that don't fit. Values of `offsets` and
            `num_targets` are checked on a CPU, and on CUDA if KERNELS_CHECK_OFFSETS=1 (it waits for the GPU);
            otherwise, wrong ones on CUDA give undefined results, but touch no memory outside the tensors.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.

    FlashAttention-2 (Dao, 2023), on jagged sequences.
    """
    _check_inputs(q, k, v, offsets, max_seqlen, window, num_targets)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _forward_op(q, k, v, offsets, num_targets, max_seqlen, causal, window, scale)
    return out


def check_offsets(offsets: Tensor, max_seqlen: int, total: int, num_targets: Tensor | None = None) -> None:
    """Check the values; ValueError says which user is wrong. Waits for the GPU."""
    bounds = offsets.detach().to("cpu", torch.int64)
    lengths = bounds.diff()
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"offsets go from {int(bounds[0])} to {int(bounds[-1])}; they must go from 0 to the number of rows, {total}"
        )
    _raise_for_first(lengths < 0, lengths, "offsets descend: user {user} would have {value} tokens")
    _raise_for_first(
        lengths > max_seqlen,
        lengths,
        f"user {{user}} has {{value}} tokens, more than max_seqlen={max_seqlen}",
    )
    if num_targets is not None:
        targets = num_targets.detach().to("cpu", torch.int64)
        wrong = (targets < 0) | (targets > lengths)
        _raise_for_first(
            wrong,
            targets,
            "num_targets of user {user} is {value}; it must lie between 0 and the user's length",
        )


def _raise_for_first(wrong: Tensor, values: Tensor, message: str) -> None:
    if wrong.any():
        user = int(wrong.nonzero()[0])
        raise ValueError(message.format(user=user, value=int(values[user])))


def _check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seqlen: int,
    window: int | None,
    num_targets: Tensor | None,
) -> None:
    """Everything that can be known without looking at device memory."""
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must have one shape (tokens, heads, head_dim), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"q, k and v must share one dtype of {allowed}; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not HEAD_DIMS[0] <= q.shape[2] <= HEAD_DIMS[1]:
        raise ValueError(f"head_dim must be from {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {q.shape[2]}")
    if q.shape[1] < 1:
        raise ValueError("q, k and v must have at least one head, got 0")
    _check_index_vector("offsets", offsets)
    if offsets.shape[0] < 1:
        raise ValueError("offsets must have shape (users + 1,) and so at least one element, got none")
    if num_targets is not None:
        _check_index_vector("num_targets", num_targets)
        if num_targets.shape[0] != offsets.shape[0] - 1:
            raise ValueError(
                f"num_targets must have one element per user, {offsets.shape[0] - 1} by offsets; "
                f"got {num_targets.shape[0]}"
            )
    tensors = {"k": k, "v": v, "offsets": offsets, "num_targets": num_targets}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"all tensors must be on one device: q is on {q.device}, {name} on {tensor.device}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must be at least 0, got {max_seqlen}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token (or None for no window), got {window}")


def _check_index_vector(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be one-dimensional int32 or int64, got shape {tuple(tensor.shape)} and {tensor.dtype}"
        )


def _interpretable(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """bfloat16 as float32 where Triton interprets: its interpreter multiplies the bit patterns of bfloat16.

    The result is rounded to bfloat16 once, at the end, so the interpreter tests logic and not the rounding of
    bfloat16 probabilities; float16, which it does multiply, and a GPU test that.
    """
    if not INTERPRETED:
        return tensors
    return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)


@torch.library.custom_op("recsys_kernels::jagged_flash_attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    # Here and not in the public function, because under torch.compile that only ever sees fake tensors.
    if not offsets.is_cuda or os.environ.get(CHECK_OFFSETS_VARIABLE) == "1":
        check_offsets(offsets, max_seqlen, q.shape[0], num_targets)
    require_triton(q.device)
    offsets, num_targets, window = _normalise(offsets, num_targets, max_seqlen, window)
    q_, k_, v_ = _interpretable((q, k, v))
    out, lse = launch_forward(q_, k_, v_, offsets, num_targets, max_seqlen, causal, window, scale)
    return out.to(q.dtype), lse


@torch.library.custom_op("recsys_kernels::jagged_flash_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    offsets, num_targets, window = _normalise(offsets, num_targets, max_seqlen, window)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dout_, q_, k_, v_, out_ = _interpretable((dout, q, k, v, out))
    dq, dk, dv = launch_backward(dout_, q_, k_, v_, out_, lse, offsets, num_targets, max_seqlen, causal, window, scale)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _normalise(
    offsets: Tensor, num_targets: Tensor | None, max_seqlen: int, window: int | None
) -> tuple[Tensor, Tensor | None, int | None]:
    """Contiguous index vectors; no window where it is too wide to hide anything."""
    if num_targets is not None:
        num_targets = num_targets.contiguous()
    return offsets.contiguous(), num_targets, None if window is None or window >= max_seqlen else window


@_forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    L, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((H, L), dtype=torch.float32)


@_backward_op.register_fake
def _backward_fake(dout: Tensor, q: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, offsets, num_targets, *options = inputs
    out, lse = output
    ctx.set_materialize_grads(False)  # the log-sum-exp is not public: don't make zeros for its gradient
    ctx.save_for_backward(q, k, v, out, lse, offsets, num_targets)
    ctx.options = options  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _backward_op(dout, *ctx.saved_tensors, *ctx.options)  # type: ignore[attr-defined]
    return (dq, dk, dv, *[None] * 6)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
