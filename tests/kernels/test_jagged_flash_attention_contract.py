"""What surrounds the mathematics: refusals, tracing and export, no host synchronisation, sizes past 2^31."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.jagged_flash_attention import check_offsets, jagged_flash_attention, reference_attention
from kernels.jagged_flash_attention.forward import launch_forward
from kernels.jagged_flash_attention.launch import MAX_GRID, LaunchShape
from tests.kernels.jagged_cases import Case, with_gradients

L, B = 8, 2


def arguments(**changes: Any) -> dict[str, Any]:
    """A good call, with some arguments replaced."""
    qkv = {name: torch.zeros(L, 2, 16) for name in ("q", "k", "v")}
    return {**qkv, "offsets": torch.tensor([0, 5, L]), "max_seqlen": 5, **changes}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two_dimensions": ({"q": torch.zeros(L, 16)}, r"one shape \(tokens, heads, head_dim\), got \(8, 16\)"),
    "other_shape": ({"v": torch.zeros(L + 1, 2, 16)}, r"one shape .* and \(9, 2, 16\)"),
    "other_dtype": ({"k": torch.zeros(L, 2, 16).half()}, "share one dtype of torch.float32, torch.float16"),
    "float64": ({n: torch.zeros(L, 2, 16).double() for n in "qkv"}, "got torch.float64"),
    "head_dim_8": ({n: torch.zeros(L, 2, 8) for n in "qkv"}, "head_dim must be from 16 to 256, got 8"),
    "head_dim_257": ({n: torch.zeros(L, 2, 257) for n in "qkv"}, "from 16 to 256, got 257"),
    "no_heads": ({n: torch.zeros(L, 0, 16) for n in "qkv"}, "at least one head"),
    "float_offsets": ({"offsets": torch.zeros(3)}, "offsets must be one-dimensional int32 or int64"),
    "square_offsets": ({"offsets": torch.zeros(2, 2, dtype=torch.long)}, r"one-dimensional .* shape \(2, 2\)"),
    "empty_offsets": ({"offsets": torch.zeros(0, dtype=torch.long)}, r"shape \(users \+ 1,\)"),
    "targets_per_user": (
        {"num_targets": torch.zeros(3, dtype=torch.long)},
        "one element per user, 2 by offsets; got 3",
    ),
    "float_targets": ({"num_targets": torch.zeros(2)}, "num_targets must be one-dimensional int32 or int64"),
    "mixed_devices": ({"k": torch.zeros(L, 2, 16, device="meta")}, "q is on cpu, k on meta"),
    "negative_max_seqlen": ({"max_seqlen": -1}, "max_seqlen must be at least 0, got -1"),
    "window_0": ({"window": 0}, "window must be at least 1 token"),
    "offsets_from_1": ({"offsets": torch.tensor([1, 5, L])}, "from 1 to 8; they must go from 0 .* 8"),
    "offsets_too_short": ({"offsets": torch.tensor([0, 5, 7])}, "from 0 to 7"),
    "offsets_descend": (
        {"offsets": torch.tensor([0, 5, 3, L])},
        "offsets descend: user 1 would have -2 tokens",
    ),
    "longer_than_max": ({"max_seqlen": 4}, "user 0 has 5 tokens, more than max_seqlen=4"),
    "too_many_targets": (
        {"num_targets": torch.tensor([5, 4])},
        "num_targets of user 1 is 4; it must lie between 0",
    ),
    "negative_targets": ({"num_targets": torch.tensor([-1, 0])}, "num_targets of user 0 is -1"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jagged_flash_attention(**arguments(**changes))


def test_check_offsets_accepts_what_is_right(device: torch.device) -> None:
    offsets = torch.tensor([0, 0, 5, L], dtype=torch.int32, device=device)
    check_offsets(offsets, 5, L, torch.tensor([0, 5, 0], device=device))


@pytest.mark.gpu
def test_offset_values_are_checked_on_cuda_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments(max_seqlen=4).items()}
    jagged_flash_attention(**call)  # undefined rows, but no error and no wait
    monkeypatch.setenv("KERNELS_CHECK_OFFSETS", "1")
    with pytest.raises(ValueError, match="user 0 has 5 tokens"):
        jagged_flash_attention(**call)


def test_cpu_without_interpreter_is_refused() -> None:
    program = (
        "import torch; from kernels.jagged_flash_attention import *; x = torch.zeros(2, 1, 16)\n"
        "print(unavailable_reason('cpu'), '|', unavailable_reason('cuda'))\n"
        "try: jagged_flash_attention(x, x, x, torch.tensor([0, 2]), 2)\n"
        "except RuntimeError as error: print('refused:', error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    reason, refusal = run.stdout.splitlines()
    assert reason.startswith("a Triton kernel needs CUDA tensors")
    assert reason.endswith("| None")
    assert refusal.startswith("refused: a Triton kernel needs CUDA tensors")
    assert "TRITON_INTERPRET=1" in refusal


def test_grid_past_the_limit_is_refused() -> None:
    shape = LaunchShape(num_users=2**20, num_heads=64, max_seqlen=4096)
    with pytest.raises(ValueError, match=f"CUDA's limit of {MAX_GRID}"):
        shape.grid(64)
    assert shape.grid(4096) == (2**26,)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("offsets", "rows_written"),
    [([0, 50], 20), ([0, 10**9], 20), ([-7, 20], 20), ([0, -(10**12), 50], 20), ([10**12, 10**12 + 5], 0)],
    ids=["past_max_seqlen", "past_the_end", "negative", "descending", "far_away"],
)
def test_wrong_offsets_touch_no_foreign_memory(
    offsets: list[int], rows_written: int, kernel_device: torch.device
) -> None:
    """Values that nobody checked are clamped: a user ends at max_seqlen and at the last row, and never before 0."""
    guard, rows = 64, 50
    around = [torch.full((rows + 2 * guard, 1, 16), float("nan"), device=kernel_device) for _ in range(3)]
    q, k, v = (x[guard : guard + rows].normal_() for x in around)
    too_few_targets = torch.full((len(offsets) - 1,), -3, device=kernel_device)
    bounds = torch.tensor(offsets, device=kernel_device)
    out, _ = launch_forward(q, k, v, bounds, too_few_targets, 20, True, None, 0.25)

    first = torch.tensor([0, rows_written], device=kernel_device)
    expected = reference_attention(*(x[:rows_written] for x in (q, k, v)), first, 20, scale=0.25)
    torch.testing.assert_close(out[:rows_written], expected)
    assert out[rows_written:].isnan().all()


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor], Tensor]] = {
    "causal": lambda q, k, v, offsets, n, t: jagged_flash_attention(q, k, v, offsets, n),
    "full_window": lambda q, k, v, offsets, n, t: jagged_flash_attention(q, k, v, offsets, n, causal=False, window=3),
    "candidates": lambda q, k, v, offsets, n, t: jagged_flash_attention(q, k, v, offsets, n, num_targets=t),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_compiles_without_graph_breaks(call: Callable[..., Tensor], kernel_device: torch.device) -> None:
    """torch.compile traces through with any total, and runs the very same kernel."""
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([6, 0, 3], [1, 11, 2]):
        case = Case(lengths, num_heads=1, has_candidates=True)
        *qkv, dout = case.make_qkvg(kernel_device)
        args = (
            case.make_offsets(kernel_device),
            case.max_seqlen,
            case.options(kernel_device)["num_targets"],
        )
        expected = with_gradients(call, qkv, dout, *args)
        actual = with_gradients(compiled, qkv, dout, *args)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        return jagged_flash_attention(q, k, v, offsets, 12, window=5)


def test_exports_with_a_dynamic_total(kernel_device: torch.device) -> None:
    case = Case([6, 0, 3], num_heads=1)
    *qkv, _ = case.make_qkvg(kernel_device)
    tokens, bounds = torch.export.Dim("tokens", min=2), torch.export.Dim("bounds", min=2)
    program = torch.export.export(
        Attention(),
        (*qkv, case.make_offsets(kernel_device)),
        dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}, {0: bounds}),
    )
    other = Case([1, 11], num_heads=1, seed=1)
    *qkv, _ = other.make_qkvg(kernel_device)
    offsets = other.make_offsets(kernel_device)
    assert torch.equal(program.module()(*qkv, offsets), Attention()(*qkv, offsets))


def test_custom_op_is_registered_properly(kernel_device: torch.device) -> None:
    """Schema, fake tensors, autograd and tracing, by PyTorch's own checker."""
    case = Case([6, 0, 3], num_heads=1, has_candidates=True)
    q, k, v, _ = (x.requires_grad_() for x in case.make_qkvg(kernel_device))
    targets = case.options(kernel_device)["num_targets"]
    args = (q, k, v, case.make_offsets(kernel_device), targets, case.max_seqlen, True, 4, 0.25)
    torch.library.opcheck(torch.ops.recsys_kernels.jagged_flash_attention.default, args)


