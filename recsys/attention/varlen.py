"""torch's own variable-length FlashAttention-2, and how it serves candidates, which its masks don't know.

A candidate's softmax runs over the history and the candidate itself. Split it:

    history part   scores of the candidate against the whole history: FlashAttention, giving out_x and lse_x
    self part      one score s = scale · q·k, whose "attention" is v itself
    merged         lse = log(exp(lse_x) + exp(s)),   out = exp(lse_x − lse) · out_x + exp(s − lse) · v

Backward, FlashAttention rebuilds P = exp(S − lse) and delta = rowsum(dO ∘ O) from the `out` and `lse` it is
given. Given the *merged* ones it returns exactly the history part of the gradient; what is left is the self
part, elementwise:

    p = exp(s − lse),  dv = p · dO,  ds = p · (dO·v − delta),  dq = scale · ds · k,  dk = scale · ds · q

Letters: `L` tokens, `Lh` of history, `N` candidates, `H` heads, `D` head dim; `lse` is `(H, rows)` in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys.attention.interface import AttentionBackend, CrossLayout, JaggedLayout, MaskSpec, Request

# Gradients of `_VarlenAttention.forward` arguments: three tensors, three others.
Gradients = tuple[Tensor, Tensor, Tensor, None, None, None]


@dataclass(frozen=True)
class Spans:
    """Which query rows meet which key rows: user b's `cu_q[b]:cu_q[b + 1]` and `cu_k[b]:cu_k[b + 1]`.

    `max_q` and `max_k` bound the lengths; `cu_*` are int32 on the device.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    window: int | None

    @property
    def window_left(self) -> int:
        """Keys behind the query's own position that it may see; -1 is no limit."""
        return -1 if self.window is None else self.window - 1

    @property
    def window_right(self) -> int:
        """Keys ahead of the query's own position that it may see; -1 is no limit."""
        return 0 if self.causal else self.window_left


class VarlenPrimitive(Protocol):
    """Attention between spans, without autograd: what FlashAttention offers, or a test puts in its place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """`out` like q and `lse` `(H, rows of q)`; a query without keys gets out 0 and lse ±inf."""

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
        """dq, dk, dv with `P = exp(scale · q kᵀ − lse)`, `delta = rowsum(dout ∘ out)`."""


class FlashAttention2:
    """The primitive that torch brings along, with one signature in torch 2.11 and 2.13."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
            _unit_stride(q),
            _unit_stride(k),
            _unit_stride(v),
            spans.cu_q,
            spans.cu_k,
            spans.max_q,
            spans.max_k,
            0.0,  # dropout_p
            spans.causal,
            False,  # return_debug_mask
            scale=scale,
            window_size_left=spans.window_left,
            window_size_right=spans.window_right,
        )
        return out, lse

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
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # read only under dropout
        return torch.ops.aten._flash_attention_backward(
            dout.contiguous(),
            _unit_stride(q),
            _unit_stride(k),
            _unit_stride(v),
            out,
            lse,
            spans.cu_q,
            spans.cu_k,
            spans.max_q,
            spans.max_k,
            0.0,  # dropout_p
            spans.causal,
            rng_state,
            torch.empty(0, device=q.device),
            scale=scale,
            window_size_left=spans.window_left,
            window_size_right=spans.window_right,
        )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Plan:
    """How a layout and mask are cut into FlashAttention calls: made once per step, nothing read back."""

    history: Spans | None
    """History among itself, in cross attention the queries against the keys; None when there is no history at all."""

    across: Spans | None
    """Candidates against the history; None without candidates or without history."""

    history_rows: Tensor | None
    """`(Lh,)` rows of the history in the `(L, ...)` tensors; None when all rows are history."""

    candidate_rows: Tensor | None
    """`(N,)` rows of the candidates; None without candidates."""


