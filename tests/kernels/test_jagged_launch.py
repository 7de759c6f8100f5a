"""What the launcher finds again is what Triton would have launched, with the same arguments."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget

from kernels.jagged.launch import Descriptor, Launcher, _is_watched, descriptors
from kernels.jagged_flash_attention import jagged_flash_attention
from tests.conftest import INTERPRETED
from tests.kernels.jagged_cases import Case, with_gradients

compiled_only = pytest.mark.skipif(INTERPRETED, reason="a test of this file runs it without the interpreter")


@pytest.mark.skipif(not INTERPRETED, reason="they run here")
def test_this_file_passes_without_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]


@triton.jit(do_not_specialize=["n", "limit"])
def add_kernel(
    desc, p_x, p_out, stride, n, limit, scale, BLOCK: tl.constexpr, HAS_DESC: tl.constexpr, KINDS: tl.constexpr
):
    o = tl.arange(0, BLOCK)
    x = tl.load(p_x + o * stride, mask=o < n) * scale
    if HAS_DESC:
        x += tl.sum(desc.load([0, 0]).to(tl.float32))
    tl.store(p_out + o, x + KINDS[0] + limit, mask=o < n)


class Recorder:
    """A driver without a GPU, and the launcher of each kernel: keeps what it is given."""

    def __init__(self) -> None:
        self.target = GPUTarget("cuda", 90, 32)
        self.device = -1  # where CPU tensors are
        self.num_loaded = 0
        self.launches: list[tuple[Any, ...]] = []
        self.are_dependent: list[bool] = []  # of the launches: `launch_pdl`
        self.utils = self
        self.launcher_cls = lambda source, metadata: functools.partial(self.launch, metadata.launch_pdl)

    def launch(self, is_dependent: bool, *args: Any) -> None:
        self.are_dependent.append(is_dependent)
        *_, launch_metadata, enter, leave = args[:9]
        if enter is not None:
            enter(launch_metadata)
        self.launches.append(args[:6] + args[9:])
        if leave is not None:
            leave(launch_metadata)

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        self.num_loaded += 1
        return 0, self.num_loaded, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 200_000}

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    # `active` asks for a real driver where there is none yet.
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(recorder)  # type: ignore[arg-type]
    add_kernel.device_caches.clear()
    yield recorder
    triton.runtime.driver._active = before
    add_kernel.device_caches.clear()


class OnDevice:
    """A tensor that says it is somewhere else."""

    def __init__(self, x: torch.Tensor, device: int) -> None:
        self.x, self.device_index, self.dtype = x, device, x.dtype

    def data_ptr(self) -> int:
        return self.x.data_ptr()

    def get_device(self) -> int:
        return self.device_index


X = torch.zeros(64)
HALF = torch.zeros(64, 16, dtype=torch.float16)


def arguments(**changes: Any) -> tuple[Any, ...]:
    """Of a launch, with some of them replaced."""
    given: dict[str, Any] = {
        "grid": (3,),
        "descriptors": (None,),
        "tensors": (X, X),
        "integers": (32,),
        "numbers": (7, 5, 0.5),
        "constants": (16, False, (1, 2)),
        "options": (4, None),
    }
    return tuple({**given, **changes}.values())


def matrix(x: torch.Tensor, rows: int) -> tuple[Descriptor]:
    return (Descriptor(x, list(x.shape), list(x.stride()), [rows, x.shape[1]]),)


WITH_DESCRIPTOR = {"descriptors": matrix(HALF, 16), "constants": (16, True, (1, 2))}
FOUND_AGAIN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the_same": ({}, {}),
    "other_memory": ({}, {"tensors": (X[4:], X[8:])}),
    "other_stride_of_16": ({}, {"integers": (48,)}),
    "no_stride": ({}, {"integers": (0,)}),
    "other_odd_stride": ({"integers": (3,)}, {"integers": (5,)}),
    "other_numbers": ({}, {"numbers": (1, 16, 1.0)}),
    "other_grid": ({}, {"grid": (5, 2)}),
    "other_rows_of_descriptor": (WITH_DESCRIPTOR, {**WITH_DESCRIPTOR, "descriptors": matrix(HALF[8:], 16)}),
}
LOOKED_UP_ANEW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unaligned": ({}, {"tensors": (X[1:], X)}),
    "other_unaligned": ({"tensors": (X[1:], X)}, {"tensors": (X, X[1:])}),
    "other_dtype": ({}, {"tensors": (X.double(), X)}),
    "stride_1": ({}, {"integers": (1,)}),
    "odd_stride": ({}, {"integers": (33,)}),
    "stride_past_int32": ({}, {"integers": (2**31,)}),
    "number_past_int32": ({}, {"numbers": (7, 2**31, 0.5)}),
    "float_for_integer": ({}, {"numbers": (7, 5.0, 0.5)}),
    "other_constant": ({}, {"constants": (32, False, (1, 2))}),
    "other_tuple": ({}, {"constants": (16, False, (3, 2))}),
    "other_warps": ({}, {"options": (8, None)}),
    "other_registers": ({}, {"options": (4, 64)}),
    "descriptor": ({}, WITH_DESCRIPTOR),
    "other_block": (WITH_DESCRIPTOR, {**WITH_DESCRIPTOR, "descriptors": matrix(HALF, 32)}),
    "descriptor_dtype": (WITH_DESCRIPTOR, {**WITH_DESCRIPTOR, "descriptors": matrix(HALF.bfloat16(), 16)}),
}
FUNCTION = 4  # which argument of a launch it is


def launch_by_triton(arguments: tuple[Any, ...]) -> None:
    grid, described, tensors, integers, numbers, constants, (num_warps, maxnreg) = arguments
    checked = [x and x.checked() for x in described]
    add_kernel[grid](*checked, *tensors, *integers, *numbers, *constants, num_warps=num_warps, maxnreg=maxnreg)


def plain(launch: tuple[Any, ...]) -> list[Any]:
    """Tensors as pointers, descriptors as what a driver reads of them."""

    def of(x: Any) -> Any:
        if hasattr(x, "base"):
            is_rounded = getattr(x, "round_f32_to_tf32", False)  # not in every version
            return x.base.data_ptr(), x.shape, x.strides, x.block_shape, x.padding, is_rounded
        return x.data_ptr() if hasattr(x, "data_ptr") else x

    return [of(x) for x in launch]


def add_launcher() -> Launcher:
    return Launcher(add_kernel, "num_warps", "maxnreg")


@compiled_only
@pytest.mark.parametrize(("first", "second"), FOUND_AGAIN.values(), ids=FOUND_AGAIN.keys())
def test_found_again(first: dict[str, Any], second: dict[str, Any], recorder: Recorder) -> None:
    """The second time Triton isn't asked; it would have launched the same."""
    launch = add_launcher()
    launch(*arguments(**first))
    launch.kernel = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.jagged.launch._is_watched", lambda kernel: False)
        launch(*arguments(**second))
    launch_by_triton(arguments(**second))
    _, ours, tritons = map(plain, recorder.launches)
    assert ours == tritons


