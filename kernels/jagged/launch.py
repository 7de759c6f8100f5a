"""What every launcher needs to know: where Triton can run, on which device, how large the grid, what TMA reads."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

# `@triton.jit` decides when it decorates whether a kernel is compiled or interpreted, so this is read once,
# while the modules with the kernels are being imported. Setting the variable later has no effect.
INTERPRETED: bool = knobs.runtime.interpret

LOG2_E = math.log2(math.e)
MAX_GRID = 2**31 - 1  # of the x dimension; y and z end at 65,535, which batch x heads would pass
MAX_ROW_STRIDE = 2**23  # elements: a tile of up to 256 rows is then addressed with int32
MAX_INT32 = 2**31 - 1


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
    if device.type == "cuda":
        return
    reason = unavailable_reason(device)
    if reason is not None:
        raise RuntimeError(reason)


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
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            return True
    return False


def interpretable(x: Tensor) -> Tensor:
    """bfloat16 as float32 where Triton interprets: its interpreter multiplies the bit patterns of bfloat16.

    A result is rounded to bfloat16 once, at the end, so the interpreter tests logic and not the rounding of
    intermediate values; float16, which it does multiply, and a GPU test that.
    """
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


class Descriptor(NamedTuple):
    """For Hopper's copy engine: reads blocks out of a matrix of 16-byte aligned rows, see `fits_copy_engine`.

    Has the fields of Triton's descriptors without their checks, which take the host longer than a short kernel runs;
    `checked` makes those.
    """

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any = None
    """Of a block on the chip: Gluon's kernels want to know."""

    padding: str = "zero"
    round_f32_to_tf32: bool = False

    def checked(self) -> TensorDescriptor | GluonDescriptor:
        """As Triton wants it where it compiles, and checks it."""
        if self.layout is None:
            return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape)
        return GluonDescriptor(self.base, self.shape, self.strides, self.block_shape, self.layout)


