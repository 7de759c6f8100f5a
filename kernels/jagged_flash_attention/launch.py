"""What every launcher needs to know: where Triton can run, on which device, and how large the grid is."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

# `@triton.jit` decides when it decorates whether a kernel is compiled or interpreted, so this is read once,
# while the modules with the kernels are being imported. Setting the variable later has no effect.
INTERPRETED: bool = triton.knobs.runtime.interpret

MAX_GRID = 2**31 - 1  # of the x dimension; y and z end at 65,535, which batch x heads would pass


def unavailable_reason(device: torch.device | str) -> str | None:
    """Why the kernels can't run on this device, in plain words; None when they can."""
    if torch.device(device).type == "cuda" or INTERPRETED:
        return None
    return (
        f"a Triton kernel needs CUDA tensors, these are on {torch.device(device).type!r}; to interpret it on "
        "a CPU (slow, for tests) set TRITON_INTERPRET=1 before Python starts"
    )


def require_triton(device: torch.device) -> None:
    """RuntimeError where the kernels can't run."""
    reason = unavailable_reason(device)
    if reason is not None:
        raise RuntimeError(reason)


@contextlib.contextmanager
def launch_on(device: torch.device) -> Iterator[None]:
    """Make `device` current, since that is where Triton launches."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if INTERPRETED:  # NumPy warns of 0 / 0 in rows past a user's end, which are computed and never stored
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", RuntimeWarning)
        yield


@dataclass(frozen=True)
class LaunchShape:
    """A grid of one program per (user, head, tile of a user), tiles next to each other.

    The host knows the longest length only, so a short user's tiles past its end start and return at once.
    """

    num_users: int
    num_heads: int
    max_seqlen: int

    def num_tiles(self, block: int) -> int:
        """Tiles of the longest user."""
        return triton.cdiv(self.max_seqlen, block)

    def grid(self, block: int) -> tuple[int]:
        """One-dimensional, see MAX_GRID."""
        return checked_grid(self.num_users * self.num_heads * self.num_tiles(block))


def checked_grid(num_programs: int) -> tuple[int]:
    """The grid as a tuple; ValueError past what CUDA can launch at once."""
    if num_programs > MAX_GRID:
        raise ValueError(
            f"users x heads x tiles of the longest user = {num_programs} passes CUDA's limit of {MAX_GRID} "
            "programs; use smaller batches"
        )
    return (num_programs,)
