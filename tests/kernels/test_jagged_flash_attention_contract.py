"""What surrounds the mathematics: refusals, tracing and export, no host synchronisation, sizes past 2^31."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.jagged import Schedule, check_offsets, tile_lists
from kernels.jagged.launch import MAX_GRID, grid_of
from kernels.jagged_flash_attention import jagged_flash_attention, op, reference_attention
from tests.kernels.jagged_cases import Case, run, with_gradients

L, B = 8, 2


def arguments(**changes: Any) -> dict[str, Any]:
    """A good call, with some arguments replaced."""
    qkv = {name: torch.zeros(L, 2, 16) for name in ("q", "k", "v")}
    return {**qkv, "offsets": torch.tensor([0, 5, L]), "max_seqlen": 5, **changes}


def kv(num_tokens: int, num_heads: int = 2) -> dict[str, Tensor]:
    return {name: torch.zeros(num_tokens, num_heads, 16) for name in "kv"}


def cross(**changes: Any) -> dict[str, Any]:
    """What makes of it a cross attention with 6 keys."""
    return {**kv(6), "key_offsets": torch.tensor([0, 2, 6]), "max_key_seqlen": 4, "causal": False, **changes}


def schedule_of(lengths: list[int], max_seqlen: int, **options: Any) -> Schedule:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Schedule(offsets, sum(lengths), max_seqlen, **options)


TARGETS = torch.tensor([1, 0])
CROSS_SCHEDULE = schedule_of([5, 3], 5, key_offsets=torch.tensor([0, 2, 6]), total_keys=6, max_key_seqlen=4)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two_dimensions": ({"q": torch.zeros(L, 16)}, r"q must have shape \(tokens, heads, head_dim\), .* got \(8, 16\)"),
    "k_unlike_v": ({"v": torch.zeros(L + 1, 2, 16)}, r"k and v one shape .* and \(9, 2, 16\)"),
    "other_head_dim": ({n: torch.zeros(L, 2, 32) for n in "kv"}, r"got \(8, 2, 16\), \(8, 2, 32\)"),
    "other_tokens": (kv(L + 1), "as many tokens, or key_offsets must say whose they are"),
    "heads_not_a_multiple": (kv(L, 3), "the 2 heads of q must be a multiple of the 3 heads of k and v"),
    "no_key_heads": (kv(L, 0), "at least one head"),
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
    "key_offsets_alone": (cross(max_key_seqlen=None), "key_offsets and max_key_seqlen belong together"),
    "max_key_seqlen_alone": ({"max_key_seqlen": 4}, "key_offsets and max_key_seqlen belong together"),
    "negative_max_key_seqlen": (cross(max_key_seqlen=-1), "max_key_seqlen must be at least 0, got -1"),
    "float_key_offsets": (cross(key_offsets=torch.zeros(3)), "key_offsets must be one-dimensional int32 or int64"),
    "keys_of_other_users": (
        cross(key_offsets=torch.tensor([0, 6])),
        r"same users as offsets, shape \(3,\); got \(2,\)",
    ),
    "causal_cross": (cross(causal=True), "has no causal mask, window or num_targets: .* pass causal=False"),
    "window_cross": (cross(window=3), "has no causal mask, window or num_targets"),
    "targets_cross": (cross(num_targets=TARGETS), "has no causal mask, window or num_targets"),
    "mixed_key_offsets": (
        cross(key_offsets=torch.zeros(3, dtype=torch.long, device="meta")),
        "q is on cpu, key_offsets on meta",
    ),
    "dropout_1": ({"dropout_p": 1.0}, "dropout_p must be at least 0 and less than 1, got 1.0"),
    "negative_dropout": ({"dropout_p": -0.1}, "less than 1, got -0.1"),
    "dropout_nan": ({"dropout_p": float("nan")}, "less than 1, got nan"),
    "int32_seed": (
        {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int32)},
        "seed must be one int64 .* torch.int32",
    ),
    "scalar_seed": (
        {"dropout_p": 0.1, "seed": torch.tensor(1)},
        r"seed must be one int64 of shape \(1,\) .* shape \(\)",
    ),
    "seed_elsewhere": ({"seed": torch.zeros(1, dtype=torch.long, device="meta")}, "on cpu, got .* on meta"),
    "precision": ({"precision": "bf16x3"}, "precision must be one of ieee, tf32, got 'bf16x3'"),
    "schedule_of_more_users": ({"schedule": schedule_of([5, 3, 0], 5)}, "made for users = 3, the call has 2"),
    "schedule_of_more_tokens": ({"schedule": schedule_of([5, 4], 5)}, "made for total = 9, the call has 8"),
    "schedule_of_longer_users": ({"schedule": schedule_of([5, 3], 6)}, "made for max_seqlen = 6, the call has 5"),
    "schedule_with_targets": (
        {"schedule": schedule_of([5, 3], 5, num_targets=TARGETS)},
        "made for num_targets given = True, the call has False",
    ),
    "schedule_without_targets": (
        {"num_targets": TARGETS, "schedule": schedule_of([5, 3], 5)},
        "made for num_targets given = False, the call has True",
    ),
    "schedule_of_cross": ({"schedule": CROSS_SCHEDULE}, "made for key_offsets given = True"),
    "schedule_of_self": (cross(schedule=schedule_of([5, 3], 5)), "made for key_offsets given = False"),
    "schedule_of_more_keys": (cross(**kv(7), schedule=CROSS_SCHEDULE), "made for total_keys = 6, the call has 7"),
    "schedule_of_longer_keys": (
        cross(max_key_seqlen=5, schedule=CROSS_SCHEDULE),
        "made for max_key_seqlen = 4, the call has 5",
    ),
}

WRONG_VALUES: dict[str, tuple[dict[str, Any], str]] = {
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
    "keys_too_short": (cross(key_offsets=torch.tensor([0, 2, 5])), "key_offsets go from 0 to 5; .* number of rows, 6"),
    "keys_descend": (cross(key_offsets=torch.tensor([0, 7, 6])), "key_offsets descend: user 1 would have -1 tokens"),
    "more_keys_than_max": (cross(max_key_seqlen=3), "user 1 has 4 keys, more than max_key_seqlen=3"),
    "queries_of_cross": (cross(max_seqlen=4), "user 0 has 5 tokens, more than max_seqlen=4"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jagged_flash_attention(**arguments(**changes))


def on_device(call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items()}


@pytest.mark.parametrize(("changes", "message"), WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_values_are_refused(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Always on a CPU; on CUDA when asked, because it waits."""
    if kernel_device.type == "cuda":
        monkeypatch.setenv("KERNELS_CHECK_OFFSETS", "1")
    with pytest.raises(ValueError, match=message):
        jagged_flash_attention(**on_device(arguments(**changes), kernel_device))


