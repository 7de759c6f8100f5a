"""Users' rows moved: concatenated, split, the last ones; values, gradients, refusals, tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.jagged import Schedule, tile_lists
from kernels.jagged.score_layout import BLOCK
from kernels.jagged_concat import jagged_concat, jagged_last, jagged_split, op
from kernels.jagged_concat.reference import reference_jagged_concat, reference_jagged_last, reference_jagged_split
from tests.kernels.jagged_cases import LAYOUTS, LENGTHS, relay
from tests.kernels.jagged_operands import draw, longer, schedule_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PAIRS: dict[str, tuple[list[int], list[int]]] = {
    "one_user": ([40], [21]),
    "one_row_each": ([1, 1, 1], [1, 1, 1]),
    "at_tile_edges": ([31, 32, 33], [33, 32, 31]),
    "empty_sides": ([0, 9, 0, 3, 0], [0, 0, 4, 35, 0]),
    "nothing_in_x": ([0, 0], [5, 20]),
    "nothing_in_y": ([5, 20], [0, 0]),
    "only_empty_users": ([0, 0], [0, 0]),
    "no_users": ([], []),
}
CPU = torch.device("cpu")


def run(function: Callable[..., Any], inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    """The outputs and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    gradients = torch.autograd.grad(outs, leaves, douts, allow_unused=True, materialize_grads=True)
    return [*[x.detach() for x in outs], *gradients]


def assert_moves_as(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor], layout: str = "contiguous"
) -> None:
    """Rows are copied, so values and gradients are exactly those of the reference, whatever the strides."""
    outs = reference(*inputs)
    outs = [outs] if isinstance(outs, Tensor) else outs
    douts = [draw(*x.shape, device=x.device, dtype=x.dtype, seed=10 + i) for i, x in enumerate(outs)]
    expected = run(reference, inputs, douts)
    actual = run(function, [lay(x, layout) for x in inputs], [lay(x, layout) for x in douts])
    assert len(actual) == len(expected) == len(outs) + len(inputs)
    for result, right in zip(actual, expected, strict=True):
        assert torch.equal(result, right)


def lay(x: Tensor, layout: str) -> Tensor:
    """With other strides; what lies between is NaN."""
    return relay(x, layout) if x.dim() == 3 else relay(x[:, None], layout)[:, 0]


