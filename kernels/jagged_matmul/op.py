"""The operators: torch.library custom ops, whose gradients are made of each other, and the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.jagged.checks import check_operands, check_precision, check_rows
from kernels.jagged.launch import interpretable, readable, require_triton
from kernels.jagged.operator import operator
from kernels.jagged.schedule import Schedule
from kernels.jagged.score_layout import ScoreLayout, row_tiles
from kernels.jagged_matmul.dense import launch_dense_bmm, launch_jagged_bmm
from kernels.jagged_matmul.scores import launch_scores, launch_weighted_sum

MAX_HEAD_DIM = 256  # a row of it is held on the chip


def jagged_dense_bmm(x: Tensor, w: Tensor, schedule: Schedule, *, precision: str = "ieee") -> Tensor:
    """Of every user its rows times its matrix: `x_b w_b`, with gradients for both.

    Args:
        x: `(L, K)` or, of several heads, `(L, H, K)`; float32, float16 or bfloat16. Strides with a contiguous last
            dimension are read in place.
        w: `(B, K, N)` or `(B, H, K, N)`, any strides.
        schedule: of the users' rows; its queries are x.
        precision: of float32 products: "ieee", or "tf32" for tensor cores with 10 bits of mantissa.

    Returns:
        `(L, N)` or `(L, H, N)` in the dtype of x; sums are float32 whatever that is.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that don't fit.
        RuntimeError: when the tensors are not on CUDA and Triton isn't interpreting.

    The same as `torch.ops.fbgemm.jagged_dense_bmm`, for heads too.
    """
    check_operands({"x": x, "w": w, "offsets": schedule.queries[0]}, index_vectors=("offsets",))
    has_heads = x.dim() == 3
    if x.dim() not in (2, 3) or w.dim() != x.dim() + 1:
        raise ValueError(
            f"x and w must have shapes (L, K) and (B, K, N), or (L, H, K) and (B, H, K, N); got {tuple(x.shape)} and "
            f"{tuple(w.shape)}"
        )
    if not has_heads:
        x, w = x[:, None], w[:, None]
    check_rows("x", x, schedule.queries[1])
    if w.shape[:3] != (schedule.num_users, *x.shape[1:]):
        raise ValueError(
            f"w must have a matrix for each of the {schedule.num_users} users and {x.shape[1]} heads, with "
            f"{x.shape[2]} rows as x has columns; got {tuple(w.shape)}"
        )
    check_precision(precision)
    offsets, _, max_seqlen = schedule.queries
    require_triton(x.device)
    tiles = row_tiles(schedule)
    out = _dense_bmm_op(x, w, tiles, offsets, max_seqlen, precision)
    return out if has_heads else out.squeeze(1)


def jagged_jagged_bmm(x: Tensor, y: Tensor, schedule: Schedule, *, precision: str = "ieee") -> Tensor:
    """Of every user a matrix, the sum over its rows of their outer products: `x_b^T y_b`, with gradients for both.

    Args:
        x: `(L, M)` or, of several heads, `(L, H, M)`; float32, float16 or bfloat16.
        y: `(L, N)` or `(L, H, N)`. Strides with a contiguous last dimension are read in place.
        schedule: of the users' rows; its queries are x and y.
        precision: as for `jagged_dense_bmm`.

    Returns:
        `(B, M, N)` or `(B, H, M, N)` in the dtype of x; zero for users without rows.

    Raises:
        As `jagged_dense_bmm`.

    The same as `torch.ops.fbgemm.jagged_jagged_bmm`, for heads too.
    """
    check_operands({"x": x, "y": y, "offsets": schedule.queries[0]}, index_vectors=("offsets",))
    if x.dim() not in (2, 3) or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"x and y must have shapes (L, M) and (L, N), or (L, H, M) and (L, H, N); got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    has_heads = x.dim() == 3
    if not has_heads:
        x, y = x[:, None], y[:, None]
    check_rows("x", x, schedule.queries[1])
    check_precision(precision)
    offsets, _, max_seqlen = schedule.queries
    require_triton(x.device)
    tiles = row_tiles(schedule)
    out = _jagged_bmm_op(x, y, tiles, offsets, max_seqlen, precision)
    return out if has_heads else out.squeeze(1)


def jagged_scores(q: Tensor, k: Tensor, layout: ScoreLayout, *, scale: float = 1.0, precision: str = "ieee") -> Tensor:
    """Of every user its queries times its keys: `scale q_b k_b^T`, with gradients for both.

    Args:
        q: `(L, H, D)`, float32, float16 or bfloat16, D up to 256. Strides with a contiguous last dimension are read in
            place.
        k: `(keys, H, D)`; in self attention keys = L.
        layout: where the scores are; of these queries and keys.
        scale: factor of the scores.
        precision: as for `jagged_dense_bmm`.

    Returns:
        `(H, T)` in the dtype of q: user b's scores are m rows of l, each rounded up to a multiple of 8, from
            `layout.offsets[b]` on.

    Raises:
        As `jagged_dense_bmm`.
    """
    check_operands({"q": q, "k": k, "layout": layout.offsets}, index_vectors=("layout",))
    if q.dim() != 3 or k.dim() != 3 or q.shape[1:] != k.shape[1:] or not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"q and k must have shapes (L, H, D) and (keys, H, D) with D from 1 to {MAX_HEAD_DIM}; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    check_rows("q", q, layout.schedule.queries[1])
    check_rows("k", k, layout.schedule.keys[1])
    check_precision(precision)
    require_triton(q.device)
    return _scores_op(
        q, k, layout.query_tiles(), layout.key_tiles(), layout.offsets, layout.total, float(scale), precision
    )


def jagged_weighted_sum(
    weights: Tensor, v: Tensor, layout: ScoreLayout, *, transposed: bool = False, precision: str = "ieee"
) -> Tensor:
    """Of every user its scores times rows: `p_b v_b`, with gradients for both.

    Args:
        weights: `(H, T)`, jagged scores, mostly after a softmax; float32, float16 or bfloat16. Finite also between the
            rows (`ScoreLayout`).
        v: `(keys, H, D)`, D up to 256; `transposed`: `(L, H, D)`, a row for every query.
        layout: where the scores are.
        transposed: `p_b^T v_b` instead, a sum over the queries for every key.
        precision: as for `jagged_dense_bmm`.

    Returns:
        `(L, H, D)`, `transposed` `(keys, H, D)`, in the dtype of v; zero where a user has no rows to add up.

    Raises:
        As `jagged_dense_bmm`.
    """
    check_operands({"weights": weights, "v": v, "layout": layout.offsets}, index_vectors=("layout",))
    queries, keys = layout.schedule.queries[1], layout.schedule.keys[1]
    if v.dim() != 3 or not 1 <= v.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"v must have shape (rows, H, D) with D from 1 to {MAX_HEAD_DIM}, got {tuple(v.shape)}")
    if weights.shape != (v.shape[1], layout.total):
        raise ValueError(
            f"weights must have shape ({v.shape[1]}, {layout.total}), the heads of v and the scores of the layout; got "
            f"{tuple(weights.shape)}"
        )
    check_rows("v", v, queries if transposed else keys)
    check_precision(precision)
    require_triton(v.device)
    return _weighted_sum_op(
        weights, v, layout.query_tiles(), layout.key_tiles(), layout.offsets, keys if transposed else queries, 1.0,
        transposed, True, precision,
    )  # fmt: skip


# Jagged x dense, and jagged^T x jagged


@operator("jagged_dense_bmm")
def _dense_bmm_op(x: Tensor, w: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, precision: str) -> Tensor:
    return launch_dense_bmm(readable(x), interpretable(w), tiles, precision).to(x.dtype)


@_dense_bmm_op.register_fake
def _dense_bmm_fake(x: Tensor, w: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:2], w.shape[3]))


@operator("jagged_jagged_bmm")
def _jagged_bmm_op(x: Tensor, y: Tensor, tiles: Tensor, offsets: Tensor, max_seqlen: int, precision: str) -> Tensor:
    return launch_jagged_bmm(readable(x), readable(y), tiles, offsets.contiguous(), max_seqlen, precision).to(x.dtype)


@_jagged_bmm_op.register_fake
def _jagged_bmm_fake(x: Tensor, y: Tensor, tiles: Tensor, offsets: Tensor, *_: object) -> Tensor:
    return x.new_empty((offsets.shape[0] - 1, *x.shape[1:], y.shape[2]))


def _save_bmm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _dense_bmm_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, w, *rest = ctx.saved_tensors
    dx = _dense_bmm_op(dout, w.transpose(2, 3), *rest, *ctx.options) if ctx.needs_input_grad[0] else None
    dw = _jagged_bmm_op(x, dout, *rest, *ctx.options) if ctx.needs_input_grad[1] else None
    return dx, dw, None, None, None, None


def _jagged_bmm_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *rest = ctx.saved_tensors
    dx = _dense_bmm_op(y, dout.transpose(2, 3), *rest, *ctx.options) if ctx.needs_input_grad[0] else None
    dy = _dense_bmm_op(x, dout, *rest, *ctx.options) if ctx.needs_input_grad[1] else None
    return dx, dy, None, None, None, None


_dense_bmm_op.register_autograd(_dense_bmm_backward, setup_context=_save_bmm)
_jagged_bmm_op.register_autograd(_jagged_bmm_backward, setup_context=_save_bmm)


# Jagged x jagged^T, and scores x jagged


@operator("jagged_scores")
def _scores_op(
    q: Tensor,
    k: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    score_offsets: Tensor,
    total: int,
    scale: float,
    precision: str,
) -> Tensor:
    return launch_scores(readable(q), readable(k), query_tiles, score_offsets, total, scale, precision).to(q.dtype)


@_scores_op.register_fake
def _scores_fake(
    q: Tensor, k: Tensor, query_tiles: Tensor, key_tiles: Tensor, score_offsets: Tensor, total: int, *_: object
) -> Tensor:
    return q.new_empty((q.shape[1], total))


@operator("jagged_weighted_sum")
def _weighted_sum_op(
    weights: Tensor,
    x: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    score_offsets: Tensor,
    num_rows: int,
    scale: float,
    transposed: bool,
    gaps_are_finite: bool,
    precision: str,
) -> Tensor:
    tiles = key_tiles if transposed else query_tiles
    weights = interpretable(weights).contiguous()
    return launch_weighted_sum(
        weights, readable(x), tiles, score_offsets, num_rows, scale, transposed, gaps_are_finite, precision
    ).to(x.dtype)


@_weighted_sum_op.register_fake
def _weighted_sum_fake(
    weights: Tensor, x: Tensor, query_tiles: Tensor, key_tiles: Tensor, score_offsets: Tensor, num_rows: int, *_: object
) -> Tensor:
    return x.new_empty((num_rows, *x.shape[1:]))


def _save_scores(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    _total, ctx.scale, ctx.precision = inputs[5:]


def _scores_backward(ctx: Any, dscores: Tensor) -> tuple[Tensor | None, ...]:
    q, k, *where = ctx.saved_tensors
    dq = dk = None
    # Not finite in the gaps: there scores are zero, and what became of them may have no finite derivative at zero.
    if ctx.needs_input_grad[0]:
        dq = _weighted_sum_op(dscores, k, *where, q.shape[0], ctx.scale, False, False, ctx.precision)
    if ctx.needs_input_grad[1]:
        dk = _weighted_sum_op(dscores, q, *where, k.shape[0], ctx.scale, True, False, ctx.precision)
    return dq, dk, *[None] * 6


def _save_weighted_sum(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    _num_rows, ctx.scale, ctx.transposed, ctx.gaps_are_finite, ctx.precision = inputs[5:]


def _weighted_sum_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    weights, x, *where = ctx.saved_tensors
    dweights = dx = None
    if ctx.needs_input_grad[0]:
        q, k = (x, dout) if ctx.transposed else (dout, x)
        dweights = _scores_op(q, k, *where, weights.shape[1], ctx.scale, ctx.precision)
    if ctx.needs_input_grad[1]:
        options = ctx.scale, not ctx.transposed, ctx.gaps_are_finite, ctx.precision
        dx = _weighted_sum_op(weights, dout, *where, x.shape[0], *options)
    return dweights, dx, *[None] * 8


_scores_op.register_autograd(_scores_backward, setup_context=_save_scores)
_weighted_sum_op.register_autograd(_weighted_sum_backward, setup_context=_save_weighted_sum)
