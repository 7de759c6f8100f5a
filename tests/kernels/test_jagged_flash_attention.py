"""The kernel computes what the reference computes: lengths, masks, dtypes, head dims, strides."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.jagged_flash_attention import jagged_flash_attention, reference_attention
from tests.kernels.jagged_cases import LENGTHS, MIXED, Case, assert_kernel_matches_reference, with_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(lengths: list[int], kernel_device: torch.device) -> None:
    assert_kernel_matches_reference(Case(lengths).on_device(kernel_device), kernel_device)


@pytest.mark.parametrize("has_candidates", [False, True], ids=["history", "candidates"])
@pytest.mark.parametrize("window", [None, 1, 7, 47], ids=lambda w: f"window_{w}")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_masks(causal: bool, window: int | None, has_candidates: bool, kernel_device: torch.device) -> None:
    case = Case(MIXED, num_heads=1, causal=causal, window=window, has_candidates=has_candidates)
    assert_kernel_matches_reference(case.on_device(kernel_device), kernel_device)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths_with_candidates_and_window(lengths: list[int], kernel_device: torch.device) -> None:
    case = Case(lengths, num_heads=1, window=9, has_candidates=True, offsets_dtype=torch.int32, slack=40)
    assert_kernel_matches_reference(case.on_device(kernel_device), kernel_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 17, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    case = Case([36, 0, 3], num_heads=1, head_dim=head_dim, dtype=dtype, has_candidates=True)
    assert_kernel_matches_reference(case.on_device(kernel_device), kernel_device)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale: float, kernel_device: torch.device) -> None:
    """A negative scale turns the greatest product into the least score: the running maximum must not care."""
    assert_kernel_matches_reference(Case([20, 1, 40], scale=scale).on_device(kernel_device), kernel_device)


def test_scores_far_apart(kernel_device: torch.device) -> None:
    """Scores in the thousands overflow an exponential that isn't taken relative to the maximum."""
    case = Case([40, 3], num_heads=1, scale=1000.0, causal=False).on_device(kernel_device)
    *qkv, _ = case.make_qkvg(kernel_device)
    offsets = case.make_offsets(kernel_device)
    out = jagged_flash_attention(*qkv, offsets, case.max_seqlen, causal=False, scale=1000.0)
    exact = reference_attention(*[x.double() for x in qkv], offsets, case.max_seqlen, causal=False, scale=1000.0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["packed_projection", "heads_first", "every_second_row", "not_contiguous"])
def test_strides(layout: str, kernel_device: torch.device) -> None:
    """Same bits as from contiguous tensors, whatever lies between the rows."""
    case = Case([33, 0, 5], head_dim=48, has_candidates=True).on_device(kernel_device)
    *qkv, dout = case.make_qkvg(kernel_device)
    L, H, D = qkv[0].shape

    def relay(x: torch.Tensor, i: int) -> torch.Tensor:
        if layout == "packed_projection":
            packed = torch.full((L, 3, H, D), float("nan"), device=x.device)
            packed[:, i] = x
            return packed[:, i]
        if layout == "heads_first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "every_second_row":
            spread = torch.full((2 * L, H, D), float("nan"), device=x.device)
            spread[1::2] = x
            return spread[1::2]
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    args = (case.make_offsets(kernel_device), case.max_seqlen)
    options = case.options(kernel_device)
    expected = with_gradients(jagged_flash_attention, qkv, dout, *args, **options)
    relaid = [relay(x, i) for i, x in enumerate(qkv)]
    assert not relaid[0].is_contiguous()
    actual = with_gradients(jagged_flash_attention, relaid, relay(dout, 0), *args, **options)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_expanded_gradient(kernel_device: torch.device) -> None:
    """`out.sum().backward()` hands over a gradient whose strides are all zero."""
    case = Case([20, 3]).on_device(kernel_device)
    *qkv, dout = case.make_qkvg(kernel_device)
    args = (case.make_offsets(kernel_device), case.max_seqlen)
    expected = with_gradients(jagged_flash_attention, qkv, torch.ones_like(dout), *args)
    leaves = [x.requires_grad_() for x in qkv]
    jagged_flash_attention(*leaves, *args).sum().backward()
    for name, leaf in zip(("dq", "dk", "dv"), leaves, strict=True):
        assert torch.equal(leaf.grad, expected[name]), name


@pytest.mark.parametrize("has_candidates", [False, True], ids=["history", "candidates"])
def test_same_bits_every_time_and_in_any_company(has_candidates: bool, kernel_device: torch.device) -> None:
    """A user's result and gradients don't depend on the run, nor on who else is in the batch."""
    case = Case([17, 40, 0, 9], window=12, has_candidates=has_candidates).on_device(kernel_device)
    *qkv, dout = case.make_qkvg(kernel_device)
    offsets, options = case.make_offsets(kernel_device), case.options(kernel_device)
    runs = [with_gradients(jagged_flash_attention, qkv, dout, offsets, case.max_seqlen, **options) for _ in range(2)]
    rows = slice(int(offsets[1]), int(offsets[2]))
    if has_candidates:
        options["num_targets"] = options["num_targets"][1:2]
    alone = with_gradients(
        jagged_flash_attention,
        [x[rows] for x in qkv],
        dout[rows],
        offsets[1:3] - offsets[1],
        case.max_seqlen,
        **options,
    )
    for name in alone:
        assert torch.equal(runs[0][name], runs[1][name]), name
        assert torch.equal(runs[0][name][rows], alone[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_cases(seed: int) -> None:
    """A sweep over everything at once, compiled."""
    rng = random.Random(seed)
    longest = rng.choice([1, 20, 130, 600])
    case = Case(
        lengths=[rng.choice([0, 1, longest, rng.randint(0, longest)]) for _ in range(rng.randint(1, 24))],
        num_heads=rng.randint(1, 4),
        head_dim=rng.choice([16, 24, 32, 40, 48, 64, 72, 80, 96, 128, 144, 200, 256]),
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        offsets_dtype=rng.choice([torch.int32, torch.int64]),
        causal=rng.random() < 0.7,
        window=rng.choice([None, None, 1, 63, 64, 65, 127, 128, 129, rng.randint(1, 700)]),
        has_candidates=rng.random() < 0.5,
        scale=rng.choice([None, 0.1]),
        slack=rng.choice([0, 1, 300]),
        seed=seed,
    )
    assert_kernel_matches_reference(case, torch.device("cuda"))