@pytest.mark.parametrize("changes", [{}, cross(), kv(L, 1)], ids=["self", "cross", "grouped"])
def test_what_the_refused_calls_are_made_from_is_accepted(changes: dict[str, Any], kernel_device: torch.device) -> None:
    assert jagged_flash_attention(**on_device(arguments(**changes), kernel_device)).shape == (L, 2, 16)


def test_a_given_schedule_checks_values_if_it_shall(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    monkeypatch.setenv("KERNELS_CHECK_OFFSETS", "1")
    call = on_device(arguments(max_seqlen=4), kernel_device)
    jagged_flash_attention(**call, schedule=Schedule(call["offsets"], L, 4))  # undefined rows, but no error
    with pytest.raises(ValueError, match="user 0 has 5 tokens, more than max_seqlen=4"):
        jagged_flash_attention(**call, schedule=Schedule(call["offsets"], L, 4, check_values=True))


@pytest.mark.gpu
def test_values_are_not_checked_on_cuda_unless_asked() -> None:
    """Undefined rows, but no error and no wait."""
    call = on_device(arguments(max_seqlen=4), torch.device("cuda"))
    jagged_flash_attention(**call)  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        jagged_flash_attention(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_values_are_checked_inside_a_compiled_function(kernel_device: torch.device) -> None:
    """Where tensors are fake while it is traced, so the check has to wait for the real ones."""
    if kernel_device.type == "cuda":
        pytest.skip("checked on a CPU only")
    torch._dynamo.reset()
    compiled = torch.compile(jagged_flash_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="user 0 has 5 tokens"):
        compiled(**arguments(max_seqlen=4))


def test_check_offsets_accepts_what_is_right(device: torch.device) -> None:
    offsets = torch.tensor([0, 0, 5, L], dtype=torch.int32, device=device)
    check_offsets(offsets, 5, L, torch.tensor([0, 5, 0], device=device))
    check_offsets(offsets, 5, L, of_keys=True)


def test_cpu_without_interpreter_is_refused() -> None:
    program = (
        "import torch; from kernels.jagged import *; from kernels.jagged_flash_attention import *\n"
        "x = torch.zeros(2, 1, 16)\n"
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
    tiles = torch.empty(2**25, 8, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=f"{2**31} passes CUDA's limit of {MAX_GRID}"):
        grid_of(tiles, 64)
    assert grid_of(tiles, 63) == (63 * 2**25,)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("offsets", "rows_written"),
    [([0, 50], 20), ([0, 10**9], 20), ([-7, 20], 20), ([0, -(10**12), 50], 20), ([10**12, 10**12 + 5], 0)],
    ids=["past_max_seqlen", "past_the_end", "negative", "descending", "far_away"],
)
def test_wrong_offsets_touch_no_foreign_memory(
    offsets: list[int], rows_written: int, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Values that nobody checked are clamped: a user ends at max_seqlen and at the last row, and never before 0."""
    monkeypatch.setattr(tile_lists, "checks_values", lambda device: False)
    guard, rows = 64, 50
    around = [torch.full((rows + 2 * guard, 1, 16), float("nan"), device=kernel_device) for _ in range(4)]
    q, k, v, dout = (x[guard : guard + rows].normal_() for x in around)
    too_few_targets = torch.full((len(offsets) - 1,), -3, device=kernel_device)
    bounds = torch.tensor(offsets, device=kernel_device)
    actual = with_gradients(jagged_flash_attention, [q, k, v], dout, bounds, 20, num_targets=too_few_targets)

    first = torch.tensor([0, rows_written], device=kernel_device)
    written = [x[:rows_written] for x in (q, k, v, dout)]
    expected = with_gradients(reference_attention, written[:3], written[3], first, 20)
    for name, x in actual.items():
        torch.testing.assert_close(x[:rows_written], expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert x[rows_written:].isnan().all(), name


@pytest.mark.usefixtures("poisoned_memory")
def test_wrong_key_offsets_touch_no_foreign_memory(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Likewise: of 50 keys, here called 10^9, the first 20 are seen, because max_key_seqlen says so."""
    monkeypatch.setattr(tile_lists, "checks_values", lambda device: False)
    guard, rows = 64, 50
    around = [torch.full((rows + 2 * guard, 1, 16), float("nan"), device=kernel_device) for _ in range(2)]
    k, v = (x[guard : guard + rows].normal_() for x in around)
    q, dout = torch.randn(2, 7, 1, 16, device=kernel_device)
    offsets = torch.tensor([0, 7], device=kernel_device)

    def attend(function: Any, num_keys: int, last: int) -> dict[str, Tensor]:
        key_offsets = torch.tensor([0, last], device=kernel_device)
        options = {"causal": False, "key_offsets": key_offsets, "max_key_seqlen": 20}
        return with_gradients(function, [q, k[:num_keys], v[:num_keys]], dout, offsets, 7, **options)

    actual, expected = attend(jagged_flash_attention, rows, 10**9), attend(reference_attention, 20, 20)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name][: len(x)], x, rtol=1e-4, atol=1e-5, msg=name)
    assert actual["dk"][20:].isnan().all()
    assert actual["dv"][20:].isnan().all()


COMPILED: dict[str, dict[str, Any]] = {
    "window_candidates": {"causal": False, "window": 3, "has_candidates": True},
    "dropout_grouped": {"dropout_p": 0.4, "num_heads": 2, "group": 2},
    "cross_negative_scale": {"causal": False, "key_lengths": [2, 3, 0], "scale": -0.1},
}


@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED.keys())
def test_compiles_without_graph_breaks(changes: dict[str, Any], kernel_device: torch.device) -> None:
    """torch.compile traces through with any total, and runs the very same kernel."""
    torch._dynamo.reset()
    compiled = torch.compile(jagged_flash_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([6, 0, 3], [1, 11, 2]):
        case = Case(lengths, **{"num_heads": 1, **changes})
        expected, actual = (run(function, case, kernel_device) for function in (jagged_flash_attention, compiled))
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name


def test_compiled_layers_share_a_schedule(kernel_device: torch.device) -> None:
    """Made in the compiled function or outside, for two layers and their backward."""

    def layers(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_seqlen: int, schedule: Schedule | None = None
    ) -> Tensor:
        schedule = schedule or Schedule(offsets, q.shape[0], max_seqlen)
        q = jagged_flash_attention(q, k, v, offsets, max_seqlen, schedule=schedule)
        return jagged_flash_attention(q, k, v, offsets, max_seqlen, schedule=schedule)

    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([6, 0, 3], [1, 11, 2]):
        case = Case(lengths, num_heads=1)
        *qkv, dout = case.make_qkvg(kernel_device)
        args = (case.make_offsets(kernel_device), case.max_seqlen)
        made_outside = Schedule(args[0], sum(lengths), case.max_seqlen)
        expected = with_gradients(layers, qkv, dout, *args)
        inside = with_gradients(compiled, qkv, dout, *args)
        outside = with_gradients(compiled, qkv, dout, *args, made_outside)
        for name in expected:
            assert torch.equal(inside[name], expected[name]), name
            assert torch.equal(outside[name], expected[name]), name


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, seed: Tensor) -> Tensor:
        return jagged_flash_attention(q, k, v, offsets, 12, window=5, dropout_p=0.2, seed=seed)


