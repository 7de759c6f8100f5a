"""The reference itself: its mask against one drawn by hand, its result against PyTorch's attention per user."""

from __future__ import annotations

import pytest
import torch

from kernels.jagged_flash_attention import dense_mask, reference_attention
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
