"""Softmax over a user's tokens and over the rows of its scores: values and gradients, refusals, tracing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.jagged import Schedule
from kernels.jagged.score_layout import ScoreLayout
from kernels.jagged_softmax import jagged_score_softmax, jagged_softmax
from kernels.jagged_softmax.reference import reference_jagged_score_softmax, reference_jagged_softmax
from tests.kernels.jagged_operands import DTYPES, LENGTHS, Users, assert_follows_reference, make, with_gradients

CPU = torch.device("cpu")
CROSS = Users((5, 0, 40, 1, 7, 3), (3, 4, 70, 0, 33, 1))
SMALL = Users((5, 3))
CANDIDATES = Users((40, 3, 0, 70, 1, 34), targets=(2, 3, 0, 33, 1, 0))


def check_columns(users: Users, device: torch.device, dtype: torch.dtype, columns: int, scale: float) -> None:
    users = users.on_device(device)
    schedule, offsets = users.schedule(device), users.offsets(device)
    (x,) = make(device, dtype, (users.total, columns))
    assert_follows_reference(
        lambda x: jagged_softmax(x, schedule, scale=scale),
        lambda x: reference_jagged_softmax(x, offsets, scale),
        [x],
        lengths=[users.lengths, users.lengths],
    )


def check_rows(
    users: Users, device: torch.device, dtype: torch.dtype, H: int, causal: bool, window: int | None, scale: float
) -> None:
    users = users.on_device(device)
    layout, offsets = users.layout(device), users.offsets(device)
    key_offsets = offsets if users.key_lengths is None else users.key_offsets(device)
    (scores,) = make(device, dtype, (H, layout.total))
    assert_follows_reference(
        lambda x: jagged_score_softmax(x, layout, causal=causal, window=window, scale=scale),
        lambda x: reference_jagged_score_softmax(
            x,
            offsets,
            key_offsets,
            causal=causal,
            window=window,
            num_targets=users.num_targets(device),
            scale=scale,
        ),
        [scores],
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", LENGTHS)
def test_awkward_lengths(name: str, kernel_device: torch.device) -> None:
    check_columns(Users(LENGTHS[name]), kernel_device, torch.float32, columns=5, scale=1.0)
    check_rows(Users(LENGTHS[name]), kernel_device, torch.float32, H=2, causal=False, window=None, scale=1.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("has_candidates", [False, True])
def test_masks(has_candidates: bool, causal: bool, window: int | None, kernel_device: torch.device) -> None:
    users = CANDIDATES if has_candidates else Users(CANDIDATES.lengths)
    check_rows(users, kernel_device, torch.float32, H=1, causal=causal, window=window, scale=1.5)


@pytest.mark.usefixtures("poisoned_memory")
def test_queries_and_keys_of_other_lengths(kernel_device: torch.device) -> None:
    check_rows(CROSS, kernel_device, torch.float32, H=2, causal=False, window=None, scale=-0.7)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 64, 130])
def test_dtypes(columns: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    check_columns(Users((7, 40, 0, 1)), kernel_device, dtype, columns, scale=2.0)
    check_rows(Users((7, 40, 0, 1)), kernel_device, dtype, H=2, causal=True, window=None, scale=2.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [(150, 3), (64, 65), (129,), (256, 300), (600,)])
def test_columns_of_users_longer_than_a_block(lengths: tuple[int, ...], kernel_device: torch.device) -> None:
    check_columns(Users(lengths), kernel_device, torch.float32, columns=64, scale=1.5)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("window", [None, 5, 120])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(150, 3), (64, 65), pytest.param((300, 400), marks=pytest.mark.gpu)])
def test_more_keys_than_a_block_has(
    lengths: tuple[int, ...], causal: bool, window: int | None, kernel_device: torch.device
) -> None:
    for targets in (None, (7, 3)):
        users = Users(lengths, targets=targets)
        check_rows(users, kernel_device, torch.float32, H=1, causal=causal, window=window, scale=1.5)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("keys", [150, pytest.param(400, marks=pytest.mark.gpu)])
def test_more_keys_of_others_than_a_block_has(keys: int, kernel_device: torch.device) -> None:
    check_rows(Users((40, 3), (keys, 9)), kernel_device, torch.float32, H=2, causal=False, window=None, scale=1.5)


def test_what_is_minus_infinity_everywhere_gives_zero(kernel_device: torch.device) -> None:
    users = Users((150, 3)).on_device(kernel_device)
    x = torch.full((users.total, 64), float("-inf"), device=kernel_device)
    assert not jagged_softmax(x, users.schedule(kernel_device)).any()
    scores = torch.full((1, users.layout(kernel_device).total), float("-inf"), device=kernel_device)
    assert not jagged_score_softmax(scores, users.layout(kernel_device)).any()


def random_case(seed: int) -> tuple[Users, torch.dtype, dict[str, Any]]:
    generator = random.Random(seed)
    draw = generator.randint
    lengths = tuple(generator.choice([0, 1, draw(2, 20), draw(20, 70)]) for _ in range(draw(1, 5)))
    kind = generator.choice(["plain", "cross", "candidates"])
    keys = tuple(generator.choice([0, 1, draw(2, 70)]) for _ in lengths) if kind == "cross" else None
    targets = tuple(draw(0, n) for n in lengths) if kind == "candidates" else None
    is_self = kind != "cross"
    options = {
        "causal": is_self and generator.random() < 0.5,
        "window": draw(1, 60) if is_self and generator.random() < 0.4 else None,
        "scale": generator.choice([0.1, 1.0, 3.0]),
        "H": draw(1, 3),
    }
    return Users(lengths, keys, targets), generator.choice(DTYPES), options


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.gpu) for seed in range(6, 120))])
def test_random_cases(seed: int, kernel_device: torch.device) -> None:
    users, dtype, options = random_case(seed)
    check_rows(users, kernel_device, dtype, **options)
    check_columns(Users(users.lengths), kernel_device, dtype, seed % 90 + 1, options["scale"])


def test_large_scores_do_not_overflow(kernel_device: torch.device) -> None:
    """Base-2 exponentials are relative to the maximum, also where it lies in a later tile."""
    users = Users((70, 3))
    layout, schedule = users.layout(kernel_device), users.schedule(kernel_device)
    scores = torch.linspace(-3e4, 3e4, layout.total, device=kernel_device).repeat(2, 1)
    p = jagged_score_softmax(scores, layout)
    sums = p[:, : 70 * 72].view(2, 70, 72).sum(dim=2)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    x = torch.linspace(-3e4, 3e4, 73, device=kernel_device)[:, None]
    sums = torch.stack([part.sum() for part in jagged_softmax(x, schedule).split([70, 3])])
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_what_is_hidden_takes_no_part(kernel_device: torch.device) -> None:
    """NaN among scores that nobody sees, and in gradients of what is zero, stays where it is."""
    layout = SMALL.layout(kernel_device)
    (scores, dout) = make(kernel_device, torch.float32, (1, layout.total), (1, layout.total))
    offsets = SMALL.offsets(kernel_device)
    visible = reference_jagged_score_softmax(torch.ones_like(scores), offsets, offsets, causal=True) > 0
    nan = float("nan")

    def softmax(x: Tensor) -> Tensor:
        return jagged_score_softmax(x, layout, causal=True)

    clean = with_gradients(softmax, [scores], dout)
    dirty = with_gradients(softmax, [scores.masked_fill(~visible, nan)], dout.masked_fill(~visible, nan))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert bool((a[~visible] == 0).all())


def test_temperature_divides_the_scale(kernel_device: torch.device) -> None:
    layout, schedule = SMALL.layout(kernel_device), SMALL.schedule(kernel_device)
    scores, x = make(kernel_device, torch.float32, (2, layout.total), (8, 3, 2))
    warm = jagged_score_softmax(scores, layout, scale=1.0, temperature=4.0)
    assert torch.equal(warm, jagged_score_softmax(scores, layout, scale=0.25))
    assert not torch.equal(warm, jagged_score_softmax(scores, layout))
    assert torch.equal(jagged_softmax(x, schedule, temperature=4.0), jagged_softmax(x, schedule, scale=0.25))
    assert jagged_softmax(x, schedule).shape == (8, 3, 2)


def test_strides(kernel_device: torch.device) -> None:
    schedule = SMALL.schedule(kernel_device)
    (x,) = make(kernel_device, torch.float32, (8, 12))
    assert torch.equal(jagged_softmax(x[:, 2:7], schedule), jagged_softmax(x[:, 2:7].contiguous(), schedule))
    assert torch.equal(jagged_softmax(x[:, ::2], schedule), jagged_softmax(x[:, ::2].contiguous(), schedule))


def test_rows_of_wide_strides(kernel_device: torch.device) -> None:
    """A column of a matrix whose rows, as many as a block has, lie further apart than 2^31 elements together."""
    base = torch.empty(4096, 3 * 2**18, dtype=torch.float16, device=kernel_device)
    x = base[:, :1]
    x.copy_(torch.randn(4096, 1))
    schedule = Schedule(torch.tensor([0, 4096], device=kernel_device), 4096, 4096)
    assert torch.equal(jagged_softmax(x, schedule), jagged_softmax(x.contiguous(), schedule))


REFUSED: dict[str, tuple[Any, str]] = {
    "rows": (lambda s: jagged_softmax(torch.zeros(7, 2), s), r"the L = 8 of the schedule; got \(7, 2\)"),
    "float64": (lambda s: jagged_softmax(torch.zeros(8, 2).double(), s), "share one dtype of torch.float32"),
    "devices": (lambda s: jagged_softmax(torch.zeros(8, 2, device="meta"), s), "x on meta, offsets on cpu"),
    "long_user": (
        lambda s: jagged_softmax(torch.zeros(8, 2), Schedule(torch.tensor([0, 5, 8]), 8, 3, check_values=True)),
        "user 0 has 5 tokens, more than max_seqlen=3",
    ),
    "short_offsets": (
        lambda s: jagged_softmax(torch.zeros(8, 2), Schedule(torch.tensor([0, 2, 4]), 8, 3, check_values=True)),
        "they must go from 0 to the number of rows, 8",
    ),
    "temperature": (lambda s: jagged_softmax(torch.zeros(8, 2), s, temperature=0.0), "temperature must be above 0"),
    "scores": (
        lambda s: jagged_score_softmax(torch.zeros(2, 63), ScoreLayout(s, 64)),
        r"shape \(H, 64\) by the layout",
    ),
    "window": (lambda s: jagged_score_softmax(torch.zeros(2, 64), ScoreLayout(s, 64), window=0), "at least 1 token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(SMALL.schedule(CPU))


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 3}])
def test_cross_attention_has_no_mask(options: dict[str, Any]) -> None:
    layout = CROSS.layout(CPU)
    with pytest.raises(ValueError, match="cross attention has no causal mask and no window"):
        jagged_score_softmax(torch.zeros(1, layout.total), layout, **options)


def test_operators_obey_torch_library(kernel_device: torch.device) -> None:
    layout, schedule = CROSS.layout(kernel_device), CROSS.schedule(kernel_device)
    scores, x = make(kernel_device, torch.float32, (2, layout.total), (CROSS.total, 6))
    scores.requires_grad_()
    x.requires_grad_()
    offsets, _, longest = schedule.queries
    ops = torch.ops.recsys_kernels
    where = layout.query_tiles(), layout.offsets, schedule.keys[2]
    torch.library.opcheck(ops.jagged_softmax.default, (x, offsets, longest, 0.5, True))
    torch.library.opcheck(ops.jagged_score_softmax.default, (scores, *where, 0.5, False, None, False))
    p, y = scores.detach().abs(), x.detach().abs()
    torch.library.opcheck(ops.jagged_softmax_backward.default, (y, y, offsets, longest, 0.5))
    torch.library.opcheck(ops.jagged_score_softmax_backward.default, (p, p, *where, 0.5, False, None, False))


def test_compiles_without_a_graph_break(kernel_device: torch.device) -> None:
    layout, schedule = SMALL.layout(kernel_device), SMALL.schedule(kernel_device)

    def block(scores: Tensor, x: Tensor) -> Tensor:
        return jagged_score_softmax(scores, layout, causal=True, window=2).sum() * jagged_softmax(x, schedule)

    operands = make(kernel_device, torch.float32, (2, layout.total), (8, 6))
    (dout,) = make(kernel_device, torch.float32, (8, 6), seed=1)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, operands, dout), with_gradients(block, operands, dout), strict=True):
        assert torch.equal(a, b)
