"""What products of jagged operands take and refuse: strides, offsets, layouts, tracing, derivatives of derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.jagged import Schedule
from kernels.jagged.score_layout import BLOCK, ScoreLayout
from kernels.jagged_matmul import jagged_dense_bmm, jagged_jagged_bmm, jagged_scores, jagged_weighted_sum
from kernels.jagged_matmul.reference import (
    reference_jagged_dense_bmm,
    reference_jagged_jagged_bmm,
    reference_jagged_scores,
    reference_jagged_weighted_sum,
)
from kernels.jagged_matmul.scores import launch_scores, launch_weighted_sum
from kernels.jagged_softmax.rows import launch_score_softmax, launch_score_softmax_backward
from kernels.score_pitch import count_scores
from tests.kernels.jagged_operands import Users, make, with_gradients

CPU = torch.device("cpu")
CROSS = Users((5, 0, 40, 1, 7, 3), (3, 4, 70, 0, 33, 1))
SMALL = Users((5, 3))


def test_strides_and_a_missing_head(kernel_device: torch.device) -> None:
    users = SMALL.on_device(kernel_device)
    schedule = users.schedule(kernel_device)
    packed, w = make(kernel_device, torch.float32, (users.total, 3, 2, 16), (2, 2, 16, 24))
    q, k = packed[:, 0], packed[:, 1]
    layout = users.layout(kernel_device)
    assert torch.equal(jagged_scores(q, k, layout), jagged_scores(q.contiguous(), k.contiguous(), layout))
    columns_last = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(jagged_scores(q, columns_last, layout), jagged_scores(q, k, layout))
    transposed = w.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(jagged_dense_bmm(q, transposed, schedule), jagged_dense_bmm(q, w, schedule))
    assert torch.equal(jagged_dense_bmm(q[:, 0], w[:, 0], schedule), jagged_dense_bmm(q, w, schedule)[:, 0])
    assert torch.equal(jagged_jagged_bmm(q[:, 0], k[:, 0], schedule), jagged_jagged_bmm(q, k, schedule)[:, 0])


def test_no_heads(kernel_device: torch.device) -> None:
    users = Users((300,))  # tiles enough for programs of several heads
    layout = users.layout(kernel_device)
    q = torch.ones(300, 0, 16, device=kernel_device)
    scores = jagged_scores(q, q, layout)
    assert scores.shape == (0, layout.total)
    assert jagged_weighted_sum(scores, q, layout).shape == (300, 0, 16)


def test_int32_offsets(kernel_device: torch.device) -> None:
    users = CROSS.on_device(kernel_device)
    q, k = make(kernel_device, torch.float32, (users.total, 1, 16), (users.total_keys, 1, 16))
    expected = jagged_scores(q, k, users.layout(kernel_device))
    assert torch.equal(jagged_scores(q, k, users.layout(kernel_device, torch.int32)), expected)


def test_strided_offsets(kernel_device: torch.device) -> None:
    """A column of a matrix is as good as a vector."""
    users = SMALL
    offsets = torch.stack([users.offsets(kernel_device)] * 2, dim=1)[:, 0]
    strided = Schedule(offsets, users.total, max(users.lengths), check_values=True)
    x, w = make(kernel_device, torch.float32, (8, 2, 16), (2, 2, 16, 16))
    (dout,) = make(kernel_device, torch.float32, (8, 2, 16), seed=1)
    for schedule in (strided, users.schedule(kernel_device)):
        layout = ScoreLayout(schedule, 64)

        def everything(x: Tensor, w: Tensor) -> Tensor:
            out = jagged_dense_bmm(x, w + jagged_jagged_bmm(x, x, schedule), schedule)  # noqa: B023
            return jagged_weighted_sum(jagged_scores(out, x, layout, scale=0.1), x, layout)  # noqa: B023

        results = with_gradients(everything, [x, w], dout)
        if schedule is strided:
            expected = results
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_matrices_of_wide_strides(kernel_device: torch.device) -> None:
    """Rows of a matrix, and of x, that lie further apart than 2^31 elements together."""
    schedule = SMALL.schedule(kernel_device)
    base = torch.empty(2**32, dtype=torch.float16, device=kernel_device)
    w = base.as_strided((2, 1, 64, 64), (1, 1, 2**26 - 2**20, 2**14))
    x = torch.randn(8, 1, 64, device=kernel_device).half()
    w.copy_(torch.randn(2, 1, 64, 64))
    assert torch.equal(jagged_dense_bmm(x, w, schedule), jagged_dense_bmm(x, w.contiguous(), schedule))


PRODUCTS: dict[str, tuple[Any, Any]] = {
    "scores": (
        lambda q, k, schedule, layout, o: jagged_scores(q, k, layout),
        lambda q, k, o: reference_jagged_scores(q, k, o, o),
    ),
    "jagged_bmm": (
        lambda q, k, schedule, layout, o: jagged_jagged_bmm(q, k, schedule),
        lambda q, k, o: reference_jagged_jagged_bmm(q, k, o),
    ),
    "dense_bmm": (
        lambda q, k, schedule, layout, o: jagged_dense_bmm(q, k[:2, :, None] * k[2:4, :, :, None], schedule),
        lambda q, k, o: reference_jagged_dense_bmm(q, k[:2, :, None] * k[2:4, :, :, None], o),
    ),
    "weighted_sum": (
        lambda q, k, schedule, layout, o: jagged_weighted_sum(jagged_scores(q, q, layout), k, layout),
        lambda q, k, o: reference_jagged_weighted_sum(reference_jagged_scores(q, q, o, o), k, o, o),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_second_derivatives(name: str, kernel_device: torch.device) -> None:
    """Gradients are made of the same operators, so they have gradients too."""
    product, reference = PRODUCTS[name]
    schedule, layout, offsets = SMALL.schedule(kernel_device), SMALL.layout(kernel_device), SMALL.offsets(kernel_device)

    def penalty(product: Any, q: Tensor, k: Tensor) -> list[Tensor]:
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        (dq,) = torch.autograd.grad(product(q, k).square().sum(), q, create_graph=True)
        return list(torch.autograd.grad(dq.square().sum(), (q, k)))

    q, k = (0.3 * x for x in make(kernel_device, torch.float32, (8, 2, 16), (8, 2, 16)))
    actual = penalty(lambda q, k: product(q, k, schedule, layout, offsets), q, k)
    exact = penalty(lambda q, k: reference(q, k, offsets), q.double(), k.double())
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("queries", [[0, 5, 0, 8], [0, 2**32, 5, 8]], ids=["descending", "garbage"])
def test_wrong_offsets_touch_no_foreign_memory(
    queries: list[int], monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Results that lie between canaries, for offsets that put scores in front of the tensor and behind it."""
    keys = [0, 1, 10, 12]
    made: list[Tensor] = []

    def between_canaries(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = int(torch.Size(shape).numel())
        whole = torch.full((size + 2000,), 7.0, dtype=dtype, device=device)
        made.append(whole)
        return whole[1000 : 1000 + size].view(shape)

    new_empty = torch.Tensor.new_empty

    def between(self: Tensor, *size: Any, **keywords: Any) -> Tensor:
        if keywords:  # the interpreter's own
            return new_empty(self, *size, **keywords)
        return between_canaries(size[0], self.dtype, self.device)

    monkeypatch.setattr(torch, "empty", between_canaries)
    monkeypatch.setattr(torch, "empty_like", lambda x: between_canaries(x.shape, x.dtype, x.device))
    monkeypatch.setattr(torch.Tensor, "new_empty", between)
    offsets, key_offsets = (torch.tensor(x, device=kernel_device) for x in (queries, keys))
    schedule = Schedule(offsets, 8, 5, key_offsets=key_offsets, total_keys=12, max_key_seqlen=9)
    tiles = torch.zeros(6, 8, dtype=torch.int32, device=kernel_device)
    for i in range(3):
        start, key_start = max(min(queries[i], 8), 0), keys[i]
        tiles[i] = torch.tensor([start, min(5, 8 - start), key_start, keys[i + 1] - key_start, 0, 9, i, 0])
    layout = ScoreLayout(schedule, 16)
    q, k = torch.ones(8, 2, 16, device=kernel_device), torch.ones(12, 2, 16, device=kernel_device)
    scores = launch_scores(q, k, tiles, layout.offsets, 16, 1.0, "ieee")
    ones = torch.ones(2, 16, device=kernel_device)
    launch_weighted_sum(ones, k, tiles, layout.offsets, 8, 1.0, False, True, "ieee")
    other_tiles = tiles[:, [2, 3, 0, 1, 4, 5, 6, 7]].contiguous()
    launch_weighted_sum(ones, q, other_tiles, layout.offsets, 12, 1.0, True, True, "ieee")
    p = launch_score_softmax(scores, tiles, layout.offsets, 9, 1.0, False, None, False)
    launch_score_softmax_backward(p, p, tiles, layout.offsets, 9, 1.0, False, None, False)
    assert len(made) == 5
    for whole in made:
        assert bool((whole[:1000] == 7.0).all())
        assert bool((whole[-1000:] == 7.0).all())


def test_a_wrong_number_of_scores_is_refused_or_leaves_users_out(kernel_device: torch.device) -> None:
    schedule = SMALL.schedule(kernel_device)
    if kernel_device.type == "cpu":
        with pytest.raises(ValueError, match=r"the offsets make 64 scores \(`count_scores`\), not 56"):
            ScoreLayout(schedule, 56)
    unchecked = SMALL.schedule(kernel_device)
    unchecked.check_values = False
    (q,) = make(kernel_device, torch.float32, (8, 1, 16))
    scores = jagged_scores(q, q, ScoreLayout(unchecked, 56))  # the second user's 24 don't fit any more
    assert scores.shape == (1, 56)
    assert torch.equal(scores[:, :40], jagged_scores(q, q, SMALL.layout(kernel_device))[:, :40])


def test_count_scores() -> None:
    assert count_scores([5, 0, 9]) == 5 * 8 + 9 * 16
    assert count_scores(torch.tensor([5, 0, 3]), [1, 2, 16]) == 5 * 8 + 3 * 16
    assert count_scores(torch.tensor([5, 0, 3]), torch.tensor([1, 2, 16])) == 5 * 8 + 3 * 16
    assert count_scores([70_000, 70_000]) == 9_800_000_000
    assert count_scores([]) == 0
    with pytest.raises(ValueError, match="2 users have query lengths, 1 have key lengths"):
        count_scores([1, 2], [3])


ROWS, HEADS = torch.zeros(8, 16), torch.zeros(8, 2, 16)
REFUSED: dict[str, tuple[Any, str]] = {
    "w_of_heads": (lambda s: jagged_dense_bmm(ROWS, torch.zeros(2, 2, 16, 4), s), r"shapes \(L, K\) and \(B, K, N\)"),
    "w_of_other_users": (lambda s: jagged_dense_bmm(ROWS, torch.zeros(3, 16, 4), s), "each of the 2 users and 1 heads"),
    "w_of_other_rows": (lambda s: jagged_dense_bmm(ROWS, torch.zeros(2, 8, 4), s), "16 rows as x has columns"),
    "rows": (lambda s: jagged_dense_bmm(ROWS[:7], torch.zeros(2, 16, 4), s), "x has 7 rows, the schedule says 8"),
    "dtypes": (
        lambda s: jagged_dense_bmm(ROWS, torch.zeros(2, 16, 4).half(), s),
        "share one dtype of .* w torch.float16",
    ),
    "float64": (lambda s: jagged_jagged_bmm(ROWS.double(), ROWS.double(), s), "share one dtype"),
    "devices": (lambda s: jagged_jagged_bmm(ROWS, ROWS.to("meta"), s), "x on cpu, y on meta, offsets on cpu"),
    "y_of_other_rows": (lambda s: jagged_jagged_bmm(ROWS, ROWS[:7], s), r"shapes \(L, M\) and \(L, N\)"),
    "precision": (lambda s: jagged_jagged_bmm(ROWS, ROWS, s, precision="fp8"), "ieee, tf32, got 'fp8'"),
    "head_dims": (lambda s: jagged_scores(HEADS, HEADS[..., :8], ScoreLayout(s, 64)), r"shapes \(L, H, D\)"),
    "head_dim_257": (
        lambda s: jagged_scores(torch.zeros(8, 1, 257), torch.zeros(8, 1, 257), ScoreLayout(s, 64)),
        "D from 1 to 256",
    ),
    "key_rows": (lambda s: jagged_scores(HEADS, HEADS[:7], ScoreLayout(s, 64)), "k has 7 rows"),
    "weights": (lambda s: jagged_weighted_sum(torch.zeros(2, 63), HEADS, ScoreLayout(s, 64)), r"shape \(2, 64\)"),
    "long_user": (
        lambda s: ScoreLayout(Schedule(torch.tensor([0, 5, 8]), 8, 3, check_values=True), 64),
        "user 0 has 5 tokens, more than max_seqlen=3",
    ),
    "negative": (lambda s: ScoreLayout(s, -8), "number of scores that 8 divides, .*; got -8"),
    "pairs": (lambda s: ScoreLayout(s, 34), "number of scores that 8 divides, .*; got 34"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(SMALL.schedule(CPU))


def test_operators_obey_torch_library(kernel_device: torch.device) -> None:
    users = CROSS
    layout, schedule = users.layout(kernel_device), Users(users.lengths).schedule(kernel_device)
    tiles = layout.query_tiles(), layout.key_tiles(), layout.offsets
    q, k, w, y = make(
        kernel_device,
        torch.float32,
        (users.total, 2, 16),
        (users.total_keys, 2, 16),
        (6, 2, 16, 20),
        (users.total, 2, 20),
    )
    (weights,) = make(kernel_device, torch.float32, (2, layout.total))
    operands = [x.requires_grad_() for x in (q, k, w, y, weights)]
    q, k, w, y, weights = operands
    (row_tiles,) = schedule.query_tiles([BLOCK], causal=False)
    offsets, _, longest = schedule.queries
    ops = torch.ops.recsys_kernels
    for op, args in (
        (ops.jagged_scores, (q, k, *tiles, layout.total, 0.5, "ieee")),
        (ops.jagged_weighted_sum, (weights, k, *tiles, users.total, 1.0, False, False, "ieee")),
        (ops.jagged_weighted_sum, (weights, q, *tiles, users.total_keys, 1.0, True, True, "ieee")),
    ):
        torch.library.opcheck(op.default, args)
    torch.library.opcheck(ops.jagged_dense_bmm.default, (q, w, row_tiles, offsets, longest, "ieee"))
    torch.library.opcheck(ops.jagged_jagged_bmm.default, (q, y, row_tiles, offsets, longest, "ieee"))


def test_a_layout_made_while_compiling(kernel_device: torch.device) -> None:
    offsets = SMALL.offsets(kernel_device)

    def layer(q: Tensor, k: Tensor, offsets: Tensor) -> Tensor:
        layout = ScoreLayout(Schedule(offsets, 8, 5, check_values=True), 64)
        return jagged_scores(q, k, layout)

    q, k = make(kernel_device, torch.float32, (8, 2, 16), (8, 2, 16))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, offsets), layer(q, k, offsets))


def test_a_layout_made_in_inference_mode_serves_training(kernel_device: torch.device) -> None:
    with torch.inference_mode():
        layout = SMALL.layout(kernel_device)
    operands = make(kernel_device, torch.float32, (8, 2, 16), (8, 2, 16))
    (dout,) = make(kernel_device, torch.float32, (2, 64), seed=1)
    _, dq, _ = with_gradients(lambda q, k: jagged_scores(q, k, layout), operands, dout)
    assert bool(dq.any())


def test_compiles_without_a_graph_break(kernel_device: torch.device) -> None:
    layout, schedule = SMALL.layout(kernel_device), SMALL.schedule(kernel_device)

    def block(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        mixed = jagged_weighted_sum(jagged_scores(q, k, layout, scale=0.1), k, layout)
        return jagged_dense_bmm(mixed, jagged_jagged_bmm(q, k, schedule) + w, schedule)

    operands = make(kernel_device, torch.float32, (8, 2, 16), (8, 2, 16), (2, 2, 16, 16))
    (dout,) = make(kernel_device, torch.float32, (8, 2, 16), seed=1)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, operands, dout), with_gradients(block, operands, dout), strict=True):
        assert torch.equal(a, b)
