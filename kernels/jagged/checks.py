"""What is refused of operands and offsets, and how it is said."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kernels.jagged.launch import MAX_ROW_STRIDE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("ieee", "tf32")
CHECK_OFFSETS_VARIABLE = "KERNELS_CHECK_OFFSETS"


def check_operands(tensors: dict[str, Tensor], index_vectors: tuple[str, ...]) -> None:
    """That all are on one device, and all but the index vectors have one dtype that kernels take; ValueError.

    Args:
        tensors: by the names that messages use.
        index_vectors: names of those that hold offsets or numbers of tokens.
    """
    devices = {name: x.device for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; got {where}")
    dtypes = {name: x.dtype for name, x in tensors.items() if name not in index_vectors}
    if len(set(dtypes.values())) > 1 or next(iter(dtypes.values())) not in DTYPES:
        got = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"operands must share one dtype of {', '.join(map(str, DTYPES))}; got {got}")


def check_rows(name: str, x: Tensor, rows: int) -> None:
    """That a tensor has the rows of the schedule; ValueError."""
    if x.shape[0] != rows:
        raise ValueError(f"{name} has {x.shape[0]} rows, the schedule says {rows}: they must be equal")


def check_matrix(name: str, x: Tensor, rows: int) -> None:
    """That x is `(L, C)`, with the rows of the schedule; ValueError."""
    if x.dim() != 2 or x.shape[1] > MAX_ROW_STRIDE:
        raise ValueError(f"{name} must have shape (L, C) with C up to {MAX_ROW_STRIDE}, got {tuple(x.shape)}")
    check_rows(name, x, rows)


def check_precision(precision: str) -> None:
    """ValueError that says what is allowed."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_option(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    """ValueError that says what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    """A probability, and the seed of what is dropped; ValueError."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != device):
        raise ValueError(
            f"seed must be one int64 of shape (1,) on {device}, "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )


def check_index_vector(name: str, tensor: Tensor) -> None:
    """That it can be offsets or numbers of tokens; ValueError."""
    if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be one-dimensional int32 or int64, got shape {tuple(tensor.shape)} and {tensor.dtype}"
        )


def checks_values(device: torch.device) -> bool:
    """Whether values of offsets are looked at: always on a CPU; on CUDA, where it means waiting, only when asked."""
    return device.type != "cuda" or os.environ.get(CHECK_OFFSETS_VARIABLE) == "1"


def check_offsets(
    offsets: Tensor, max_seqlen: int, total: int, num_targets: Tensor | None = None, *, of_keys: bool = False
) -> None:
    """Check the values; ValueError says which user is wrong. Waits for the GPU.

    Args:
        offsets, max_seqlen, num_targets: as for `jagged_flash_attention`.
        total: rows that the offsets have to cover.
        of_keys: whether they are its `key_offsets` and `max_key_seqlen`, for the message.
    """
    name, limit = ("key_offsets", "max_key_seqlen") if of_keys else ("offsets", "max_seqlen")
    bounds = offsets.detach().to("cpu", torch.int64)
    lengths = bounds.diff()
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"{name} go from {int(bounds[0])} to {int(bounds[-1])}; they must go from 0 to the number of rows, {total}"
        )
    _raise_for_first(lengths < 0, lengths, f"{name} descend: user {{user}} would have {{value}} tokens")
    _raise_for_first(
        lengths > max_seqlen,
        lengths,
        f"user {{user}} has {{value}} {'keys' if of_keys else 'tokens'}, more than {limit}={max_seqlen}",
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