def make_plan(layout: JaggedLayout, mask: MaskSpec) -> Plan:
    """The plan of `layout` under `mask`; `mask.total_targets` has to be known when there are candidates."""
    offsets = layout.offsets.to(torch.int32)
    if mask.num_targets is None:
        history = Spans(offsets, offsets, layout.max_seqlen, layout.max_seqlen, mask.causal, mask.window)
        return Plan(history, across=None, history_rows=None, candidate_rows=None)
    assert mask.total_targets is not None, "refuses() lets no such mask through"

    num_history = layout.total - mask.total_targets
    max_history = min(layout.max_seqlen if mask.max_history is None else mask.max_history, num_history)
    max_targets = min(layout.max_seqlen if mask.max_targets is None else mask.max_targets, mask.total_targets)
    target_lengths = mask.num_targets.to(torch.int32)
    history_lengths = offsets.diff() - target_lengths
    cu_history, cu_targets = _offsets_of(history_lengths), _offsets_of(target_lengths)
    history = Spans(cu_history, cu_history, max_history, max_history, mask.causal, mask.window)
    across = Spans(cu_targets, cu_history, max_targets, max_history, causal=False, window=None)
    return Plan(
        history if num_history > 0 else None,
        across if num_history > 0 else None,
        history_rows=_rows(offsets[:-1], cu_history, history_lengths, num_history),
        candidate_rows=_rows(offsets[1:] - target_lengths, cu_targets, target_lengths, mask.total_targets),
    )


def make_cross_plan(layout: CrossLayout) -> Plan:
    """One call, of all queries with all keys of their user."""
    cu_q, cu_k = (side.offsets.to(torch.int32) for side in (layout.queries, layout.keys))
    spans = Spans(cu_q, cu_k, layout.queries.max_seqlen, layout.keys.max_seqlen, causal=False, window=None)
    return Plan(spans, across=None, history_rows=None, candidate_rows=None)


def _offsets_of(lengths: Tensor) -> Tensor:
    offsets = lengths.new_zeros(lengths.numel() + 1)
    torch.cumsum(lengths, dim=0, dtype=lengths.dtype, out=offsets[1:])
    return offsets


def _rows(first: Tensor, cu: Tensor, lengths: Tensor, total: int) -> Tensor:
    """`first[b], first[b] + 1, …` for `lengths[b]` rows of each user b, one after the other: `(total,)`."""
    shift = torch.repeat_interleave(first - cu[:-1], lengths, output_size=total)
    return torch.arange(total, device=first.device) + shift


class _VarlenAttention(torch.autograd.Function):
    """The calls of a plan, merged. Tokens are gathered again in backward rather than kept twice."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, primitive: VarlenPrimitive
    ) -> Tensor:
        ctx.plan, ctx.scale, ctx.primitive = plan, scale, primitive
        if plan.candidate_rows is None:
            assert plan.history is not None
            out, lse = primitive.forward(q, k, v, plan.history, scale)
            ctx.save_for_backward(q, k, v, out, lse, None)
            return out
        assert plan.history_rows is not None

        q_n, k_n, v_n = (x.index_select(0, plan.candidate_rows) for x in (q, k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_h: Tensor | None = None
        if plan.history is None:
            lse_n, out_n = _self_scores(q_n, k_n, scale), v_n  # the candidate alone: its weight is 1
        else:
            assert plan.across is not None
            q_h, k_h, v_h = (x.index_select(0, plan.history_rows) for x in (q, k, v))
            out_h, lse_h = primitive.forward(q_h, k_h, v_h, plan.history, scale)
            out.index_copy_(0, plan.history_rows, out_h)
            out_x, lse_x = primitive.forward(q_n, k_h, v_h, plan.across, scale)
            out_n, lse_n = _merge_self(out_x, lse_x, _self_scores(q_n, k_n, scale), v_n)
        out.index_copy_(0, plan.candidate_rows, out_n)
        ctx.save_for_backward(q, k, v, out, lse_h, lse_n)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        q, k, v, out, lse_h, lse_n = ctx.saved_tensors
        plan, scale, primitive = ctx.plan, ctx.scale, ctx.primitive
        if plan.candidate_rows is None:
            return *primitive.backward(dout, q, k, v, out, lse_h, plan.history, scale), None, None, None

        q_n, k_n, v_n, out_n, dout_n = (x.index_select(0, plan.candidate_rows) for x in (q, k, v, out, dout))
        dq_n, dk_n, dv_n = _self_gradients(dout_n, q_n, k_n, v_n, out_n, lse_n, scale)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        if plan.history is not None:
            q_h, k_h, v_h, out_h, dout_h = (x.index_select(0, plan.history_rows) for x in (q, k, v, out, dout))
            dq_h, dk_h, dv_h = primitive.backward(dout_h, q_h, k_h, v_h, out_h, lse_h, plan.history, scale)
            dq_x, dk_x, dv_x = primitive.backward(dout_n, q_n, k_h, v_h, out_n, lse_n, plan.across, scale)
            dq_n = dq_n + dq_x
            for whole, part in ((dq, dq_h), (dk, dk_h + dk_x), (dv, dv_h + dv_x)):
                whole.index_copy_(0, plan.history_rows, part)
        for whole, part in ((dq, dq_n), (dk, dk_n), (dv, dv_n)):
            whole.index_copy_(0, plan.candidate_rows, part.to(whole.dtype))
        return dq, dk, dv, None, None, None


def _wide(x: Tensor) -> Tensor:
    """In the dtype of statistics: fp32, or fp64 when a test computes in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _self_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Each candidate's score of itself: `(H, N)`, contiguous as FlashAttention wants its lse."""
    return ((_wide(q) * _wide(k)).sum(dim=-1) * scale).t().contiguous()


