"""Pooling of users' rows: values, gradients, ties, refusals, tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.jagged import Schedule, tile_lists
from kernels.jagged.score_layout import BLOCK
from kernels.jagged_pooling import jagged_pool, op
from kernels.jagged_pooling.reference import reference_jagged_pool
from tests.kernels.jagged_cases import LENGTHS
from tests.kernels.jagged_operands import draw, longer, schedule_of
from tests.numerics import FORWARD_FACTOR, GRADIENT_FACTOR, assert_matches_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MODES = ["sum", "mean", "max"]
CPU = torch.device("cpu")


def run(function: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of x."""
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, dout)[0]


def assert_follows_reference(
    lengths: Sequence[int],
    mode: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    C: int = 19,
    values: Tensor | None = None,
) -> None:
    lengths = longer(lengths, device)
    schedule = schedule_of(lengths, device, torch.int32)
    x = draw(sum(lengths), C, device=device, dtype=dtype) if values is None else values
    dout = draw(len(lengths), C, device=device, dtype=dtype, seed=1)
    offsets = schedule.queries[0]
    actual = run(lambda x: jagged_pool(x, schedule, mode), x, dout)
    baseline = run(lambda x: reference_jagged_pool(x, offsets, mode), x, dout)
    exact = run(lambda x: reference_jagged_pool(x, offsets, mode), x.double(), dout.double())
    users = [1] * len(lengths)
    for i, (name, factor, parts) in enumerate((("out", FORWARD_FACTOR, users), ("dx", GRADIENT_FACTOR, lengths))):
        assert_matches_reference(actual[i], baseline[i], exact[i], factor=factor, name=name, lengths=parts)
    if mode == "max":
        assert torch.equal(actual[0].double(), exact[0])
        assert torch.equal(actual[1].double(), exact[1]), "it goes to one row as it is"
    assert not actual[0][torch.tensor(lengths, device=device) == 0].any(), "zero for users without rows"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), [100, 0, 3]], ids=[*LENGTHS, "long"])
def test_lengths(lengths: list[int], mode: str, kernel_device: torch.device) -> None:
    assert_follows_reference(lengths, mode, kernel_device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("C", "dtype"), [(1, torch.float32), (64, torch.float32), (130, torch.float16), (65, torch.bfloat16)], ids=str
)
def test_columns_and_dtypes(C: int, dtype: torch.dtype, mode: str, kernel_device: torch.device) -> None:
    assert_follows_reference([3, 0, 40], mode, kernel_device, dtype, C)


@pytest.mark.parametrize("kind", ["ties", "all_equal", "all_negative", "all_minus_infinity"])
def test_maximum_of_unusual_values(kind: str, kernel_device: torch.device) -> None:
    """The first of equal rows takes the gradient, wherever it is; no value is too small to be a maximum."""
    lengths = longer([40, 0, 1, 37], kernel_device)
    x = draw(sum(lengths), 5, device=kernel_device)
    made = {
        "ties": x.round(),
        "all_equal": torch.ones_like(x),
        "all_negative": -x.abs() - 1.0,
        "all_minus_infinity": torch.full_like(x, float("-inf")),
    }[kind]
    if kind != "all_minus_infinity":
        assert_follows_reference([40, 0, 1, 37], "max", kernel_device, C=5, values=made)
        return
    schedule = schedule_of(lengths, kernel_device)
    out, dx = run(lambda x: jagged_pool(x, schedule, "max"), made, torch.ones(4, 5, device=kernel_device))
    assert out[[0, 2, 3]].eq(float("-inf")).all()
    assert not out[1].any()
    first = torch.zeros_like(dx)
    first[schedule.queries[0][[0, 2, 3]]] = 1.0
    assert torch.equal(dx, first)


@pytest.mark.parametrize("place", [0, 2, BLOCK + 1, 2 * BLOCK + 5])
def test_a_nan_is_the_maximum(place: int, kernel_device: torch.device) -> None:
    """As for torch: it must not get lost, whatever comes after it, and only its column and user are NaN."""
    n = 2 * BLOCK + 7
    schedule = schedule_of([n, 3], kernel_device)
    x = draw(n + 3, 4, device=kernel_device)
    x[1, 1], x[n - 2, 1] = float("inf"), float("inf")
    x[place, 1] = float("nan")
    out, dx = run(lambda x: jagged_pool(x, schedule, "max"), x, torch.ones(2, 4, device=kernel_device))
    expected = torch.stack([x[:n].amax(0), x[n:].amax(0)])
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0.0, atol=0.0)
    assert out.isnan().sum() == 1
    assert dx[:n, 1].nonzero().tolist() == [[place]]