@compiled_only
@pytest.mark.parametrize(("first", "second"), LOOKED_UP_ANEW.values(), ids=LOOKED_UP_ANEW.keys())
def test_looked_up_anew(first: dict[str, Any], second: dict[str, Any], recorder: Recorder) -> None:
    """What was compiled for one is not launched for the other, whichever of them comes first."""
    launch = add_launcher()
    for changes in (first, second, first, second):
        launch(*arguments(**changes))
        launch_by_triton(arguments(**changes))
    launches = [plain(x) for x in recorder.launches]
    assert launches[0::2] == launches[1::2]
    assert recorder.num_loaded == 2
    assert launches[4][FUNCTION] != launches[6][FUNCTION]


@compiled_only
def test_every_device_has_its_own(recorder: Recorder) -> None:
    launch = add_launcher()
    for _ in range(2):
        for device in (0, 1):
            recorder.device = device
            launch(*arguments(tensors=(OnDevice(X, device), OnDevice(X, device))))
    assert [x[FUNCTION] for x in recorder.launches] == [1, 2, 1, 2]
    assert [x[3] for x in recorder.launches] == [100, 101, 100, 101], "the stream of the device"


@compiled_only
@pytest.mark.parametrize("wanted", [True, False])
def test_dependent_launch(wanted: bool, recorder: Recorder) -> None:
    """Of the launch that compiles and of those that find what it compiled."""
    launch = Launcher(add_kernel, "num_warps", "launch_pdl")
    for _ in range(2):
        for is_dependent in (wanted, not wanted):
            launch(*arguments(options=(4, is_dependent)))
    assert recorder.are_dependent == 2 * [wanted, not wanted]
    assert recorder.num_loaded == 2


