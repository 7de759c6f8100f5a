"""The tolerance policy notices what it has to notice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics import FORWARD_FACTOR, assert_matches_reference

LENGTHS = [40, 0, 3, 57]


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def results(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """A baseline rounded a few times, and the exact result."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(sum(LENGTHS), 2, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    baseline = (exact + 4 * torch.finfo(request.param).eps * noise).to(request.param)
    return baseline, exact


def check(actual: Tensor, results: tuple[Tensor, Tensor]) -> None:
    assert_matches_reference(actual, *results, factor=FORWARD_FACTOR, name="out", lengths=LENGTHS)


def test_rounding_once_passes(results: tuple[Tensor, Tensor]) -> None:
    check(results[1].to(results[0].dtype), results)


def test_noise_of_many_roundings_fails(results: tuple[Tensor, Tensor]) -> None:
    noise = 20 * torch.finfo(results[0].dtype).eps * torch.randn(results[1].shape)
    with pytest.raises(AssertionError, match=r"whole tensor: greatest error .* exceeds"):
        check((results[1] + noise).to(results[0].dtype), results)


def test_one_wrong_short_sequence_fails(results: tuple[Tensor, Tensor]) -> None:
    """Wrong by too little to show in the greatest error of the whole tensor, but everywhere in three rows."""
    baseline, exact = results
    eps = torch.finfo(baseline.dtype).eps
    baseline = baseline.clone()
    baseline[0, 0, 0] = exact[0, 0, 0] + 100 * eps  # plain PyTorch may err somewhere else
    actual = exact.clone()
    actual[40:43] += 60 * eps
    with pytest.raises(AssertionError, match="sequence 2 of 3 rows: greatest error"):
        check(actual.to(baseline.dtype), (baseline, exact))


def test_one_unwritten_value_fails(results: tuple[Tensor, Tensor]) -> None:
    actual = results[0].clone()
    actual[5, 1, 3] = float("nan")
    with pytest.raises(AssertionError, match="1 of 3200 values are not finite"):
        check(actual, results)


def test_result_in_another_dtype_fails(results: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(AssertionError, match="compared with a"):
        check(results[1], results)