class Launcher:
    """Launches one kernel, without Triton's search for what it compiled, which takes the host 10 µs and more.

    `kernel[grid](...)` binds some 30 arguments by name and asks of each what a kernel is specialised on. Here the same
    questions make a short key, the arguments come in the order of the signature, and what is found is launched as
    Triton would. It is left to Triton to compile, to launch while anybody watches or debugs launches, and to interpret.

    The key holds what Triton specialises on: the device, compile-time constants and options; the dtype of a pointer and
    whether 16 divides it; whether an integer is 1, divisible by 16 or past int32; dtype, block and layout of a
    descriptor.

    Args:
        kernel: a function decorated with `triton.jit` or `gluon.jit`, whose arguments are, in this order: descriptors,
            tensors, integers, numbers, compile-time constants.
        option_names: of the compiler's options that a launch gives. `launch_pdl` is one: whether the kernel may begin
            before the one in front of it on the stream ends, if that one allows it.
    """

    def __init__(self, kernel: Any, *option_names: str) -> None:
        self.kernel = kernel
        self.option_names = option_names
        self._compiled: dict[tuple, CompiledKernel] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        descriptors: tuple[Descriptor | None, ...],
        tensors: tuple[Tensor, ...],
        integers: tuple[int, ...],
        numbers: tuple[int | float, ...],
        constants: tuple,
        options: tuple[int | None, ...],
    ) -> None:
        """Launch on the device of the tensors, on its current stream.

        Args:
            grid: programs in x, or in x and y.
            descriptors: None where the kernel doesn't read one.
            tensors: at least one; pointers to the kernel.
            integers: the kernel is specialised on some of their values.
            numbers: integers that it is not specialised on (`do_not_specialize`), and floats.
            constants: the kernel is compiled for.
            options: values of `option_names`.
        """
        if INTERPRETED:
            with _quiet_interpreter():
                self._launch_by_triton(grid, descriptors, tensors, integers, numbers, constants, options)
            return
        active = driver.active
        device = active.get_current_device()
        if tensors[0].get_device() != device:
            with torch.cuda.device(tensors[0].device):
                self(grid, descriptors, tensors, integers, numbers, constants, options)
            return
        if _is_watched(self.kernel):
            self._launch_by_triton(grid, descriptors, tensors, integers, numbers, constants, options)
            return
        pointers = [x.data_ptr() for x in tensors]
        key = (
            device,
            constants,
            options,
            *[x.dtype for x in tensors],
            functools.reduce(operator.or_, pointers) % 16 == 0 or tuple([x % 16 == 0 for x in pointers]),
            *[(17 if x % 16 else 16) if x != 1 and -MAX_INT32 <= x <= MAX_INT32 else x for x in integers],
            *[x.__class__ if x.__class__ is float or -MAX_INT32 <= x <= MAX_INT32 else "i64" for x in numbers],
            *[x if x is None else (x.base.dtype, *x.block_shape, x.layout) for x in descriptors],
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._launch_by_triton(grid, descriptors, tensors, integers, numbers, constants, options)
            if isinstance(compiled, CompiledKernel):
                self._compiled[key] = compiled
            return
        # As in `JITFunction.run`, which hands over the same arguments; tests compare the two.
        x, y = grid if len(grid) == 2 else (grid[0], 1)
        compiled.run(
            x, y, 1, active.get_current_stream(device), compiled.function, compiled.packed_metadata, None, None, None,
            *descriptors, *pointers, *integers, *numbers, *constants,
        )  # fmt: skip

    def _launch_by_triton(
        self,
        grid: tuple[int, ...],
        descriptors: tuple[Descriptor | None, ...],
        tensors: tuple[Tensor, ...],
        integers: tuple[int, ...],
        numbers: tuple[int | float, ...],
        constants: tuple,
        options: tuple[int | None, ...],
    ) -> Any:
        """The compiled kernel; None if it is interpreted."""
        checked = [x if x is None else x.checked() for x in descriptors]
        named = dict(zip(self.option_names, options, strict=True))
        return self.kernel[grid](*checked, *tensors, *integers, *numbers, *constants, **named)


def _is_watched(kernel: Any) -> bool:
    """Whether somebody wants to see launches, or kernels compiled in another way than usual."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    debugged = runtime.debug or runtime.add_stages_inspection_hook or knobs.compilation.instrumentation_mode
    return bool(debugged or kernel.pre_run_hooks)


def check_fields(config: Any, what: str, allowed: Mapping[str, Sequence[object]]) -> None:
    """ValueError that says what is allowed, if a field of a configuration has another value."""
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{what} with {name}={getattr(config, name)}; allowed are {listed(values)}")


def listed(values: Sequence[object]) -> str:
    """For messages."""
    if len(values) > 8:
        return f"{values[0]}, {values[1]} ... {values[-1]}"
    return ", ".join(map(str, values))


def next_power_of_2(x: int) -> int:
    """The least power of two that is not less; Triton's own takes 5 µs, so that kernels can call it too."""
    return 1 << (x - 1).bit_length()


def grid_of(tiles: Tensor, num_heads: int) -> tuple[int]:
    """One program per tile of the list and head, see MAX_GRID; ValueError past what CUDA can launch at once."""
    num_programs = tiles.shape[0] * num_heads
    if num_programs > MAX_GRID:
        raise ValueError(
            f"tiles x heads = {num_programs} passes CUDA's limit of {MAX_GRID} programs; use smaller batches"
        )
    return (num_programs,)


def readable_in_place(x: Tensor) -> bool:
    """Whether the kernels read this tensor of rows, `(L, C)` or `(L, H, D)`, as it lies."""
    row, *_, column = x.stride()
    return column == 1 and 0 <= row <= MAX_ROW_STRIDE


def readable(x: Tensor) -> Tensor:
    """A tensor of rows as kernels can read it; copied only if they can't read it as it lies."""
    x = interpretable(x)
    return x if readable_in_place(x) else x.contiguous()


def descriptors(*tensors: Tensor, block: int, wanted: bool) -> tuple[Descriptor | None, ...]:
    """For Hopper's copy engine: reads blocks of `block` rows of one head of `(L, H, D)` tensors.

    None for each, if this is not wanted or the engine can't read all of them as they lie.
    """
    made: list[Descriptor | None] = []
    for x in tensors:
        if not wanted or not _is_matrix_of_heads(x) or not fits_copy_engine(x):
            return (None,) * len(tensors)
        L, H, D = x.shape
        made.append(Descriptor(x, [L, H * D], [x.stride(0), 1], [block, D]))
    return tuple(made)


def _is_matrix_of_heads(x: Tensor) -> bool:
    """Whether heads follow each other in a row, and a head is as wide as a block on the chip."""
    L, _, D = x.shape
    return L > 0 and x.stride(1) == D and D & (D - 1) == 0


def fits_copy_engine(x: Tensor) -> bool:
    """Whether TMA can read `(L, H, D)` as a matrix of L rows, 16 bytes at a time."""
    _, H, D = x.shape
    row, head, column = x.stride()
    if column != 1 or row <= 0 or head <= 0 or (H - 1) * head + D > row:  # rows don't overlap: heads lie inside a row
        return False
    size = x.element_size()
    return row * size % 16 == 0 and head * size % 16 == 0 and x.data_ptr() % 16 == 0