@compiled_only
def test_hooks_see_every_launch(recorder: Recorder) -> None:
    launch = add_launcher()
    seen: list[str] = []

    def enter(metadata: Any) -> None:
        seen.append(f"enter {metadata.get()['name']}")

    def leave(metadata: Any) -> None:
        seen.append(f"leave {metadata.get()['name']}")

    launch(*arguments())
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        launch(*arguments())
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)
    launch(*arguments())
    assert seen == ["enter add_kernel", "leave add_kernel"]
    assert recorder.num_loaded == 1
    assert len(recorder.launches) == 3


@compiled_only
@pytest.mark.parametrize(
    ("knob", "value"),
    [("launch_enter_hook", print), ("launch_exit_hook", print), ("debug", True)],
)
def test_who_watches(knob: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _is_watched(add_kernel)
    monkeypatch.setattr(knobs.runtime, knob, value)
    assert _is_watched(add_kernel)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", None)
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", None)
    assert _is_watched(add_kernel) == (knob == "debug")


def test_descriptors_are_all_or_none() -> None:
    fits, transposed = torch.zeros(4, 2, 16), torch.zeros(2, 4, 16).transpose(0, 1)
    first, second = descriptors(fits, fits, block=8, wanted=True)
    assert first is not None
    assert second is not None
    assert (first.shape, first.strides, first.block_shape) == ([4, 32], [32, 1], [8, 16])
    assert descriptors(fits, transposed, block=8, wanted=True) == (None, None)
    assert descriptors(fits, fits, block=8, wanted=False) == (None, None)


@pytest.mark.gpu
def test_neighbours_of_other_alignment_and_strides() -> None:
    """Calls that differ in what a kernel is specialised on, in turn: none gets a kernel of another."""
    device = torch.device("cuda")
    case = Case([70, 0, 300, 9], head_dim=64, dtype=torch.bfloat16)
    *qkv, dout = case.make_qkvg(device)
    offsets = case.make_offsets(device)
    L, H, D = qkv[0].shape
    expected = with_gradients(jagged_flash_attention, qkv, dout, offsets, case.max_seqlen)
    for _ in range(3):
        for shift, pad in [(0, 0), (1, 0), (8, 0), (0, 8), (0, 1), (3, 5)]:
            moved = []
            for x in (*qkv, dout):
                memory = torch.zeros(shift + L * (H * D + pad), dtype=x.dtype, device=device)
                moved.append(memory.as_strided(x.shape, (H * D + pad, D, 1), shift).copy_(x))
            actual = with_gradients(jagged_flash_attention, moved[:3], moved[3], offsets, case.max_seqlen)
            for name, x in expected.items():
                torch.testing.assert_close(actual[name], x, rtol=0.02, atol=0.02, msg=f"{name} {shift} {pad}")


@pytest.mark.gpu
def test_hooks_see_the_kernels_of_a_call() -> None:
    device = torch.device("cuda")
    case = Case([70, 0, 300, 9], head_dim=64, dtype=torch.bfloat16)
    *qkv, dout = case.make_qkvg(device)
    args = (qkv, dout, case.make_offsets(device), case.max_seqlen)
    expected = with_gradients(jagged_flash_attention, *args)
    seen: list[str] = []

    def enter(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(enter)
    try:
        watched = with_gradients(jagged_flash_attention, *args)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    names = " ".join(seen)  # of some GPUs with more words in front
    assert all(name in names for name in ("jagged_tile_lists_kernel", "forward_kernel", "dq_kernel", "dkv_kernel"))
    for name, x in expected.items():
        assert torch.equal(watched[name], x), name