def test_second_derivative_is_refused(kernel_device: torch.device) -> None:
    """Rather than being silently wrong."""
    case = Case([3], num_heads=1)
    q, k, v, _ = (x.requires_grad_() for x in case.make_qkvg(kernel_device))
    out = jagged_flash_attention(q, k, v, case.make_offsets(kernel_device), 3)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd"):
        dq.sum().backward()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    case = Case([70, 0, 300], window=50, has_candidates=True, dtype=torch.bfloat16, head_dim=64)
    device = torch.device("cuda")
    *qkv, dout = case.make_qkvg(device)
    args, options = (case.make_offsets(device), case.max_seqlen), case.options(device)
    with_gradients(jagged_flash_attention, qkv, dout, *args, **options)  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(jagged_flash_attention, qkv, dout, *args, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("num_users", "num_heads"), [(10_000, 4), (100_000, 16)])
def test_many_users(num_users: int, num_heads: int) -> None:
    """Users x heads far past 65,535, the limit of a grid's y and z."""
    lengths = [i % 4 for i in range(num_users)]
    case = Case(lengths, num_heads=num_heads, dtype=torch.bfloat16)
    device = torch.device("cuda")
    *qkv, dout = case.make_qkvg(device)
    args = (case.make_offsets(device), case.max_seqlen)
    actual = with_gradients(jagged_flash_attention, qkv, dout, *args)
    exact = with_gradients(reference_attention, [x.float() for x in qkv], dout.float(), *args)
    for name in actual:
        torch.testing.assert_close(actual[name].float(), exact[name], rtol=0.02, atol=0.04, msg=name)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    """The last user, whose rows start past element 2^31, gets the bits it gets alone."""
    device = torch.device("cuda")
    H, D, last = 16, 128, 300
    first = 2**31 // (H * D) + 1000
    if torch.cuda.get_device_properties(device).total_memory < 60 * 2**30:
        pytest.skip("needs about 50 GiB of GPU memory")
    q, k, v, dout = (torch.randn(first + last, H, D, device=device, dtype=torch.bfloat16) for _ in range(4))
    steps = list(range(0, first, 2000))
    offsets = torch.tensor([*steps, first, first + last], device=device)
    together = with_gradients(jagged_flash_attention, [q, k, v], dout, offsets, 2000)
    alone = with_gradients(
        jagged_flash_attention, [x[first:] for x in (q, k, v)], dout[first:], offsets[-2:] - first, 2000
    )
    for name in alone:
        assert torch.equal(together[name][first:], alone[name]), name