def assert_concat_and_split(
    own: list[int],
    other: list[int],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> None:
    own, other = longer(own, device), longer(other, device)
    schedules = schedule_of(own, device), schedule_of(other, device, torch.int32)
    offsets = [schedule.queries[0] for schedule in schedules]
    x, y = (draw(sum(n), *shape, device=device, dtype=dtype, seed=i) for i, n in enumerate((own, other)))
    z = draw(sum(own) + sum(other), *shape, device=device, dtype=dtype, seed=2)
    assert_moves_as(
        lambda x, y: jagged_concat(x, y, *schedules),
        lambda x, y: reference_jagged_concat(x, y, *offsets),
        [x, y],
        layout,
    )
    assert_moves_as(lambda z: jagged_split(z, *schedules), lambda z: reference_jagged_split(z, *offsets), [z], layout)


@pytest.mark.parametrize(("own", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_concat_and_split(own: list[int], other: list[int], kernel_device: torch.device) -> None:
    assert_concat_and_split(own, other, (5,), kernel_device)


@pytest.mark.parametrize("shape", [(1,), (64,), (130,), (3, 24)], ids=str)
def test_concat_and_split_shapes(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    assert_concat_and_split([3, 0, 20], [18, 2, 0], shape, kernel_device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_concat_and_split_dtypes(dtype: torch.dtype, kernel_device: torch.device) -> None:
    assert_concat_and_split([3, 0, 20], [18, 2, 0], (65,), kernel_device, dtype)


@pytest.mark.parametrize("shape", [(6,), (2, 8)], ids=["matrix", "heads"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_concat_and_split_strides(layout: str, shape: tuple[int, ...], kernel_device: torch.device) -> None:
    assert_concat_and_split([3, 0, 20], [18, 2, 0], shape, kernel_device, layout=layout)


def test_split_undoes_concat(kernel_device: torch.device) -> None:
    own, other = PAIRS["empty_sides"]
    schedules = schedule_of(own, kernel_device), schedule_of(other, kernel_device)
    x, y = (draw(sum(n), 7, device=kernel_device, seed=i) for i, n in enumerate((own, other)))
    back = jagged_split(jagged_concat(x, y, *schedules), *schedules)
    assert torch.equal(back[0], x)
    assert torch.equal(back[1], y)


def test_gradient_of_one_part(kernel_device: torch.device) -> None:
    """Where only x of a split is used, y's rows get zero; and the gradient of a sum has strides of zero."""
    own, other = PAIRS["empty_sides"]
    schedules = schedule_of(own, kernel_device), schedule_of(other, kernel_device)
    z = draw(sum(own) + sum(other), 3, device=kernel_device).requires_grad_()
    x, _ = jagged_split(z, *schedules)
    (dz,) = torch.autograd.grad(x.sum(), z)
    of_x, of_y = jagged_split(dz, *schedules)
    assert of_x.eq(1).all()
    assert of_y.eq(0).all()


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_last(lengths: list[int], n: int, kernel_device: torch.device) -> None:
    assert_last(lengths, n, (5,), kernel_device)


def test_last_nothing(kernel_device: torch.device) -> None:
    assert_last([3, 0, 40], 0, (5,), kernel_device)


@pytest.mark.parametrize("layout", ["every_second_row", "not_contiguous"])
@pytest.mark.parametrize(("dtype", "shape"), [(torch.float16, (65,)), (torch.bfloat16, (2, 8))], ids=str)
def test_last_shapes(dtype: torch.dtype, shape: tuple[int, ...], layout: str, kernel_device: torch.device) -> None:
    assert_last([40, 0, 3, 7], 5, shape, kernel_device, dtype, layout)


def assert_last(
    lengths: list[int],
    n: int,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> None:
    lengths = longer(lengths, device)
    schedule = schedule_of(lengths, device, torch.int32)
    expected = [min(length, n) for length in lengths]
    x = draw(sum(lengths), *shape, device=device, dtype=dtype)
    _, offsets = jagged_last(x, schedule, n, sum(expected))
    assert offsets.dtype == torch.int32
    assert offsets.diff().tolist() == expected
    assert_moves_as(
        lambda x: jagged_last(x, schedule, n, sum(expected))[0],
        lambda x: reference_jagged_last(x, schedule.queries[0], n)[0],
        [x],
        layout,
    )


@pytest.mark.parametrize("name", ["concat", "split", "last"])
def test_second_derivatives(name: str, kernel_device: torch.device) -> None:
    """Moving rows is linear, so for cubes these are 36 x^3 of the rows that are kept, as for any other move."""
    own, other = PAIRS["empty_sides"]
    schedules = schedule_of(own, kernel_device), schedule_of(other, kernel_device)
    x = draw(sum(own) if name != "split" else sum(own) + sum(other), 3, device=kernel_device).requires_grad_()
    if name == "concat":
        moved, kept = jagged_concat(x, draw(sum(other), 3, device=kernel_device), *schedules), torch.ones_like(x)
    elif name == "split":
        parts = jagged_split(x, *schedules)
        moved, kept = torch.cat(parts), torch.ones_like(x)
    else:
        moved, _ = jagged_last(x, schedules[0], 2, 4)
        kept = torch.zeros_like(x)
        kept[[7, 8, 10, 11]] = 1.0
    (dx,) = torch.autograd.grad(moved.pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    torch.testing.assert_close(ddx, 36.0 * x.detach().pow(3) * kept)


# Refusals


def pair(**changes: Any) -> dict[str, Any]:
    x = torch.zeros(8, 4)
    schedule = schedule_of([5, 3], CPU)
    return {"x": x, "y": x, "x_schedule": schedule, "y_schedule": schedule, **changes}


REFUSED_CONCAT: dict[str, tuple[dict[str, Any], str]] = {
    "one_dimension": ({"x": torch.zeros(8)}, r"x must have shape \(L, C\) or \(L, H, D\), got \(8,\)"),
    "rows": ({"y": torch.zeros(9, 4)}, "y has 9 rows, the schedules say 8"),
    "columns": ({"y": torch.zeros(8, 5)}, r"differ in their rows only, got \(8, 4\) and \(8, 5\)"),
    "heads": ({"y": torch.zeros(8, 2, 2)}, r"got \(8, 4\) and \(8, 2, 2\)"),
    "dtype": ({"y": torch.zeros(8, 4).half()}, "share one dtype .* x torch.float32, y torch.float16"),
    "integers": ({"x": torch.zeros(8, 4).int(), "y": torch.zeros(8, 4).int()}, "got x torch.int32"),
    "device": ({"y": torch.zeros(8, 4, device="meta")}, "x on cpu, y on meta"),
    "users": ({"y_schedule": schedule_of([5, 3, 0], CPU)}, "same users; their schedules have 2 and 3"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_CONCAT.values(), ids=REFUSED_CONCAT.keys())
def test_concat_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jagged_concat(**pair(**changes))


def test_split_refuses() -> None:
    schedule = schedule_of([5, 3], CPU)
    with pytest.raises(ValueError, match="z has 15 rows, the schedules say 16"):
        jagged_split(torch.zeros(15, 4), schedule, schedule)
    with pytest.raises(ValueError, match="their schedules have 2 and 1"):
        jagged_split(torch.zeros(16, 4), schedule, schedule_of([8], CPU))


@pytest.mark.parametrize(
    ("n", "total", "message"),
    [
        (-1, 0, "n must be at least 0 rows, got -1"),
        (2, 5, "total must lie between 0 and 4, the last 2 rows of every user at most; got 5"),
        (9, 9, "between 0 and 8"),
        (4, -1, "got -1"),
        (4, 8, "the last 4 rows of every user are 7, not total=8"),
    ],
)
def test_last_refuses(n: int, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jagged_last(torch.zeros(8, 4), schedule_of([5, 3], CPU), n, total)


def test_wrong_offsets_touch_no_foreign_memory(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """Nothing is read from outside of x, which is NaN, and what x's offsets leave no place for is not written."""
    monkeypatch.setattr(tile_lists, "checks_values", lambda device: False)
    guard, rows, C = 64, 50, 5
    around = torch.full((rows + 2 * guard, C), float("nan"), device=kernel_device)
    x = around[guard : guard + rows].normal_()
    right = schedule_of([30, 20], kernel_device)
    for bounds in ([0, 10**9, -3], [-(10**9), 20, 10**9], [10**9, -5, 2**62]):
        wrong = Schedule(torch.tensor(bounds, device=kernel_device), rows, rows)
        split = jagged_split(torch.cat([x, x]), wrong, right)
        last = jagged_last(x, wrong, 7, 14)[0]
        concat = jagged_concat(x, x, right, wrong), jagged_concat(x, x, wrong, right)
        for result in (*split, last, *concat):
            known = result[~result.isnan()]
            assert torch.isin(known, torch.cat([x.flatten(), x.new_zeros(1)])).all()
        _, dx = run(lambda x, wrong=wrong: jagged_last(x, wrong, 7, 14)[0], [x], [torch.ones_like(last)])
        assert torch.isin(dx[~dx.isnan()], torch.tensor([0.0, 1.0], device=kernel_device)).all()


# Tracing


def test_operators_are_registered_right(kernel_device: torch.device) -> None:
    """Schema, fake implementation and autograd of each, by torch's own checks."""
    own, other = schedule_of([3, 0, 9], kernel_device), schedule_of([2, 4, 0], kernel_device)
    x, y, z = (draw(n, 5, device=kernel_device).requires_grad_() for n in (12, 6, 18))
    tiles = [schedule.query_tiles([BLOCK], causal=False)[0] for schedule in (own, other)]
    offsets = own.queries[0], other.queries[0]
    torch.library.opcheck(op._concat_op.op, (x, y, *tiles, *offsets))
    torch.library.opcheck(op._split_op.op, (z, *tiles, *offsets, 12, 6))
    last = torch.tensor([0, 2, 2, 4], device=kernel_device)
    (last_tiles,) = Schedule(last, 4, 2).query_tiles([BLOCK], causal=False)
    where = (last_tiles, tiles[0], last, offsets[0], 2)
    torch.library.opcheck(op._last_op.op, (x, *where, 4))
    torch.library.opcheck(op._last_backward_op.op, (draw(4, 5, device=kernel_device).requires_grad_(), *where, 12))


def there_and_back(x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, longest: int, total: int) -> Any:
    x_schedule = Schedule(x_offsets, x.shape[0], longest, check_values=True)
    y_schedule = Schedule(y_offsets, y.shape[0], longest, check_values=True)
    z = jagged_concat(x, y, x_schedule, y_schedule)
    first, second = jagged_split(z.square(), x_schedule, y_schedule)
    last, offsets = jagged_last(first, x_schedule, 3, total)
    return last, second * offsets[-1]


def test_compiles_without_graph_breaks(kernel_device: torch.device) -> None:
    """torch.compile traces through with any total, and runs the very same kernel."""
    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=True)
    for own, other in (([3, 0, 40], [2, 5, 7]), ([17, 2], [0, 9])):
        offsets = [schedule_of(n, kernel_device).queries[0] for n in (own, other)]
        x, y = (draw(sum(n), 2, 4, device=kernel_device) for n in (own, other))
        args = (*offsets, max(own), sum(min(n, 3) for n in own))
        douts = [draw(rows, 2, 4, device=kernel_device, seed=3) for rows in (args[-1], sum(other))]
        results = [run(lambda *leaves, f=f, a=args: f(*leaves, *a), [x, y], douts) for f in (there_and_back, compiled)]
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(actual, expected)


def test_wrong_total_is_found_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    offsets = torch.tensor([0, 5, 8])
    with pytest.raises(ValueError, match="from 0 to 6; they must go from 0 to the number of rows, 5"):
        compiled(torch.zeros(8, 4), torch.zeros(8, 4), offsets, offsets, 5, 5)
