"""Jagged with dense, jagged with jagged, jagged to padded and back: values, gradients, refusals, tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged import Schedule, tile_lists
from kernels.jagged.score_layout import BLOCK
from kernels.jagged_elementwise import (
    dropout_mask,
    jagged_dense_elementwise,
    jagged_jagged_elementwise,
    jagged_to_padded,
    op,
    op_padded,
    padded_to_jagged,
)
from kernels.jagged_elementwise.dense import is_kept
from kernels.jagged_elementwise.reference import (
    reference_jagged_dense_elementwise,
    reference_jagged_jagged_elementwise,
    reference_jagged_to_padded,
    reference_padded_to_jagged,
)
from tests.kernels.jagged_cases import LENGTHS
from tests.kernels.jagged_operands import draw, longer, schedule_of
from tests.numerics import FORWARD_FACTOR, GRADIENT_FACTOR, assert_matches_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MIXED = [3, 0, 40]
PAIRS: dict[str, tuple[list[int], list[int]]] = {
    "one_user": ([40], [21]),
    "either_way": ([3, 40, 1, 17], [33, 2, 1, 18]),
    "empty_sides": ([0, 9, 0, 3], [2, 0, 0, 35]),
    "nothing_in_one": ([0, 0], [5, 20]),
    "no_users": ([], []),
}


def spread(x: Tensor, layout: str) -> Tensor:
    """The same matrix with other strides; what lies between is NaN."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3), float("nan"))
    wide[..., 1::2, 2:-1] = x
    return wide[..., 1::2, 2:-1]


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of the inputs; the output's gradient is random, or that of a sum."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    dout = torch.ones((), dtype=out.dtype, device=out.device).expand_as(out) if dout is None else dout
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=True, materialize_grads=True)
    return [out.detach(), *gradients]


def assert_follows(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    lengths: Sequence[Sequence[int] | None],
    magnitude: float = 1.0,
) -> None:
    """Output and gradients against float64; `lengths` of the sequences of the output and of every input."""
    shape = reference(*inputs).shape
    dout = draw(*shape, device=inputs[0].device, dtype=inputs[0].dtype, seed=9)
    actual, baseline = run(function, inputs, dout), run(reference, inputs, dout)
    exact = run(reference, [x.double() for x in inputs], dout.double())
    for i, triple in enumerate(zip(actual, baseline, exact, strict=True)):
        assert_matches_reference(
            *triple,
            factor=FORWARD_FACTOR if i == 0 else GRADIENT_FACTOR,
            name="out" if i == 0 else f"gradient {i}",
            lengths=lengths[i],
            magnitude=magnitude,
        )


def assert_dense_follows(
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    C: int = 19,
    offsets_dtype: torch.dtype = torch.int64,
    **options: Any,
) -> None:
    lengths = longer(lengths, device)
    schedule = schedule_of(lengths, device, offsets_dtype)
    if options.get("dropout_p"):
        options["seed"] = torch.tensor([2**61 + 5], device=device)
    x = draw(sum(lengths), C, device=device, dtype=dtype)
    dense = draw(len(lengths), C, device=device, dtype=dtype, seed=1)
    assert_follows(
        lambda x, dense: jagged_dense_elementwise(x, dense, schedule, **options),
        lambda x, dense: reference_jagged_dense_elementwise(x, dense, schedule.queries[0], **options),
        [x, dense],
        [lengths, lengths, [1] * len(lengths)],
        magnitude=1.0 / (1.0 - options.get("dropout_p", 0.0)),
    )


