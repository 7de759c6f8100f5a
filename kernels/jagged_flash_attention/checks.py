"""What is refused, and how it is said: shapes, dtypes, devices and numbers that don't fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.jagged.checks import DTYPES, check_index_vector

if TYPE_CHECKING:
    from kernels.jagged.schedule import Schedule

HEAD_DIMS = (16, 256)  # least and greatest
SCHEDULE_FACTS = (
    "users", "total", "max_seqlen", "num_targets given", "key_offsets given", "total_keys", "max_key_seqlen", "device",
)  # fmt: skip


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    num_targets: Tensor | None,
    key_offsets: Tensor | None,
    max_key_seqlen: int | None,
) -> None:
    """Everything about tensors and mask that can be known without looking at device memory; ValueError."""
    _check_qkv(q, k, v, is_cross=key_offsets is not None)
    check_index_vector("offsets", offsets)
    if offsets.shape[0] < 1:
        raise ValueError("offsets must have shape (users + 1,) and so at least one element, got none")
    if num_targets is not None:
        check_index_vector("num_targets", num_targets)
        if num_targets.shape[0] != offsets.shape[0] - 1:
            raise ValueError(
                f"num_targets must have one element per user, {offsets.shape[0] - 1} by offsets; "
                f"got {num_targets.shape[0]}"
            )
    if key_offsets is not None:
        check_index_vector("key_offsets", key_offsets)
        if key_offsets.shape != offsets.shape:
            raise ValueError(
                f"key_offsets must be of the same users as offsets, shape {tuple(offsets.shape)}; "
                f"got {tuple(key_offsets.shape)}"
            )
        if causal or window is not None or num_targets is not None:
            raise ValueError(
                "cross attention (key_offsets) has no causal mask, window or num_targets: every query sees all keys of "
                "its user; pass causal=False"
            )
    if (key_offsets is None) != (max_key_seqlen is None):
        raise ValueError("key_offsets and max_key_seqlen belong together: give both, or none for self attention")
    device = q.device
    for tensor in (k, v, offsets, num_targets, key_offsets):
        if tensor is not None and tensor.device != device:
            tensors = {"k": k, "v": v, "offsets": offsets, "num_targets": num_targets, "key_offsets": key_offsets}
            name = next(name for name, x in tensors.items() if x is tensor)
            raise ValueError(f"all tensors must be on one device: q is on {device}, {name} on {tensor.device}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must be at least 0, got {max_seqlen}")
    if max_key_seqlen is not None and max_key_seqlen < 0:
        raise ValueError(f"max_key_seqlen must be at least 0, got {max_key_seqlen}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token (or None for no window), got {window}")


def check_schedule(
    schedule: Schedule,
    q: Tensor,
    k: Tensor,
    offsets: Tensor,
    max_seqlen: int,
    num_targets: Tensor | None,
    key_offsets: Tensor | None,
    max_key_seqlen: int | None,
) -> None:
    """That it was made for these arguments, as far as the host can tell; ValueError."""
    (own, total, longest), (_, total_keys, longest_keys) = schedule.queries, schedule.keys
    made_for = (
        schedule.num_users, total, longest, schedule.num_targets is not None, schedule.is_cross, total_keys,
        longest_keys, own.device,
    )  # fmt: skip
    called_with = (
        offsets.shape[0] - 1, q.shape[0], max_seqlen, num_targets is not None, key_offsets is not None, k.shape[0],
        max_seqlen if max_key_seqlen is None else max_key_seqlen, offsets.device,
    )  # fmt: skip
    if made_for == called_with:
        return
    for name, own_fact, fact in zip(SCHEDULE_FACTS, made_for, called_with, strict=True):
        if own_fact != fact:
            raise ValueError(
                f"the schedule is not of this batch: it was made for {name} = {own_fact}, the call has {fact}"
            )


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, is_cross: bool) -> None:
    shape_q, shape_k, shape_v, dtype = q.shape, k.shape, v.shape, q.dtype
    if len(shape_q) != 3 or len(shape_k) != 3 or shape_v != shape_k or shape_q[2] != shape_k[2]:
        raise ValueError(
            "q must have shape (tokens, heads, head_dim), k and v one shape (tokens, heads or a divisor, head_dim), "
            f"got {tuple(shape_q)}, {tuple(shape_k)} and {tuple(shape_v)}"
        )
    (tokens, num_heads, head_dim), (num_keys, num_kv_heads, _) = shape_q, shape_k
    if not is_cross and num_keys != tokens:
        raise ValueError(
            "q, k and v must have as many tokens, or key_offsets must say whose they are; "
            f"got {tuple(shape_q)}, {tuple(shape_k)} and {tuple(shape_v)}"
        )
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"q, k and v must share one dtype of {allowed}; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        raise ValueError(f"head_dim must be from {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {head_dim}")
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError("q, k and v must have at least one head, got 0")
    if num_heads % num_kv_heads:
        raise ValueError(f"the {num_heads} heads of q must be a multiple of the {num_kv_heads} heads of k and v")
