"""The operators: torch.library custom ops with their gradients, and the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.jagged.checks import check_offsets, check_operands, checks_values
from kernels.jagged.launch import interpretable, readable, require_triton
from kernels.jagged.operator import operator
from kernels.jagged.schedule import Schedule
from kernels.jagged.score_layout import ScoreLayout
from kernels.jagged_softmax.columns import launch_softmax, launch_softmax_backward
from kernels.jagged_softmax.rows import launch_score_softmax, launch_score_softmax_backward


def jagged_softmax(x: Tensor, schedule: Schedule, *, scale: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Softmax of `scale / temperature x` over the tokens of every user, for each column on its own.

    Args:
        x: `(L, ...)`, float32, float16 or bfloat16.
        schedule: of the users' rows; its queries are x.
        scale: factor of x.
        temperature: above 0; a higher one makes the weights more alike.

    Returns:
        `(L, ...)`, contiguous, in the dtype of x; computed in float32. Zero where all of a user's tokens are -inf.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that don't fit.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.

    The same as `torch.ops.fbgemm.jagged_softmax`, for any columns, a scale and a temperature.
    """
    check_operands({"x": x, "offsets": schedule.queries[0]}, index_vectors=("offsets",))
    offsets, total, max_seqlen = schedule.queries
    if x.dim() < 1 or x.shape[0] != total:
        raise ValueError(f"x must have shape (L, ...) with the L = {total} of the schedule; got {tuple(x.shape)}")
    require_triton(x.device)
    rows = x.reshape(total, x[:1].numel()) if total else x.reshape(0, 1)
    return _softmax_op(rows, offsets, max_seqlen, _factor(scale, temperature), schedule.check_values).view(x.shape)


def jagged_score_softmax(
    scores: Tensor,
    layout: ScoreLayout,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Softmax of `scale / temperature scores` over the keys that each query sees; zero for the others.

    Who sees whom is as for `jagged_flash_attention`: the candidates are the `num_targets` of the layout's schedule.

    Args:
        scores: `(H, T)`, float32, float16 or bfloat16, jagged scores as of `jagged_scores`.
        layout: where the scores are.
        causal: whether history sees only what came before it; self attention only.
        window: how many tokens history sees, itself included (on each side when not causal); None: all. Self
            attention only.
        scale: factor of the scores.
        temperature: above 0; a higher one makes the weights more alike.

    Returns:
        `(H, T)`, contiguous, in the dtype of the scores; computed in float32. Zero where all that a query sees is -inf.

    Raises:
        As `jagged_softmax`.
    """
    check_operands({"scores": scores, "layout": layout.offsets}, index_vectors=("layout",))
    schedule = layout.schedule
    if scores.dim() != 2 or scores.shape[1] != layout.total:
        raise ValueError(f"scores must have shape (H, {layout.total}) by the layout; got {tuple(scores.shape)}")
    if schedule.is_cross and (causal or window is not None):
        raise ValueError(
            "cross attention has no causal mask and no window: every query sees all keys of its user; pass "
            "causal=False and window=None"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token (or None for no window), got {window}")
    require_triton(scores.device)
    return _score_softmax_op(
        scores, layout.query_tiles(), layout.offsets, schedule.keys[2], _factor(scale, temperature), causal, window,
        schedule.num_targets is not None,
    )  # fmt: skip


def _factor(scale: float, temperature: float) -> float:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return float(scale) / float(temperature)


# Over tokens


@operator("jagged_softmax")
def _softmax_op(x: Tensor, offsets: Tensor, max_seqlen: int, scale: float, check_values: bool) -> Tensor:
    # Here, because under torch.compile the tensors are real only here.
    if check_values and checks_values(offsets.device):
        check_offsets(offsets, max_seqlen, x.shape[0])
    return launch_softmax(readable(x), offsets.contiguous(), max_seqlen, scale).to(x.dtype)


@operator("jagged_softmax_backward")
def _softmax_backward_op(y: Tensor, dy: Tensor, offsets: Tensor, max_seqlen: int, scale: float) -> Tensor:
    y_readable = interpretable(y).contiguous()
    return launch_softmax_backward(y_readable, readable(dy), offsets.contiguous(), max_seqlen, scale).to(y.dtype)


@_softmax_op.register_fake
def _softmax_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@_softmax_backward_op.register_fake
def _softmax_backward_fake(y: Tensor, *_: object) -> Tensor:
    return y.new_empty(y.shape)


def _save_softmax(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _x, offsets, *ctx.options, _check_values = inputs
    ctx.save_for_backward(output, offsets)


def _softmax_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y, offsets = ctx.saved_tensors
    return _softmax_backward_op(y, dy, offsets, *ctx.options), *[None] * 4


_softmax_op.register_autograd(_softmax_gradient, setup_context=_save_softmax)


# Over rows of scores


@operator("jagged_score_softmax")
def _score_softmax_op(
    scores: Tensor,
    query_tiles: Tensor,
    score_offsets: Tensor,
    max_key_seqlen: int,
    scale: float,
    causal: bool,
    window: int | None,
    has_targets: bool,
) -> Tensor:
    readable = interpretable(scores).contiguous()
    return launch_score_softmax(
        readable, query_tiles, score_offsets, max_key_seqlen, scale, causal, window, has_targets
    ).to(scores.dtype)


@operator("jagged_score_softmax_backward")
def _score_softmax_backward_op(
    probabilities: Tensor,
    dout: Tensor,
    query_tiles: Tensor,
    score_offsets: Tensor,
    max_key_seqlen: int,
    scale: float,
    causal: bool,
    window: int | None,
    has_targets: bool,
) -> Tensor:
    readable = interpretable(probabilities).contiguous(), interpretable(dout).contiguous()
    dscores = launch_score_softmax_backward(
        *readable, query_tiles, score_offsets, max_key_seqlen, scale, causal, window, has_targets
    )
    return dscores.to(probabilities.dtype)


@_score_softmax_op.register_fake
def _score_softmax_fake(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.shape)


@_score_softmax_backward_op.register_fake
def _score_softmax_backward_fake(probabilities: Tensor, *_: object) -> Tensor:
    return probabilities.new_empty(probabilities.shape)


def _save_score_softmax(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _scores, query_tiles, score_offsets, *ctx.options = inputs
    ctx.save_for_backward(output, query_tiles, score_offsets)


def _score_softmax_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    probabilities, *where = ctx.saved_tensors
    return _score_softmax_backward_op(probabilities, dout, *where, *ctx.options), *[None] * 7


_score_softmax_op.register_autograd(_score_softmax_gradient, setup_context=_save_score_softmax)
