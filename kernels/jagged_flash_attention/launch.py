"""What every launcher needs to know: where Triton can run, on which device, what is asked for, how large the grid."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.tools.tensor_descriptor import TensorDescriptor

# `@triton.jit` decides when it decorates whether a kernel is compiled or interpreted, so this is read once,
# while the modules with the kernels are being imported. Setting the variable later has no effect.
INTERPRETED: bool = triton.knobs.runtime.interpret

LOG2_E = math.log2(math.e)
MAX_GRID = 2**31 - 1  # of the x dimension; y and z end at 65,535, which batch x heads would pass
MAX_ROW_STRIDE = 2**23  # elements: a tile of up to 256 rows is then addressed with int32


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


def launch_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current, since that is where Triton launches."""
    if INTERPRETED:
        return _quiet_interpreter()
    if torch.cuda.current_device() == device.index:  # the usual case, in a fraction of the time
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@contextlib.contextmanager
def _quiet_interpreter() -> Iterator[None]:
    """Without NumPy's warnings of 0 / 0 in rows past a user's end, which are computed and never stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def is_traced(*tensors: Tensor) -> bool:
    """Whether somebody records operators (torch.compile, torch.export, fake tensors, a counter of FLOPs).

    Only then do calls have to go through `torch.library` operators, which cost the host more than a short kernel takes.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)


@dataclass(frozen=True)
class Call:
    """Mask, scale and dropout of one call, as the kernels take them."""

    causal: bool
    window: int | None
    has_targets: bool
    scale: float
    """Positive."""

    dropout_p: float = 0.0
    seed: Tensor | None = None
    """`(1,)` int64 on the device, where there is dropout."""

    precision: str = "ieee"
    """Of float32 products: `ieee` or `tf32`."""

    @property
    def scale_log2(self) -> float:
        """Brings scores to base 2."""
        return self.scale * LOG2_E

    @property
    def drop_below(self) -> int:
        """A pair is dropped if its 32 random bits are below."""
        return int(self.dropout_p * 2**32)

    @property
    def keep_scale(self) -> float:
        """What the probabilities that are kept are multiplied with."""
        return 1.0 / (1.0 - self.dropout_p)

    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        return {
            "CAUSAL": self.causal,
            "HAS_WINDOW": self.window is not None,
            "HAS_TARGETS": self.has_targets,
            "DROPOUT": self.dropout_p > 0.0,
            "PRECISION": self.precision,
        }


def grid_of(tiles: Tensor, num_heads: int) -> tuple[int]:
    """One program per tile of the list and head, see MAX_GRID; ValueError past what CUDA can launch at once."""
    num_programs = tiles.shape[0] * num_heads
    if num_programs > MAX_GRID:
        raise ValueError(
            f"tiles x heads = {num_programs} passes CUDA's limit of {MAX_GRID} programs; use smaller batches"
        )
    return (num_programs,)


def readable_in_place(x: Tensor) -> bool:
    """Whether the kernels read this `(L, H, D)` tensor as it lies."""
    return x.stride(-1) == 1 and 0 <= x.stride(0) <= MAX_ROW_STRIDE


def descriptors(*tensors: Tensor, block: int, wanted: bool) -> Sequence[Tensor | TensorDescriptor]:
    """For Hopper's copy engine: reads blocks of `block` rows of one head of `(L, H, D)` tensors.

    The tensors themselves, if this is not wanted or the engine can't read all of them as they lie.
    """
    if not wanted or not all(_is_matrix_of_heads(x) and fits_copy_engine(x) for x in tensors):
        return tensors
    return [
        TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [block, x.shape[2]])
        for x in tensors
    ]


def _is_matrix_of_heads(x: Tensor) -> bool:
    """Whether heads follow each other in a row, and a head is as wide as a block on the chip."""
    L, _, D = x.shape
    return L > 0 and x.stride(1) == D and triton.next_power_of_2(D) == D


def fits_copy_engine(x: Tensor) -> bool:
    """Whether TMA can read `(L, H, D)` as a matrix of L rows, 16 bytes at a time."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    is_aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides)
    last_column = (x.shape[1] - 1) * x.stride(1) + x.shape[2]  # rows must not overlap: heads lie inside a row
    return is_aligned and x.stride(-1) == 1 and last_column <= x.stride(0)