def _merge_self(out_x: Tensor, lse_x: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`out_x`, `lse_x` over the history and self score `s`, as one softmax: out `(N, H, D)`, lse `(H, N)`."""
    # FlashAttention-2 reports +inf for a query that met no key; in a sum of exponentials that is -inf.
    lse_x = lse_x.masked_fill(lse_x == float("inf"), float("-inf"))
    lse = torch.logaddexp(lse_x, s)
    weight_x, weight_self = (torch.exp(part - lse).t()[..., None] for part in (lse_x, s))
    return (weight_x * out_x + weight_self * v).to(v.dtype), lse


def _self_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a candidate's own key and value add to dq, dk, dv (in fp32), from the merged `out` and `lse`."""
    dout, q, k, v, out = (_wide(x) for x in (dout, q, k, v, out))
    p = torch.exp((q * k).sum(dim=-1, keepdim=True) * scale - lse.t()[..., None])
    ds = p * (dout * (v - out)).sum(dim=-1, keepdim=True) * scale  # dO·v − delta = dO·(v − out)
    return ds * k, ds * q, p * dout


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    mask: MaskSpec,
    scale: float,
    primitive: VarlenPrimitive,
) -> Tensor:
    """Attention `(L, H, D)` in calls of `primitive`: causal or full history, windows, candidates."""
    plan = layout.cached("varlen_plan", mask, lambda: make_plan(layout, mask))
    return _VarlenAttention.apply(q, k, v, plan, scale, primitive)


class Varlen(AttentionBackend):
    """torch's varlen FlashAttention-2 on the real tokens. With candidates: two calls each way and a merge."""

    name = "varlen"
    summary = "torch's varlen FlashAttention-2"

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"torch's FlashAttention runs on CUDA, not on {device.type}"
        if torch.version.hip is not None:
            return "it is written for CUDA's FlashAttention-2, and this torch is built for ROCm"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this torch is built without FlashAttention"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"FlashAttention-2 needs compute capability 8.0 (Ampere), this GPU has {major}.{minor}"
        return None

    def refuses(self, request: Request) -> str | None:
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"q, k, v are {request.dtype}, FlashAttention-2 takes float16 and bfloat16"
        if request.head_dim % 8 != 0 or not 8 <= request.head_dim <= 256:
            return f"the head dim is {request.head_dim}, FlashAttention-2 takes multiples of 8 up to 256"
        if request.dropout_p > 0.0:
            return f"dropout_p is {request.dropout_p}, it has no dropout"
        if request.mask.num_targets is not None and request.mask.total_targets is None:
            return "the mask has num_targets without total_targets, their sum on the host, which it needs"
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        mask: MaskSpec,
        scale: float,
        dropout_p: float,
    ) -> Tensor:
        return varlen_attention(q, k, v, layout, mask, scale, FlashAttention2())

    def attend_across(
        self, q: Tensor, k: Tensor, v: Tensor, layout: CrossLayout, scale: float, dropout_p: float
    ) -> Tensor:
        plan = layout.cached("varlen_plan", lambda: make_cross_plan(layout))
        return _VarlenAttention.apply(q, k, v, plan, scale, FlashAttention2())
