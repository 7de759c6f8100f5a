"""How `varlen` cuts a mask with candidates into FlashAttention calls, checked on a CPU in fp64.

`TorchPrimitive` stands for FlashAttention-2: same contract, plain PyTorch.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys.attention import MaskSpec, backends
from recsys.attention.varlen import Plan, Spans, make_plan, varlen_attention
from tests.attention.cases import MASKS, USERS, make_inputs, make_layout, make_mask, reference_outputs

CPU = torch.device("cpu")


class TorchPrimitive:
    """`VarlenPrimitive` in plain PyTorch, as picky and as odd in its corners as FlashAttention-2."""

    def __init__(self) -> None:
        self.num_calls = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        visible = self._visible(q, k, spans)
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~visible, float("-inf"))
        lse = scores.logsumexp(dim=-1)
        lse[:, ~visible.any(dim=-1)] = float("inf")  # what FlashAttention-2 says of a query without keys
        return torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[..., None]), v).contiguous(), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.num_calls += 1
        assert lse.shape == (q.shape[1], q.shape[0])
        assert lse.is_contiguous()
        assert out.is_contiguous()
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        scores = scores.masked_fill(~self._visible(q, k, spans), float("-inf"))
        p = torch.exp(scores - lse[..., None])
        delta = (dout * out).sum(dim=-1).t()[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", dout, v) - delta) * scale
        return (
            torch.einsum("hqk,khd->qhd", ds, k),
            torch.einsum("hqk,qhd->khd", ds, q),
            torch.einsum("hqk,qhd->khd", p, dout),
        )

    @staticmethod
    def _visible(q: Tensor, k: Tensor, spans: Spans) -> Tensor:
        for cu, x, longest in ((spans.cu_q, q, spans.max_q), (spans.cu_k, k, spans.max_k)):
            assert cu.dtype == torch.int32
            assert cu.is_contiguous()
            assert cu[-1] == x.shape[0]
            assert cu.diff().max() <= longest
        user_q, user_k = (
            torch.bucketize(torch.arange(x.shape[0]), cu[1:], right=True)
            for x, cu in ((q, spans.cu_q), (k, spans.cu_k))
        )
        i = (torch.arange(q.shape[0]) - spans.cu_q[user_q])[:, None]
        j = (torch.arange(k.shape[0]) - spans.cu_k[user_k])[None, :]
        visible = user_q[:, None] == user_k[None, :]
        right = 0 if spans.causal else spans.window_right
        if spans.window_left >= 0:
            visible &= j >= i - spans.window_left
        if right >= 0:
            visible &= j <= i + right
        return visible


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mask_id", MASKS)
@pytest.mark.parametrize("users_id", USERS)
def test_decomposition_is_exact(users_id: str, mask_id: str) -> None:
    users = USERS[users_id]
    layout = make_layout(users, CPU)
    mask = make_mask(users, mask_id, CPU).simplified(layout)
    inputs = make_inputs(layout.total, CPU, torch.float64)
    out = varlen_attention(inputs.q, inputs.k, inputs.v, layout, mask, 0.25, TorchPrimitive())  # 16 ** -0.5
    actual = [out, *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)]
    for got, want in zip(actual, reference_outputs(inputs, layout, mask, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    """A candidate whose own score dwarfs its history's, and the other way round: weights 1 and 0, no NaN."""
    users = USERS["mixed"]
    layout, mask = make_layout(users, CPU), make_mask(users, "candidates", CPU)
    inputs = make_inputs(layout.total, CPU, torch.float64)
    for factor in (1e3, -1e3):
        q, k = (inputs.q.detach() * 40).requires_grad_(), (inputs.k.detach() * factor).requires_grad_()
        out = varlen_attention(q, k, inputs.v, layout, mask, 0.25, TorchPrimitive())
        gradients = torch.autograd.grad(out, (q, k, inputs.v), inputs.dout)
        assert all(x.isfinite().all() for x in (out, *gradients))


@pytest.mark.parametrize(
    ("users_id", "mask_id", "num_calls"),
    [("mixed", "causal", 2), ("mixed", "candidates", 4), ("only_candidates", "candidates", 0)],
)
def test_number_of_flash_calls(users_id: str, mask_id: str, num_calls: int) -> None:
    users, primitive = USERS[users_id], TorchPrimitive()
    layout, mask = make_layout(users, CPU), make_mask(users, mask_id, CPU)
    inputs = make_inputs(layout.total, CPU, torch.float64)
    varlen_attention(inputs.q, inputs.k, inputs.v, layout, mask, 0.25, primitive).sum().backward()
    assert primitive.num_calls == num_calls


def test_plan_rows_cover_every_token_once() -> None:
    users = USERS["mixed"]
    plan = make_plan(make_layout(users, CPU), make_mask(users, "candidates", CPU))
    assert plan.history_rows is not None
    assert plan.candidate_rows is not None
    assert plan.candidate_rows.tolist() == [5, 6, 7, 38, 39, 40, 58]
    assert sorted([*plan.history_rows.tolist(), *plan.candidate_rows.tolist()]) == list(range(59))


def test_plan_bounds_are_optional() -> None:
    """`max_targets` and `max_history` only make the grid tighter."""
    users = USERS["mixed"]
    num_targets = torch.tensor(users.targets)
    loose: Plan = make_plan(make_layout(users, CPU), MaskSpec(num_targets=num_targets, total_targets=7))
    assert loose.across is not None
    assert (loose.across.max_q, loose.across.max_k) == (7, 33)
    tight: Plan = make_plan(make_layout(users, CPU), make_mask(users, "candidates", CPU))
    assert tight.across is not None
    assert (tight.across.max_q, tight.across.max_k) == (3, 30)


@pytest.mark.parametrize(
    ("causal", "window", "left_right"),
    [
        (True, None, (-1, 0)),
        (False, None, (-1, -1)),
        (True, 5, (4, 0)),
        (False, 5, (4, 4)),
        (True, 1, (0, 0)),
    ],
)
def test_window_becomes_flash_bounds(causal: bool, window: int | None, left_right: tuple[int, int]) -> None:
    cu = torch.zeros(1, dtype=torch.int32)
    spans = Spans(cu, cu, 0, 0, causal, window)
    assert (spans.window_left, spans.window_right) == left_right


def test_aten_ops_take_the_arguments_we_pass() -> None:
    """Both supported torch versions must keep these names; a CPU build knows the schema too."""
    forward = torch.ops.aten._flash_attention_forward.default._schema
    backward = torch.ops.aten._flash_attention_backward.default._schema
    names = [a.name for a in forward.arguments]
    assert names[:10] == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "return_debug_mask"),
    ]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)
    assert len(forward.returns) == 5
    names = [a.name for a in backward.arguments]
    assert names[:12] == [
        *(
            "grad_out",
            "query",
            "key",
            "value",
            "out",
            "logsumexp",
            "cum_seq_q",
            "cum_seq_k",
            "max_q",
            "max_k",
        ),
        *("dropout_p", "is_causal"),
    ]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)


def test_needs_cuda() -> None:
    reason = backends()["varlen"].unavailable(CPU)
    assert reason is not None
    assert "CUDA" in reason