@pytest.mark.parametrize("options", [{}, {"op": "mul", "activation": "silu"}], ids=["sum", "product_silu"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_dense_lengths(lengths: list[int], options: dict[str, Any], kernel_device: torch.device) -> None:
    assert_dense_follows(lengths, kernel_device, offsets_dtype=torch.int32, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("kind", ["add", "mul"])
def test_dense_functions(kind: str, activation: str | None, dropout_p: float, kernel_device: torch.device) -> None:
    assert_dense_follows(MIXED, kernel_device, op=kind, activation=activation, dropout_p=dropout_p)


@pytest.mark.parametrize("options", [{}, {"op": "mul", "activation": "gelu", "dropout_p": 0.3}], ids=["sum", "all"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dense_dtypes(dtype: torch.dtype, options: dict[str, Any], kernel_device: torch.device) -> None:
    assert_dense_follows(MIXED, kernel_device, dtype, **options)


@pytest.mark.parametrize("C", [1, 2, 16, 64, 65, 130])
def test_dense_columns(C: int, kernel_device: torch.device) -> None:
    assert_dense_follows([3, 0, 20], kernel_device, C=C, op="mul", activation="relu", dropout_p=0.2)


def test_dense_many_tiles_of_a_user(kernel_device: torch.device) -> None:
    """More partial sums than are added at once."""
    n = 2 * 16 * BLOCK + 5
    assert_dense_follows([n if kernel_device.type == "cpu" else n // 7 + 1, 1], kernel_device, C=3, op="mul")


@pytest.mark.parametrize("layout", ["in_a_wider_one", "transposed"])
def test_dense_strides(layout: str, kernel_device: torch.device) -> None:
    """Same bits as from contiguous tensors."""
    lengths = longer([18, 0, 5], kernel_device)
    schedule = schedule_of(lengths, kernel_device)
    inputs = [draw(n, 16, device=kernel_device) for n in (sum(lengths), len(lengths))]
    dout = draw(sum(lengths), 16, device=kernel_device, seed=3)

    def function(x: Tensor, dense: Tensor) -> Tensor:
        return jagged_dense_elementwise(x, dense, schedule, op="mul", activation="silu")

    expected = run(function, inputs, dout)
    actual = run(function, [spread(x, layout) for x in inputs], spread(dout, layout))
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(run(function, inputs), run(function, inputs, torch.ones_like(dout)), strict=True):
        assert torch.equal(x, y), "of an expanded gradient"


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}, {"op": "mul", "activation": "gelu"}], ids=str)
def test_dense_one_gradient_only(options: dict[str, Any], kernel_device: torch.device) -> None:
    """The one that is asked for is what it is in company, but for the order in which a sum is added up."""
    schedule = schedule_of([20, 0, 5], kernel_device)
    x, dense, dout = (draw(n, 6, device=kernel_device, seed=n) for n in (25, 3, 25))
    if options.get("dropout_p"):
        options = {**options, "seed": torch.tensor([1], device=kernel_device)}
    _, dx, ddense = run(lambda *leaves: jagged_dense_elementwise(*leaves, schedule, **options), [x, dense], dout)
    _, dx_alone = run(lambda x: jagged_dense_elementwise(x, dense, schedule, **options), [x], dout)
    _, ddense_alone = run(lambda dense: jagged_dense_elementwise(x, dense, schedule, **options), [dense], dout)
    assert torch.equal(dx_alone, dx)
    torch.testing.assert_close(ddense_alone, ddense, rtol=1e-5, atol=1e-5)


def test_dense_same_bits_in_any_company(kernel_device: torch.device) -> None:
    """A user's gradients don't depend on where its rows lie and who else is there."""
    n = 3 * BLOCK + 7
    x, dense, dout = (draw(rows, 6, device=kernel_device, seed=rows) for rows in (n, 1, n))

    def gradient(before: int) -> Tensor:
        schedule = schedule_of([before, n, 3], kernel_device)
        around = [draw(before, 6, device=kernel_device), draw(3, 6, device=kernel_device)]
        x_all, dout_all = (torch.cat([around[0], part, around[1]]) for part in (x, dout))
        function = lambda dense: jagged_dense_elementwise(x_all, dense, schedule, op="mul")  # noqa: E731
        return run(function, [dense.expand(3, 6)], dout_all)[1][1]

    alone = gradient(0)
    assert alone.any()
    for before in (1, BLOCK - 1, BLOCK):
        assert torch.equal(gradient(before), alone)


def test_dense_nan_and_infinity_stay_where_they_are(kernel_device: torch.device) -> None:
    """relu keeps NaN, as torch does; an infinite dense row is not seen past its user's end."""
    schedule = schedule_of([2, 1], kernel_device)
    x, dense = torch.ones(3, 2, device=kernel_device), torch.ones(2, 2, device=kernel_device)
    x[0, 0], dense[1] = float("nan"), float("inf")
    out, dx, ddense = run(lambda *leaves: jagged_dense_elementwise(*leaves, schedule, activation="relu"), [x, dense])
    inf = float("inf")
    expected = torch.tensor([[float("nan"), 2.0], [2.0, 2.0], [inf, inf]], device=kernel_device)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0.0, atol=0.0)
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(ddense, torch.tensor([[2.0, 2.0], [1.0, 1.0]], device=kernel_device))
    _, _, ddense = run(lambda *leaves: jagged_dense_elementwise(*leaves, schedule, op="mul"), [x, dense])
    assert torch.equal(ddense[1], torch.ones(2, device=kernel_device)), "0 x inf of rows that are not there"


@pytest.mark.parametrize(("dropout_p", "C"), [(0.5, 6), (0.1, 64)])
def test_dropped_fraction(dropout_p: float, C: int, kernel_device: torch.device) -> None:
    lengths = [64 * 8 // C * 8, 0, 64]
    schedule = schedule_of(lengths, kernel_device)
    x = torch.ones(sum(lengths), C, device=kernel_device)
    masks = []
    for number in (5, 5 + 2**40):
        seed = torch.tensor([number], device=kernel_device)
        out, dx, _ = run(
            lambda x, dense, seed=seed: jagged_dense_elementwise(x, dense, schedule, dropout_p=dropout_p, seed=seed),
            [x, torch.zeros(3, C, device=kernel_device)],
        )
        kept = out > 0
        assert torch.equal(kept, dropout_mask(seed, *x.shape, dropout_p))
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1.0 / (1.0 - dropout_p)))
        assert torch.equal(dx, out)
        # At least 4480 elements: 0.03 is four standard deviations.
        assert (~kept).float().mean().item() == pytest.approx(dropout_p, abs=0.03)
        masks.append(kept)
    both = (~masks[0] & ~masks[1]).float().mean().item()
    assert both == pytest.approx(dropout_p**2, abs=0.03), "another seed, another mask"
    shifted = (~masks[0][:, 1:] & ~masks[0][:, :-1]).float().mean().item()
    assert shifted == pytest.approx(dropout_p**2, abs=0.03), "neighbours are independent"


@triton.jit
def is_kept_kernel(p_out, p_seed, first_row, drop_below):
    """Of 16 x 16 elements, the rows counted from first_row."""
    kept = is_kept(tl.load(p_seed), first_row.to(tl.int64), 0, drop_below, 16, 16, 16)
    tl.store(p_out + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], kept.to(tl.float32))


def test_dropout_counts_past_32_bits(kernel_device: torch.device) -> None:
    """Rows that are 2^32 counters apart, 4 in each row, have other masks."""
    seed = torch.tensor([3], device=kernel_device)
    low, high = (torch.zeros(16, 16, device=kernel_device) for _ in range(2))
    is_kept_kernel[(1,)](low, seed, 2**10, 2**31)
    is_kept_kernel[(1,)](high, seed, 2**10 + 2**30, 2**31)
    assert torch.equal(low.bool(), dropout_mask(seed, 2**10 + 16, 16, 0.5)[2**10 :])
    assert not torch.equal(low, high)


def test_dropout_without_a_seed_draws_one(kernel_device: torch.device) -> None:
    schedule = schedule_of([20, 5], kernel_device)
    args = torch.ones(25, 8, device=kernel_device), torch.ones(2, 8, device=kernel_device), schedule
    torch.manual_seed(3)
    first, second = (jagged_dense_elementwise(*args, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(jagged_dense_elementwise(*args, dropout_p=0.5), first)
    assert not torch.equal(first, second)


# Jagged with jagged


@pytest.mark.parametrize("policy", ["shorter", "longer"])
@pytest.mark.parametrize("kind", ["add", "mul"])
@pytest.mark.parametrize(("own", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_pair(own: list[int], other: list[int], kind: str, policy: str, kernel_device: torch.device) -> None:
    assert_pair_follows(own, other, kind, policy, kernel_device, torch.float32)


@pytest.mark.parametrize("policy", ["shorter", "longer"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_pair_dtypes(dtype: torch.dtype, policy: str, kernel_device: torch.device) -> None:
    assert_pair_follows(*PAIRS["either_way"], "mul", policy, kernel_device, dtype, C=17)


def assert_pair_follows(
    own: list[int],
    other: list[int],
    kind: str,
    policy: str,
    device: torch.device,
    dtype: torch.dtype,
    C: int = 5,
) -> None:
    own, other = longer(own, device), longer(other, device)
    x_schedule, y_schedule = schedule_of(own, device), schedule_of(other, device, torch.int32)
    expected = [(min if policy == "shorter" else max)(*pair) for pair in zip(own, other, strict=True)]
    total = sum(expected)
    x, y = (draw(sum(n), C, device=device, dtype=dtype, seed=len(n) + i) for i, n in enumerate((own, other)))
    options: dict[str, Any] = {"op": kind, "lengths": policy}
    _, offsets = jagged_jagged_elementwise(x, y, x_schedule, y_schedule, total=total, **options)
    assert offsets.diff().tolist() == expected
    assert offsets.dtype == torch.int64
    assert_follows(
        lambda x, y: jagged_jagged_elementwise(
            spread(x, "wider"), spread(y, "wider"), x_schedule, y_schedule, total=total, **options
        )[0],
        lambda x, y: reference_jagged_jagged_elementwise(x, y, x_schedule.queries[0], y_schedule.queries[0], **options),
        [x, y],
        [expected, own, other],
    )


@pytest.mark.parametrize("policy", ["shorter", "longer"])
def test_pair_second_derivative(policy: str, kernel_device: torch.device) -> None:
    """The gradient is made of the operator itself, so it has one too."""
    own, other = PAIRS["either_way"]
    x_schedule, y_schedule = schedule_of(own, kernel_device), schedule_of(other, kernel_device)
    total = sum(map(min if policy == "shorter" else max, own, other))

    def second(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, y = (draw(sum(n), 3, device=kernel_device, dtype=dtype).requires_grad_() for n in (own, other))
        dx, dy = torch.autograd.grad(function(x, y).pow(3).sum(), (x, y), create_graph=True)
        return list(torch.autograd.grad(dx.square().sum() + dy.square().sum(), (x, y)))

    actual = second(
        lambda x, y: jagged_jagged_elementwise(x, y, x_schedule, y_schedule, op="mul", lengths=policy, total=total)[0],
        torch.float32,
    )
    exact = second(
        lambda x, y: reference_jagged_jagged_elementwise(
            x, y, x_schedule.queries[0], y_schedule.queries[0], op="mul", lengths=policy
        ),
        torch.float64,
    )
    for x, y in zip(actual, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["add", "mul"])
def test_pair_of_equal_lengths(kind: str, kernel_device: torch.device) -> None:
    schedule = schedule_of(MIXED, kernel_device)
    x, y = (draw(sum(MIXED), 5, device=kernel_device, seed=i) for i in range(2))
    values, offsets = jagged_jagged_elementwise(x, y, schedule, schedule, op=kind)
    assert torch.equal(values, x + y if kind == "add" else x * y)
    assert torch.equal(offsets, schedule.queries[0])


# Jagged to padded and back


@pytest.mark.parametrize("change", [-7, 35], ids=["cut", "filled"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_padded(lengths: list[int], change: int, kernel_device: torch.device) -> None:
    """Both ways; the result is a copy, so the values are exactly those of the reference."""
    lengths = longer(lengths, kernel_device)
    schedule, N, C = schedule_of(lengths, kernel_device), max(max(lengths, default=0) + change, 0), 5
    x, padded = draw(sum(lengths), C, device=kernel_device), draw(len(lengths), N, C, device=kernel_device, seed=1)
    offsets = schedule.queries[0]
    pairs = (
        (
            lambda x: jagged_to_padded(x, schedule, N, fill=0.5),
            lambda x: reference_jagged_to_padded(x, offsets, N, 0.5),
            x,
        ),
        (lambda x: padded_to_jagged(x, schedule), lambda x: reference_padded_to_jagged(x, offsets), padded),
    )
    for function, reference, data in pairs:
        dout = draw(*reference(data).shape, device=kernel_device, seed=2)
        expected = run(reference, [data], dout)
        layout = "wider" if change < 0 else "transposed"
        actual = run(function, [spread(data, layout)], spread(dout, layout))
        for result, right in zip(actual, expected, strict=True):
            assert torch.equal(result, right)


@pytest.mark.parametrize(("dtype", "fill"), list(zip(DTYPES, [0, -1.5, float("-inf")], strict=True)), ids=str)
def test_padded_dtypes(dtype: torch.dtype, fill: float, kernel_device: torch.device) -> None:
    schedule = schedule_of(MIXED, kernel_device)
    x = draw(sum(MIXED), 70, device=kernel_device, dtype=dtype)
    padded = jagged_to_padded(x, schedule, fill=fill)
    assert torch.equal(padded, reference_jagged_to_padded(x, schedule.queries[0], max(MIXED), fill))
    assert torch.equal(padded_to_jagged(padded, schedule), x)


# Refusals


def good(**changes: Any) -> dict[str, Any]:
    cpu = torch.device("cpu")
    return {"x": torch.zeros(8, 4), "dense": torch.zeros(2, 4), "schedule": schedule_of([5, 3], cpu), **changes}


REFUSED_DENSE: dict[str, tuple[dict[str, Any], str]] = {
    "three_dimensions": ({"x": torch.zeros(8, 1, 4)}, r"x must have shape \(L, C\) .* got \(8, 1, 4\)"),
    "rows": ({"x": torch.zeros(7, 4)}, "x has 7 rows, the schedule says 8"),
    "users": ({"dense": torch.zeros(3, 4)}, r"dense must have shape \(2, 4\), .* got \(3, 4\)"),
    "columns": ({"dense": torch.zeros(2, 5)}, r"got \(2, 5\)"),
    "dtype": ({"dense": torch.zeros(2, 4).half()}, "share one dtype .* x torch.float32, dense torch.float16"),
    "float64": ({"x": torch.zeros(8, 4).double(), "dense": torch.zeros(2, 4).double()}, "got x torch.float64"),
    "device": ({"dense": torch.zeros(2, 4, device="meta")}, "x on cpu, dense on meta"),
    "op": ({"op": "sub"}, "op must be one of add, mul; got 'sub'"),
    "activation": ({"activation": "tanh"}, "activation must be one of None, relu, silu, gelu; got 'tanh'"),
    "dropout": ({"dropout_p": 1.0}, "dropout_p must be at least 0 and less than 1, got 1.0"),
    "dropout_nan": ({"dropout_p": float("nan")}, "less than 1, got nan"),
    "seed": ({"dropout_p": 0.1, "seed": torch.tensor(1)}, r"seed must be one int64 of shape \(1,\) on cpu, .* \(\)"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_DENSE.values(), ids=REFUSED_DENSE.keys())
def test_dense_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jagged_dense_elementwise(**good(**changes))


CPU = torch.device("cpu")
REFUSED_PAIR: dict[str, tuple[dict[str, Any], str]] = {
    "columns": ({"y": torch.zeros(8, 5)}, "got 4 and 5 columns, 2 and 2 users"),
    "users": ({"y_schedule": schedule_of([5, 3, 0], CPU)}, "4 and 4 columns, 2 and 3 users"),
    "rows": ({"y": torch.zeros(9, 4)}, "y has 9 rows, the schedule says 8"),
    "dtype": ({"y": torch.zeros(8, 4).half()}, "share one dtype"),
    "op": ({"op": "div"}, "op must be one of add, mul"),
    "policy": ({"lengths": "min"}, "lengths must be one of equal, shorter, longer; got 'min'"),
    "unequal_rows": (
        {"y": torch.zeros(9, 4), "y_schedule": schedule_of([5, 4], CPU)},
        "equally many rows; got 8, 9 and total=None",
    ),
    "total_of_equal": ({"total": 9}, "got 8, 8 and total=9"),
    "unequal_users": ({"y_schedule": schedule_of([4, 4], CPU)}, "user 0 has 5 rows of x and 4 of y"),
    "no_total": ({"lengths": "shorter"}, 'lengths="shorter" needs total'),
    "total_too_large": ({"lengths": "shorter", "total": 9}, "between 0 and 8, as x has 8 rows and y has 8; got 9"),
    "total_too_small": ({"lengths": "longer", "total": 7}, "between 8 and 16"),
    "wrong_total": ({"lengths": "longer", "total": 9}, 'lengths="longer" makes 8 rows, not total=9'),
    "wrong_max_seqlen": ({"lengths": "longer", "total": 8, "max_seqlen": 4}, "user 0 has 5 tokens, more than"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_PAIR.values(), ids=REFUSED_PAIR.keys())
def test_pair_refuses(changes: dict[str, Any], message: str) -> None:
    schedule = schedule_of([5, 3], CPU)
    x = torch.zeros(8, 4)
    with pytest.raises(ValueError, match=message):
        jagged_jagged_elementwise(**{"x": x, "y": x, "x_schedule": schedule, "y_schedule": schedule, **changes})


def test_padded_refuses() -> None:
    schedule = schedule_of([5, 3], CPU)
    for x, options, message in (
        (torch.zeros(8), {}, r"x must have shape \(L, C\)"),
        (torch.zeros(7, 4), {}, "x has 7 rows, the schedule says 8"),
        (torch.zeros(8, 4), {"max_length": -1}, "max_length must be at least 0 rows, got -1"),
        (torch.zeros(8, 4).int(), {}, "share one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            jagged_to_padded(x, schedule, **options)
    for x, message in ((torch.zeros(3, 5, 4), r"\(2, N, C\), 2 users .* got \(3, 5, 4\)"), (torch.zeros(2, 5), "N, C")):
        with pytest.raises(ValueError, match=message):
            padded_to_jagged(x, schedule)


def test_wrong_offsets_touch_no_foreign_memory(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """Of 50 rows between NaN, here called 10^9, each user has at most max_seqlen = 20, and the last has none."""
    monkeypatch.setattr(tile_lists, "checks_values", lambda device: False)
    guard, rows, C = 64, 50, 5
    around = torch.full((rows + 2 * guard, C), float("nan"), device=kernel_device)
    x = around[guard : guard + rows].normal_()
    offsets = torch.tensor([0, 20, 10**9, -3], device=kernel_device)
    schedule = Schedule(offsets, rows, 20)
    dense = draw(3, C, device=kernel_device)
    out, dx, ddense = run(lambda x, dense: jagged_dense_elementwise(x, dense, schedule, op="mul"), [x, dense])
    own = dense.repeat_interleave(torch.tensor([20, 20, 0], device=kernel_device), dim=0)
    assert torch.equal(out[:40], x[:40] * own)
    assert torch.equal(dx[:40], own)
    assert out[40:].isnan().all()
    assert dx[40:].isnan().all()
    torch.testing.assert_close(ddense[:2], x[:40].unflatten(0, (2, 20)).sum(1), rtol=1e-4, atol=1e-5)
    assert not ddense[2].any()
    padded = jagged_to_padded(x, schedule, 30)
    assert torch.equal(padded[:2, :20], x[:40].unflatten(0, (2, 20)))
    assert not padded[:, 20:].any()
    assert not padded[2].any()
    values, _ = jagged_jagged_elementwise(x, x, schedule, schedule, op="add", lengths="longer", total=60)
    assert torch.isin(values[~values.isnan()], torch.cat([2 * x.flatten(), x.flatten()])).all()


# Tracing


def test_operators_are_registered_right(kernel_device: torch.device) -> None:
    """Schema, fake implementation and autograd of each, by torch's own checks."""
    lengths, C = [3, 0, 9], 3
    schedule, L = schedule_of(lengths, kernel_device), sum(lengths)
    (tiles,), offsets = schedule.query_tiles([BLOCK], causal=False), schedule.queries[0]
    seed = torch.tensor([3], device=kernel_device)
    x, dense = (draw(n, C, device=kernel_device).requires_grad_() for n in (L, 3))
    padded = draw(3, 5, C, device=kernel_device).requires_grad_()
    checks: list[tuple[Any, tuple]] = [
        (op._dense_op, (x, dense, tiles, offsets, seed, 9, "mul", "gelu", 0.2)),
        (op._pair_op, (x, x, *[tiles] * 3, *[offsets] * 3, L, 9, 9, 9, 1.0, 1.0, "mul")),
        (op_padded._to_padded_op, (x, tiles, offsets, 9, 5, 0.5)),
        (op_padded._to_jagged_op, (padded, tiles, offsets, 9, L)),
    ]
    x, dense = x.detach(), dense.detach()
    for needs in ((True, False), (False, True)):
        arguments = (x, x, dense, tiles, offsets, seed, 9, "mul", "silu", 0.2, *needs)
        checks.append((op._dense_backward_op, arguments))
    for operator, arguments in checks:
        torch.library.opcheck(operator.op, arguments)


def all_of_it(x: Tensor, dense: Tensor, offsets: Tensor, max_seqlen: int) -> Tensor:
    schedule = Schedule(offsets, x.shape[0], max_seqlen, check_values=True)
    seed = torch.full((1,), 7, device=x.device)
    h = jagged_dense_elementwise(x, dense, schedule, op="mul", activation="silu", dropout_p=0.3, seed=seed)
    h = padded_to_jagged(jagged_to_padded(h, schedule, 30, fill=2.0), schedule)
    h, _ = jagged_jagged_elementwise(h, x, schedule, schedule, op="mul", lengths="longer", total=x.shape[0])
    h, _ = jagged_jagged_elementwise(h, x, schedule, schedule, op="mul")
    return jagged_dense_elementwise(h, dense, schedule)


def test_compiles_without_graph_breaks(kernel_device: torch.device) -> None:
    """torch.compile traces through with any total, and runs the very same kernels."""
    torch._dynamo.reset()
    compiled = torch.compile(all_of_it, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 0, 40], [17, 2]):
        offsets = schedule_of(lengths, kernel_device).queries[0]
        inputs = [draw(n, 5, device=kernel_device) for n in (sum(lengths), len(lengths))]
        dout = draw(sum(lengths), 5, device=kernel_device, seed=2)
        args = (offsets, max(lengths))
        results = [run(lambda *leaves, f=f, a=args: f(*leaves, *a), inputs, dout) for f in (all_of_it, compiled)]
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(actual, expected)


def test_wrong_values_are_found_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(all_of_it, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="user 0 has 5 tokens, more than max_seqlen=4"):
        compiled(torch.zeros(8, 4), torch.zeros(2, 4), torch.tensor([0, 5, 8]), 4)