@pytest.mark.parametrize("mode", MODES)
def test_strides(mode: str, kernel_device: torch.device) -> None:
    """As from contiguous tensors, but for the order of a sum, and from the expanded gradient of a sum."""
    lengths = longer([18, 0, 5], kernel_device)
    schedule = schedule_of(lengths, kernel_device)
    x, dout = draw(sum(lengths), 16, device=kernel_device), draw(3, 16, device=kernel_device, seed=1)
    wide = torch.full((2 * sum(lengths), 20), float("nan"), device=kernel_device)
    wide[1::2, 3:19] = x

    def function(x: Tensor) -> Tensor:
        return jagged_pool(x, schedule, mode)

    expected = run(function, x, dout)
    for other in (wide[1::2, 3:19], x.t().contiguous().t()):
        for result, right in zip(run(function, other, dout.t().contiguous().t()), expected, strict=True):
            tolerance = 0.0 if mode == "max" else 1e-5
            torch.testing.assert_close(result, right, rtol=tolerance, atol=tolerance)
    ones = torch.ones((), device=kernel_device)
    assert torch.equal(run(function, x, ones.expand(3, 16))[1], run(function, x, torch.ones_like(dout))[1])


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_in_any_company(mode: str, kernel_device: torch.device) -> None:
    x = draw(3 * BLOCK + 7, 6, device=kernel_device)
    alone = jagged_pool(x, schedule_of([len(x)], kernel_device), mode)[0]
    for before in (1, BLOCK - 1):
        together = torch.cat([draw(before, 6, device=kernel_device), x, x[:3]])
        out = jagged_pool(together, schedule_of([before, len(x), 3], kernel_device), mode)
        assert torch.equal(out[1], alone)


REFUSED: dict[str, tuple[Tensor, str, str]] = {
    "three_dimensions": (torch.zeros(8, 1, 4), "sum", r"x must have shape \(L, C\) .* got \(8, 1, 4\)"),
    "rows": (torch.zeros(9, 4), "sum", "x has 9 rows, the schedule says 8"),
    "dtype": (torch.zeros(8, 4).double(), "sum", "share one dtype .* got x torch.float64"),
    "device": (torch.zeros(8, 4, device="meta"), "sum", "x on meta, offsets on cpu"),
    "mode": (torch.zeros(8, 4), "min", "mode must be one of sum, mean, max; got 'min'"),
}


@pytest.mark.parametrize(("x", "mode", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(x: Tensor, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jagged_pool(x, schedule_of([5, 3], CPU), mode)


def test_second_derivative_is_refused(kernel_device: torch.device) -> None:
    """Rather than being silently wrong."""
    x = draw(8, 4, device=kernel_device).requires_grad_()
    out = jagged_pool(x, schedule_of([5, 3], kernel_device), "mean")
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd"):
        dx.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_wrong_offsets_touch_no_foreign_memory(
    mode: str, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Of 50 rows between NaN, here called 10^9, each user has at most max_seqlen = 20, and the last has none."""
    monkeypatch.setattr(tile_lists, "checks_values", lambda device: False)
    guard, rows, C = 64, 50, 5
    around = torch.full((rows + 2 * guard, C), float("nan"), device=kernel_device)
    x = around[guard : guard + rows].normal_()
    schedule = Schedule(torch.tensor([-9, 20, 10**9, -3], device=kernel_device), rows, 20)
    out, dx = run(lambda x: jagged_pool(x, schedule, mode), x, torch.ones(3, C, device=kernel_device))
    right = torch.tensor([0, 20, 40, 40], device=kernel_device)
    expected, dx_expected = run(
        lambda x: reference_jagged_pool(x, right, mode), x[:40], torch.ones(3, C, device=kernel_device)
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx[:40], dx_expected, rtol=1e-5, atol=1e-5)
    assert dx[40:].isnan().all()


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_operators_are_registered_right(mode: str, kernel_device: torch.device) -> None:
    """Schema, fake implementation and autograd, by torch's own checks."""
    schedule = schedule_of([5, 0, 3], kernel_device)
    (tiles,) = schedule.query_tiles([BLOCK], causal=False)
    x, dout = draw(8, 4, device=kernel_device), draw(3, 4, device=kernel_device, seed=1)
    torch.library.opcheck(op._pool_op.op, (x.clone().requires_grad_(), tiles, schedule.queries[0], 5, mode))
    _, first = op._pool_op(x, tiles, schedule.queries[0], 5, mode)
    torch.library.opcheck(op._pool_backward_op.op, (dout, first, tiles, 8, mode))


def pooled(x: Tensor, offsets: Tensor, max_seqlen: int) -> Tensor:
    schedule = Schedule(offsets, x.shape[0], max_seqlen, check_values=True)
    return torch.cat([jagged_pool(x.square(), schedule, mode) for mode in MODES], dim=1)


def test_compiles_without_graph_breaks(kernel_device: torch.device) -> None:
    """torch.compile traces through with any total, and runs the very same kernels."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(pooled, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 0, 40], [17, 2]):
        args = (schedule_of(lengths, kernel_device).queries[0], max(lengths))
        x = draw(sum(lengths), 5, device=kernel_device)
        dout = draw(len(lengths), 15, device=kernel_device, seed=1)
        results = [run(lambda x, f=f, a=args: f(x, *a), x, dout) for f in (pooled, compiled)]
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(actual, expected)
