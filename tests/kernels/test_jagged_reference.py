"""The reference itself: its mask against one drawn by hand, its result against PyTorch's attention per user."""

from __future__ import annotations

import pytest
import torch

from kernels.jagged_flash_attention import dense_mask, dropout_mask, reference_attention
from tests.kernels.jagged_cases import Case, with_gradients

CAUSAL = ["100000", "110000", "111000", "111100", "111110", "111101"]
WINDOW_2 = ["100000", "110000", "011000", "001100", "111110", "111101"]
FULL = ["111100", "111100", "111100", "111100", "111110", "111101"]
FULL_WINDOW_2 = ["110000", "111000", "011100", "001100", "111110", "111101"]


@pytest.mark.parametrize(
    ("causal", "window", "drawn"),
    [(True, None, CAUSAL), (True, 2, WINDOW_2), (False, None, FULL), (False, 2, FULL_WINDOW_2)],
    ids=["causal", "causal_window_2", "full", "full_window_2"],
)
def test_mask_of_four_history_tokens_and_two_candidates(causal: bool, window: int | None, drawn: list[str]) -> None:
    mask = dense_mask(torch.tensor([0, 6]), 6, causal=causal, window=window, num_targets=torch.tensor([2]))
    assert ["".join(str(int(x)) for x in row) for row in mask[0]] == drawn


def test_mask_ends_with_the_user() -> None:
    mask = dense_mask(torch.tensor([0, 2, 2, 3]), 4, causal=False)
    assert mask.sum(dim=(1, 2)).tolist() == [4, 0, 1]
    assert mask[0, :2, :2].all()


def test_reference_equals_attention_user_by_user() -> None:
    case = Case([4, 0, 9, 1], dtype=torch.float64, has_candidates=True, window=3)
    device = torch.device("cpu")
    *qkv, dout = case.make_qkvg(device)
    offsets, options = case.make_offsets(device), case.options(device)
    actual = with_gradients(reference_attention, qkv, dout, offsets, case.max_seqlen, **options)

    def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs = []
        for b, n in enumerate(case.lengths):
            rows = slice(int(offsets[b]), int(offsets[b + 1]))
            mask = dense_mask(torch.tensor([0, n]), n, window=3, num_targets=options["num_targets"][b : b + 1])
            outs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *(x[rows].transpose(0, 1) for x in (q, k, v)), attn_mask=mask
                ).transpose(0, 1)
            )
        return torch.cat(outs)

    expected = with_gradients(one_by_one, qkv, dout)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_grouped_cross_attention_equals_attention_user_by_user() -> None:
    """Query heads 0 and 1 use key head 0, 2 and 3 key head 1; a user without keys gets zeros."""
    case = Case([4, 0, 3, 2], key_lengths=[2, 5, 0, 7], num_heads=4, group=2, dtype=torch.float64, causal=False)
    device = torch.device("cpu")
    q, k, v, _ = case.make_qkvg(device)
    assert case.key_lengths is not None
    out = reference_attention(q, k, v, case.make_offsets(device), case.max_seqlen, **case.options(device))
    users = zip(
        *(x.split(n) for x, n in ((q, case.lengths), (k, case.key_lengths), (v, case.key_lengths))), strict=True
    )
    for actual, (b_q, b_k, b_v) in zip(out.split(case.lengths), users, strict=True):
        expected = torch.zeros_like(b_q)
        if len(b_k):
            for head in range(4):
                scores = b_q[:, head] @ b_k[:, head // 2].t() * case.head_dim**-0.5
                expected[:, head] = scores.softmax(-1) @ b_v[:, head // 2]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_dropout_follows_philox() -> None:
    """The published first word for a counter and a key of zeros is 0x6627e8d5; a pair is kept from there on."""
    seed, zero = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    word = 0x6627E8D5
    assert dropout_mask(seed, zero, zero, zero, word / 2**32)
    assert not dropout_mask(seed, zero, zero, zero, (word + 1) / 2**32)


def test_dropped_probabilities_are_made_up_for() -> None:
    """Each is zero or 1 / (1 - p) of what it was, by the mask; values that are unit vectors show it."""
    n = 16
    q, k, _ = torch.randn(3, n, 1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, offsets, seed = torch.eye(n, dtype=torch.float64)[:, None, :], torch.tensor([0, n]), torch.tensor([9])
    probabilities = reference_attention(q, k, v, offsets, n)
    dropped = reference_attention(q, k, v, offsets, n, dropout_p=0.25, seed=seed)
    kept = dropout_mask(
        seed, torch.arange(n)[:, None, None], torch.zeros(1, 1, dtype=torch.long), torch.arange(n), 0.25
    )
    torch.testing.assert_close(dropped, probabilities * kept / 0.75, rtol=1e-12, atol=1e-12)