def test_exports_with_a_dynamic_total(kernel_device: torch.device) -> None:
    seed = torch.tensor([3], device=kernel_device)
    case = Case([6, 0, 3], group=2)
    *qkv, _ = case.make_qkvg(kernel_device)
    tokens, bounds = torch.export.Dim("tokens", min=2), torch.export.Dim("bounds", min=2)
    program = torch.export.export(
        Attention(),
        (*qkv, case.make_offsets(kernel_device), seed),
        dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}, {0: bounds}, None),
    )
    other = Case([1, 11], group=2, seed=1)
    *qkv, _ = other.make_qkvg(kernel_device)
    offsets = other.make_offsets(kernel_device)
    assert torch.equal(program.module()(*qkv, offsets, seed), Attention()(*qkv, offsets, seed))


def test_a_program_traced_for_other_tiles_is_refused(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """The rows of a tile are part of an exported program; another GPU may have chosen others."""
    case = Case([6, 3])
    inputs = (*case.make_qkvg(kernel_device)[:3], case.make_offsets(kernel_device), torch.tensor([3]).to(kernel_device))
    program = torch.export.export(Attention(), inputs)
    here = op.choose_tiles(case.head_dim, case.dtype, kernel_device, 12, True)
    elsewhere = replace(here, forward=replace(here.forward, block_m=2 * here.forward.block_m))
    monkeypatch.setattr(op, "choose_tiles", lambda *_: elsewhere)
    with pytest.raises(ValueError, match="trace it again"):
        program.module()(*inputs)


def test_fake_tensors_outside_their_mode(kernel_device: torch.device) -> None:
    """They hold no data, and nobody but they themselves says that something is being traced."""
    case = Case([6, 3])
    *qkv, _ = case.make_qkvg(kernel_device)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (*qkv, case.make_offsets(kernel_device))]
    assert jagged_flash_attention(*fake, case.max_seqlen).shape == qkv[0].shape


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("has_candidates", [False, True], ids=["history", "candidates"])
def test_no_log_sum_exp_without_a_gradient(
    head_dim: int, has_candidates: bool, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Nobody reads it then, so there is neither memory for it nor a store; the output is the same."""
    dtype = torch.float32 if kernel_device.type == "cpu" else torch.bfloat16
    case = Case([5, 0, 20, 33], head_dim=head_dim, dtype=dtype, has_candidates=has_candidates).on_device(kernel_device)
    q, k, v, _ = case.make_qkvg(kernel_device)
    args, options = (case.make_offsets(kernel_device), case.max_seqlen), case.options(kernel_device)
    with_gradient = jagged_flash_attention(q.requires_grad_(), k, v, *args, **options)
    monkeypatch.setattr(op, "empty_lse", lambda q: pytest.fail("memory for log-sum-exp"))
    with torch.no_grad():
        assert torch.equal(jagged_flash_attention(q, k, v, *args, **options), with_gradient)


def test_a_schedule_used_in_inference_serves_training(kernel_device: torch.device) -> None:
    case = Case([6, 3])
    *qkv, dout = case.make_qkvg(kernel_device)
    offsets = case.make_offsets(kernel_device)
    schedule = Schedule(offsets, 9, case.max_seqlen)
    with torch.inference_mode():
        evaluated = jagged_flash_attention(*qkv, offsets, case.max_seqlen, schedule=schedule)
    trained = with_gradients(jagged_flash_attention, qkv, dout, offsets, case.max_seqlen, schedule=schedule)
    assert torch.equal(evaluated, trained["out"])


@pytest.mark.parametrize(
    "case",
    [
        Case([6, 0, 3], group=2, has_candidates=True, window=4, dropout_p=0.2),
        Case([6, 0, 3], num_heads=1, causal=False, key_lengths=[1, 2, 0]),
    ],
    ids=["self", "cross"],
)
def test_custom_op_is_registered_properly(
    case: Case, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Schema, fake tensors, autograd and tracing, by PyTorch's own checker, for a call of the public function."""
    registered = torch.ops.recsys_kernels.jagged_flash_attention.default
    calls: list[tuple[Any, ...]] = []

    def recorded(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return registered(*args)

    monkeypatch.setattr(op, "_forward_op", recorded)
    monkeypatch.setattr(op, "is_traced", lambda *_: True)
    run(jagged_flash_attention, case, kernel_device)
    (args,) = calls
    torch.library.opcheck(registered, args)


def test_traced_calls_go_through_an_operator(kernel_device: torch.device) -> None:
    """Whoever records operators sees one, with the same bits; also its second derivative is refused."""
    case = Case([6, 0, 3], num_heads=1)
    q, k, v, _ = case.make_qkvg(kernel_device)
    args = (k, v, case.make_offsets(kernel_device), case.max_seqlen)
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    leaf = q.clone().requires_grad_()
    with Recorder():
        out = jagged_flash_attention(leaf, *args)
    assert "recsys_kernels.jagged_flash_attention.default" in seen
    assert torch.equal(out, jagged_flash_attention(q, *args))
    (dq,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd"):
        dq.sum().backward()


def test_second_derivative_is_refused(kernel_device: torch.device) -> None:
    """Rather than being silently wrong."""
    case = Case([3], num_heads=1)
    q, k, v, _ = (x.requires_grad_() for x in case.make_qkvg(kernel_device))
    out = jagged_flash_attention(q, k, v, case.make_offsets(kernel_device), 3)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


def test_forward_derivatives_are_refused(kernel_device: torch.device) -> None:
    """Also where nothing asks for a gradient, and autograd is not asked either."""
    case = Case([3], num_heads=1)
    q, k, v, tangent = case.make_qkvg(kernel_device)
    args = (k, v, case.make_offsets(kernel_device), 3)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        jagged_flash_attention(torch.autograd.forward_ad.make_dual(q, tangent), *args)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda q: jagged_flash_attention(q, *args))(torch.stack([q, q]))


def test_checkpointing_recomputes_the_same_dropout(kernel_device: torch.device) -> None:
    """The seed is drawn again, from the same state of the generator."""
    case = Case([20, 0, 5], num_heads=1).on_device(kernel_device)
    *qkv, dout = case.make_qkvg(kernel_device)
    args = (case.make_offsets(kernel_device), case.max_seqlen)

    def checkpointed(*args: Any, **options: Any) -> Tensor:
        return checkpoint(jagged_flash_attention, *args, use_reentrant=False, **options)

    results = []
    for function in (jagged_flash_attention, checkpointed):
        torch.manual_seed(0)
        results.append(with_gradients(function, qkv, dout, *args, dropout_p=0.5))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_autocast(kernel_device: torch.device) -> None:
    """q, k and v come from a projection under autocast; its float32 weights get float32 gradients."""
    H, D, width = 2, 16, 32
    case = Case([20, 0, 5]).on_device(kernel_device)
    offsets = case.make_offsets(kernel_device)
    x = torch.randn(sum(case.lengths), width, device=kernel_device)
    projection = torch.nn.Linear(width, 3 * H * D, bias=False, device=kernel_device)

    def attend(packed: Tensor) -> Tensor:
        q, k, v = packed.view(-1, 3, H, D).unbind(1)
        return jagged_flash_attention(q, k, v, offsets, case.max_seqlen)

    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        out = attend(projection(x))
    (gradient,) = torch.autograd.grad(out.float().square().sum(), projection.weight)
    weight = projection.weight.detach().bfloat16().requires_grad_()
    by_hand = attend(x.bfloat16() @ weight.t())
    (expected,) = torch.autograd.grad(by_hand.float().square().sum(), weight)
    assert out.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(out, by_hand)
    torch.testing.assert_close(gradient, expected.float(), rtol=0.02, atol=0.02 * expected.abs().max().item())


ON_GPU: dict[str, Case] = {
    "window_candidates": Case([70, 0, 300, 9], window=50, has_candidates=True, dtype=torch.bfloat16, head_dim=64),
    "causal_dropout": Case([70, 0, 300, 9], num_heads=4, group=2, dropout_p=0.1, dtype=torch.bfloat16, head_dim=64),
    "cross": Case([70, 0, 30], key_lengths=[5, 9, 200], causal=False, dtype=torch.float16, head_dim=48),
    "float32": Case([70, 0, 300, 9], layout="packed_projection"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU.values(), ids=ON_GPU.keys())
def test_nothing_waits_for_the_gpu(case: Case) -> None:
    device = torch.device("cuda")
    *qkv, dout = case.make_qkvg(device)
    args, options = (case.make_offsets(device), case.max_seqlen), case.options(device)
    options["seed"] = None  # drawn on the device
    with_gradients(jagged_flash_attention, qkv, dout, *args, **options)  # compiling may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(jagged_flash_attention, qkv, dout, *args, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU.values(), ids=ON_GPU.keys())
def test_the_same_bits_twenty_times(case: Case) -> None:
    device = torch.device("cuda")
    first = run(jagged_flash_attention, case, device)
    for _ in range(19):
        again = run(jagged_flash_attention, case, device)
        for name in first:
            assert torch.equal(again[name], first[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU.values(), ids=ON_GPU.keys())
def test_cuda_graph_follows_new_contents(case: Case) -> None:
    """Forward and backward captured once, tile lists included, then replayed for other lengths and values."""
    device = torch.device("cuda")
    *qkv, dout = case.make_qkvg(device)
    max_seqlen = sum(case.lengths)  # any user may become the longest
    offsets, options = case.make_offsets(device), case.options(device)

    def step() -> dict[str, Tensor]:
        return with_gradients(jagged_flash_attention, qkv, dout, offsets, max_seqlen, **options)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for i in range(3):
        for x in (*qkv, dout):
            x.copy_(torch.randn_like(x))
        lengths = case.lengths[i:] + case.lengths[:i]
        offsets.copy_(case.make_offsets(device, lengths))
        if "num_targets" in options:
            options["num_targets"].copy_(torch.tensor([min(n, 5 + i) for n in lengths]))
        if "seed" in options:
            options["seed"].add_(1)
        graph.replay()
        expected = step()
        for name in expected:
            assert torch.equal(captured[name], expected[name]), name


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    """Its inputs are still being made there when it is called."""
    device = torch.device("cuda")
    case = ON_GPU["window_candidates"]
    expected = run(jagged_flash_attention, case, device)
    *qkv, dout = case.make_qkvg(device)
    options, offsets = case.options(device), case.make_offsets(device)
    late = [torch.zeros_like(x) for x in (*qkv, dout, offsets)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s
        for x, value in zip(late, (*qkv, dout, offsets), strict=True):
            x.copy_(value)
        actual = with_gradients(jagged_flash_attention, late[:3], late[3], late[4], case.max_seqlen, **options)
    stream.synchronize()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


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
