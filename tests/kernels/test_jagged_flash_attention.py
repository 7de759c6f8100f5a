"""The kernel computes what the reference computes: lengths, masks, heads, dtypes, dropout, strides."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.jagged_flash_attention import dropout_mask, jagged_flash_attention, op, reference_attention
from kernels.jagged_flash_attention.tuning import Tile, Tiles
from tests.conftest import INTERPRETED
from tests.kernels.jagged_cases import (
    LAYOUTS,
    LENGTHS,
    MIXED,
    Case,
    assert_follows_reference,
    assert_kernel_matches_reference,
    random_cases,
    run,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(lengths: list[int], kernel_device: torch.device) -> None:
    assert_kernel_matches_reference(Case(lengths).on_device(kernel_device), kernel_device)


@pytest.mark.parametrize("has_candidates", [False, True], ids=["history", "candidates"])
@pytest.mark.parametrize("window", [None, 1, 47], ids=lambda w: f"window_{w}")
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
    if kernel_device.type == "cpu" and dtype == torch.bfloat16 and head_dim not in (17, 64):
        pytest.skip("the interpreter computes bfloat16 as float32")
    case = Case([20, 0, 3], num_heads=1, head_dim=head_dim, dtype=dtype, has_candidates=True)
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


@pytest.mark.parametrize("group", [2, 3, 4])
@pytest.mark.parametrize("mask", [{}, {"window": 9, "has_candidates": True}], ids=["causal", "window_candidates"])
def test_grouped_queries(group: int, mask: dict[str, Any], kernel_device: torch.device) -> None:
    """A key head serves several query heads; the gradients of its keys and values are sums over them."""
    case = Case([19, 0, 1], num_heads=4 if group == 2 else group, group=group, **mask)
    assert_kernel_matches_reference(case.on_device(kernel_device), kernel_device)


CROSS: dict[str, tuple[list[int], list[int]]] = {
    "one_user": ([40], [21]),
    "one_token_each": ([1, 1], [1, 1]),
    "more_keys": ([3, 17, 1], [40, 33, 65]),
    "no_keys_for_some": ([18, 5, 3], [0, 37, 0]),
    "no_queries_for_some": ([0, 33, 0], [20, 2, 37]),
    "neither": ([0, 9, 0, 3, 0], [0, 0, 4, 33, 0]),
    "no_keys_at_all": ([5, 20], [0, 0]),
    "no_queries_at_all": ([0, 0], [5, 20]),
    "no_users": ([], []),
}


@pytest.mark.parametrize(("queries", "keys"), CROSS.values(), ids=CROSS.keys())
def test_cross_attention(queries: list[int], keys: list[int], kernel_device: torch.device) -> None:
    """Where a user has no keys the output is zero; so are all its gradients, and those of keys that nobody queries."""
    case = Case(queries, key_lengths=keys, group=2, causal=False, slack=3).on_device(kernel_device)
    actual = run(jagged_flash_attention, case, kernel_device)
    assert_follows_reference(actual, case, kernel_device)
    assert case.key_lengths is not None
    for name, own, others in (("out", case.lengths, case.key_lengths), ("dk", case.key_lengths, case.lengths)):
        for rows, n in zip(actual[name].split(own), others, strict=True):
            assert n > 0 or not rows.any(), name


DROPOUT: dict[str, Case] = {
    "causal": Case([33, 0, 1, 20], num_heads=1, dropout_p=0.2),
    "full": Case([40, 3], causal=False, dropout_p=0.5),
    "window_candidates": Case([40, 0, 20], num_heads=1, window=11, has_candidates=True, dropout_p=0.3),
    "grouped": Case([17, 33], group=2, has_candidates=True, dropout_p=0.3),
    "cross": Case([33, 5, 0], key_lengths=[40, 0, 3], causal=False, dropout_p=0.3),
    "nearly_all": Case([40, 3], dropout_p=0.97),
    "float16": Case([40, 3], num_heads=1, dropout_p=0.2, dtype=torch.float16, head_dim=24),
}


@pytest.mark.parametrize("case", DROPOUT.values(), ids=DROPOUT.keys())
def test_dropout(case: Case, kernel_device: torch.device) -> None:
    """Forward and backward drop the very pairs that the reference drops."""
    assert_kernel_matches_reference(case.on_device(kernel_device), kernel_device)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropped_fraction(dropout_p: float, kernel_device: torch.device) -> None:
    """All scores equal, and values that are unit vectors: the output shows which pairs are kept."""
    n, H, D = 64, 2, 64
    q = torch.zeros(n, H, D, device=kernel_device)
    v = torch.eye(n, device=kernel_device)[:, None, :].repeat(1, H, 1)
    offsets = torch.tensor([0, n], device=kernel_device)
    masks = []
    for number in (5, 6, 5 + 2**40):
        seed = torch.tensor([number], device=kernel_device)
        out = jagged_flash_attention(q, q, v, offsets, n, causal=False, dropout_p=dropout_p, seed=seed)
        kept = out > 0
        row, head, key = (torch.arange(x, device=kernel_device) for x in (n, H, n))
        assert torch.equal(kept, dropout_mask(seed, row[:, None, None], head[:, None], key, dropout_p))
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (n * (1 - dropout_p))))
        # 8192 pairs: 0.02 is at least 3.6 standard deviations.
        assert (~kept).float().mean().item() == pytest.approx(dropout_p, abs=0.02)
        masks.append(kept)
    both = (~masks[0] & ~masks[1]).float().mean().item(), (~masks[0] & ~masks[2]).float().mean().item()
    assert both == pytest.approx((dropout_p**2, dropout_p**2), abs=0.02), "another seed, another mask"
    per_head = (~masks[0][:, 0] & ~masks[0][:, 1]).float().mean().item()
    assert per_head == pytest.approx(dropout_p**2, abs=0.025), "every head has its own"


def test_dropout_without_a_seed_draws_one(kernel_device: torch.device) -> None:
    """From torch's generator: `torch.manual_seed` repeats it, and two calls differ."""
    case = Case([20, 5], num_heads=1)
    *qkv, _ = case.make_qkvg(kernel_device)
    args = (*qkv, case.make_offsets(kernel_device), case.max_seqlen)
    torch.manual_seed(3)
    first, second = (jagged_flash_attention(*args, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(jagged_flash_attention(*args, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["causal", "window_candidates", "cross"])
def test_dropout_does_not_depend_on_tiles(
    name: str, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """A pair is dropped for what it is, not for where a tile begins; and no pass for short users."""
    small, wide = Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)
    monkeypatch.setattr(op, "choose_tiles", lambda *_: Tiles(forward=small, dkv=wide, dq=wide))
    assert_kernel_matches_reference(DROPOUT[name].on_device(kernel_device), kernel_device)


OTHER_TILES = {
    "one_loop": Tiles(
        forward=Tile(32, 16, 4, 1, split=False),
        dkv=Tile(16, 32, 4, 1, split=False),
        dq=Tile(16, 32, 4, 1, split=False),
    ),
    "tma": Tiles(
        forward=Tile(32, 16, 4, 2, tma=True), dkv=Tile(16, 32, 4, 2, tma=True), dq=Tile(16, 32, 4, 2, tma=True)
    ),
}


@pytest.mark.parametrize("has_candidates", [False, True], ids=["history", "candidates"])
@pytest.mark.parametrize("window", [None, 7], ids=["all", "window"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("tiles", OTHER_TILES.values(), ids=OTHER_TILES.keys())
def test_other_ways_through_the_tiles(
    tiles: Tiles,
    causal: bool,
    window: int | None,
    has_candidates: bool,
    monkeypatch: pytest.MonkeyPatch,
    kernel_device: torch.device,
) -> None:
    """Ways that a GPU may take and the interpreter's own tiles don't."""
    monkeypatch.setattr(op, "choose_tiles", lambda *_: tiles)
    case = Case(MIXED, num_heads=1, causal=causal, window=window, has_candidates=has_candidates, dtype=torch.float16)
    assert_kernel_matches_reference(case.on_device(kernel_device), kernel_device)


@pytest.mark.parametrize(
    "case", [Case([33, 0, 5], head_dim=64, group=2, has_candidates=True), DROPOUT["cross"]], ids=["self", "cross"]
)
def test_tf32(case: Case, kernel_device: torch.device) -> None:
    """Its mantissa has the bits of float16's, so on values that float16 can hold it is judged like that."""
    case = replace(case, dtype=torch.float16).on_device(kernel_device)

    def attend(precision: str) -> dict[str, torch.Tensor]:
        return run(functools.partial(jagged_flash_attention, precision=precision), case, kernel_device, torch.float32)

    actual = attend("tf32")
    assert_follows_reference({name: x.half() for name, x in actual.items()}, case, kernel_device)
    if kernel_device.type == "cuda":
        exact = attend("ieee")
        assert not torch.equal(actual["out"], exact["out"]), "the option has no effect"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, kernel_device: torch.device) -> None:
    """Same bits as from contiguous tensors, whatever lies between the rows."""
    case = Case([18, 0, 5], group=2, head_dim=48, has_candidates=True).on_device(kernel_device)
    relaid = replace(case, layout=layout)
    assert not relaid.make_qkvg(kernel_device)[0].is_contiguous()
    expected = run(jagged_flash_attention, case, kernel_device)
    actual = run(jagged_flash_attention, relaid, kernel_device)
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
    case = Case([17, 20, 0, 9], num_heads=1, window=12, has_candidates=has_candidates).on_device(kernel_device)
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


@pytest.mark.parametrize("chunk", range(12))
def test_random_cases_interpreted(chunk: int) -> None:
    """A little of the sweep below, small."""
    device = torch.device("cpu")
    if not INTERPRETED:
        pytest.skip("Triton compiles here")
    (case,) = random_cases(chunk, 1, [1, 20, 40], most_users=4)
    assert_kernel_matches_reference(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", range(100))
def test_random_cases(chunk: int) -> None:
    """A sweep of 500 cases over everything at once, compiled."""
    for case in random_cases(chunk, 5, [1, 20, 130, 600], most_users=12):
        assert_kernel_matches_reference(case, torch.device("cuda"))
