"""Products of jagged operands: values and gradients."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from kernels.jagged_matmul import jagged_dense_bmm, jagged_jagged_bmm, jagged_scores, jagged_weighted_sum
from kernels.jagged_matmul.dense import LONG, PART_ROWS, SHARE_ABOVE
from kernels.jagged_matmul.reference import (
    reference_jagged_dense_bmm,
    reference_jagged_jagged_bmm,
    reference_jagged_scores,
    reference_jagged_weighted_sum,
)
from kernels.jagged_softmax import jagged_score_softmax
from tests.kernels.jagged_operands import DTYPES, LENGTHS, Users, assert_follows_reference, make, with_gradients

CROSS = Users((5, 0, 40, 1, 7, 3), (3, 4, 70, 0, 33, 1))
SMALL = Users((5, 3))


def check_dense_bmm(users: Users, device: torch.device, dtype: torch.dtype, H: int, K: int, N: int) -> None:
    users = users.on_device(device)
    schedule, offsets = users.schedule(device), users.offsets(device)
    x, w = make(device, dtype, (users.total, H, K), (len(users.lengths), H, K, N))
    assert_follows_reference(
        lambda x, w: jagged_dense_bmm(x, w, schedule),
        lambda x, w: reference_jagged_dense_bmm(x, w, offsets),
        [x, w],
        magnitude=max(K, N, *users.lengths, 1) ** 0.5,
        lengths=[users.lengths, users.lengths, None],
    )


def check_jagged_bmm(users: Users, device: torch.device, dtype: torch.dtype, H: int, M: int, N: int) -> None:
    users = users.on_device(device)
    schedule, offsets = users.schedule(device), users.offsets(device)
    x, y = make(device, dtype, (users.total, H, M), (users.total, H, N))
    assert_follows_reference(
        lambda x, y: jagged_jagged_bmm(x, y, schedule),
        lambda x, y: reference_jagged_jagged_bmm(x, y, offsets),
        [x, y],
        magnitude=max(M, N, *users.lengths, 1) ** 0.5,
        lengths=[None, users.lengths, users.lengths],
    )


def check_scores(users: Users, device: torch.device, dtype: torch.dtype, H: int, D: int, scale: float) -> None:
    users = users.on_device(device)
    layout, offsets, key_offsets = users.layout(device), users.offsets(device), users.key_offsets(device)
    keys = users.lengths if users.key_lengths is None else users.key_lengths
    q, k = make(device, dtype, (users.total, H, D), (users.total_keys, H, D))
    assert_follows_reference(
        lambda q, k: jagged_scores(q, k, layout, scale=scale),
        lambda q, k: reference_jagged_scores(q, k, offsets, key_offsets, scale),
        [q, k],
        magnitude=max(D, *keys, *users.lengths, 1) ** 0.5,
        lengths=[None, users.lengths, keys],
    )


def check_weighted_sum(
    users: Users, device: torch.device, dtype: torch.dtype, H: int, D: int, transposed: bool
) -> None:
    users = users.on_device(device)
    layout, offsets, key_offsets = users.layout(device), users.offsets(device), users.key_offsets(device)
    keys = users.lengths if users.key_lengths is None else users.key_lengths
    rows, results = (users.lengths, keys) if transposed else (keys, users.lengths)
    weights, v = make(device, dtype, (H, layout.total), (sum(rows), H, D))
    assert_follows_reference(
        lambda weights, v: jagged_weighted_sum(weights, v, layout, transposed=transposed),
        lambda weights, v: reference_jagged_weighted_sum(weights, v, offsets, key_offsets, transposed),
        [weights, v],
        magnitude=max(D, *keys, *users.lengths, 1) ** 0.5,
        lengths=[results, None, rows],
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", LENGTHS)
def test_awkward_lengths(name: str, kernel_device: torch.device) -> None:
    users = Users(LENGTHS[name])
    check_dense_bmm(users, kernel_device, torch.float32, H=2, K=20, N=24)
    check_jagged_bmm(users, kernel_device, torch.float32, H=2, M=20, N=24)
    check_scores(users, kernel_device, torch.float32, H=2, D=24, scale=0.3)
    check_weighted_sum(users, kernel_device, torch.float32, H=2, D=24, transposed=False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("transposed", [False, True])
def test_queries_and_keys_of_other_lengths(transposed: bool, kernel_device: torch.device) -> None:
    check_scores(CROSS, kernel_device, torch.float32, H=2, D=16, scale=1.0)
    check_weighted_sum(CROSS, kernel_device, torch.float32, H=2, D=16, transposed=transposed)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, kernel_device: torch.device) -> None:
    users = Users((7, 40, 0, 1))
    check_dense_bmm(users, kernel_device, dtype, H=1, K=32, N=16)
    check_jagged_bmm(users, kernel_device, dtype, H=1, M=32, N=16)
    check_scores(users, kernel_device, dtype, H=1, D=32, scale=0.2)
    check_weighted_sum(users, kernel_device, dtype, H=1, D=32, transposed=True)


@pytest.mark.usefixtures("poisoned_memory")
def test_long_users_are_shared_by_programs(kernel_device: torch.device) -> None:
    lengths = (5000, 3, 0, 2048) if kernel_device.type == "cuda" else (200, 3, 0, 64)
    users = Users(lengths)
    schedule, offsets = users.schedule(kernel_device), users.offsets(kernel_device)
    assert max(lengths) > SHARE_ABOVE
    x, y = make(kernel_device, torch.float32, (users.total, 2, 20), (users.total, 2, 70))
    assert_follows_reference(
        lambda x, y: jagged_jagged_bmm(x, y, schedule),
        lambda x, y: reference_jagged_jagged_bmm(x, y, offsets),
        [x, y],
        magnitude=max(lengths) ** 0.5,
    )


@pytest.mark.usefixtures("poisoned_memory")
def test_rather_long_users_take_larger_tiles(kernel_device: torch.device) -> None:
    lengths = (SHARE_ABOVE, 3, 0, PART_ROWS + 1, LONG + 1)
    check_jagged_bmm(Users(lengths), kernel_device, torch.float16, H=2, M=64, N=50)


def random_case(seed: int) -> tuple[Users, torch.dtype, dict[str, int]]:
    generator = random.Random(seed)
    draw = generator.randint
    lengths = tuple(generator.choice([0, 1, draw(2, 20), draw(20, 70)]) for _ in range(draw(1, 5)))
    is_cross = generator.random() < 0.5
    keys = tuple(generator.choice([0, 1, draw(2, 70)]) for _ in lengths) if is_cross else None
    sizes = {"H": draw(1, 4), "D": generator.choice([1, 5, 16, 33, 80, 128, 256]), "N": draw(1, 130)}
    return Users(lengths, keys), generator.choice(DTYPES), sizes


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.gpu) for seed in range(6, 120))])
def test_random_cases(seed: int, kernel_device: torch.device) -> None:
    users, dtype, sizes = random_case(seed)
    H, D, N = sizes["H"], sizes["D"], sizes["N"]
    check_scores(users, kernel_device, dtype, H, D, scale=D**-0.5)
    check_weighted_sum(users, kernel_device, dtype, H, D, transposed=seed % 2 == 0)
    own = Users(users.lengths)
    check_dense_bmm(own, kernel_device, dtype, H, D, N)
    check_jagged_bmm(own, kernel_device, dtype, H, D, N)


@pytest.mark.usefixtures("poisoned_memory")
def test_what_lies_behind_a_row_is_zero_and_takes_no_part(kernel_device: torch.device) -> None:
    layout = SMALL.layout(kernel_device)
    q, v = make(kernel_device, torch.float32, (8, 2, 16), (8, 2, 16))
    behind = torch.ones(64, dtype=torch.bool, device=kernel_device)
    behind[:40].view(5, 8)[:, :5] = False
    behind[40:].view(3, 8)[:, :3] = False
    scores = jagged_scores(q, q, layout)
    assert not scores[:, behind].any()
    dirty = scores.masked_fill(behind, 3e38)
    for transposed in (False, True):
        expected = jagged_weighted_sum(scores, v, layout, transposed=transposed)
        assert torch.equal(jagged_weighted_sum(dirty, v, layout, transposed=transposed), expected)
    softmax = jagged_score_softmax(scores, layout)
    assert torch.equal(jagged_score_softmax(dirty, layout), softmax)
    assert not softmax[:, behind].any()
    infinite, not_finite = q.clone(), scores.clone()
    infinite[1] = float("inf")
    not_finite[:, 8:13] = float("nan")
    behind[8:16] = False  # of the same row
    for broken in (jagged_scores(infinite, q, layout), jagged_score_softmax(not_finite, layout)):
        assert bool(broken.isnan().any())
        assert not broken[:, behind].any(), "one row's NaN behind another"
        is_finite = jagged_weighted_sum(broken, v, layout).isfinite().flatten(1).all(1)
        assert is_finite.tolist() == [i != 1 for i in range(8)]


@pytest.mark.parametrize("name", ["square_root", "logarithm"])
def test_derivatives_that_are_not_finite_at_zero(name: str, kernel_device: torch.device) -> None:
    """Behind a row scores are zero, and what comes back from there may be NaN."""
    layout = SMALL.layout(kernel_device)
    q, k, v = make(kernel_device, torch.float32, *[(8, 2, 16)] * 3)
    function = {"square_root": lambda s: s.sign() * s.abs().sqrt(), "logarithm": lambda s: s.abs().log()}[name]

    def attention(q: Tensor, k: Tensor) -> Tensor:
        return jagged_weighted_sum(jagged_score_softmax(function(jagged_scores(q, k, layout)), layout), v, layout)

    for x in with_gradients(attention, [q, k], v):
        assert bool(x.isfinite().all())
