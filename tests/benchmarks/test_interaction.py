"""The comparison of building blocks: who does what, whether results are judged rightly, what a row says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.attention.shapes import Batch, Shape
from benchmarks.interaction import run
from benchmarks.interaction.layouts import Layouts
from benchmarks.interaction.operations import OPERATIONS, OURS, PADDED, PROVIDERS
from benchmarks.interaction.run import COLUMNS, main, parse_options, run_benchmark, table
from kernels.score_pitch import count_scores, row_pitch
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton can't run here")
CPU = torch.device("cpu")
FULL = Shape("full", users=5, heads=2, head_dim=16, mean=9, max=20, causal=False)
CAUSAL = Shape("causal", users=5, heads=2, head_dim=16, mean=9, max=20)


def layouts_of(shape: Shape, dtype: torch.dtype = torch.float32) -> Layouts:
    return Layouts(Batch(shape, dtype, CPU))


CANDIDATES = Shape("candidates", users=5, heads=2, head_dim=16, mean=9, max=20, targets=2)


@pytest.mark.parametrize("shape", [FULL, CAUSAL, CANDIDATES], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_provider_does_the_same(name: str, shape: Shape) -> None:
    """Those that are timed on CUDA only are run by their own code for CPUs: arguments and conversions are the same."""
    import fbgemm_gpu.sll  # noqa: F401  registers its operators

    operation = OPERATIONS[name](layouts_of(shape))
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(x, generator=generator) for x in operation.operand_shapes()]
    dout = torch.randn(operation.result_shape(), generator=generator)
    expected = run._results(operation.reference, operands, dout, "forward_backward")
    assert [tuple(x.shape) for x in expected] == [operation.result_shape(), *operation.operand_shapes()]
    providers = operation.providers()
    assert next(iter(providers)) == OURS
    assert set(providers) <= set(PROVIDERS)
    for provider in providers.values():
        if not INTERPRETED and provider is providers[OURS]:
            continue
        sets = [run.Set(operands, dout)]
        row, _ = run._prepare(operation, provider, sets, expected, "forward_backward", repeats=1, pool=None)
        assert row["status"] == "ok", row


def test_work_is_what_has_to_be_read_written_and_multiplied() -> None:
    layouts = layouts_of(FULL, torch.bfloat16)
    L, T = layouts.batch.total, layouts.num_pairs
    assert sum(n * n for n in layouts.batch.lengths) == T < layouts.num_scores
    work = {name: operation(layouts).work("forward") for name, operation in OPERATIONS.items()}
    assert work["jagged_scores"].flop == 2 * T * 2 * 16
    assert work["jagged_scores"].num_bytes == 2 * (2 * L * 2 * 16 + 2 * T)
    assert work["jagged_dense_bmm"].num_bytes == 2 * (2 * L * 16 + 5 * 16 * 16)
    assert work["jagged_score_softmax"].num_bytes == 2 * 2 * 2 * T
    both = OPERATIONS["jagged_score_softmax"](layouts).work("forward_backward")
    assert both.num_bytes == 2 * 5 * 2 * T  # x, y; y, dy, dx
    pool = OPERATIONS["jagged_pool"](layouts).work("forward_backward")
    assert pool.num_bytes == 2 * 2 * (L * 32 + 5 * 32)  # x, out; dout, dx
    causal = layouts_of(CAUSAL, torch.bfloat16)
    seen = sum(n * (n + 1) // 2 for n in causal.batch.lengths)
    softmax = OPERATIONS["jagged_score_softmax"](causal)
    assert softmax.work("forward").num_bytes == 2 * 2 * (seen + causal.num_pairs)
    assert softmax.work("forward_backward").num_bytes == 2 * 2 * (3 * seen + 2 * causal.num_pairs)
    assert OPERATIONS["jagged_scores"](layouts).work("forward_backward").flop == 3 * work["jagged_scores"].flop


def test_padding_and_back() -> None:
    layouts = layouts_of(FULL)
    rows, scores = torch.randn(layouts.batch.total, 2, 3), torch.randn(2, layouts.num_scores)
    padded = layouts.pad_rows(rows)
    assert padded.shape == (5, layouts.batch.max_seqlen, 2, 3)
    assert torch.equal(layouts.unpad_rows(padded), rows)
    squares = layouts.pad_scores(scores)
    assert squares.shape == (5, 2, layouts.batch.max_seqlen, layouts.batch.max_seqlen)
    assert torch.equal(layouts.unpad_scores(squares), scores * layouts.is_pair)
    assert int(layouts.is_pair.sum()) == layouts.num_pairs < layouts.num_scores
    first, second = layouts.batch.lengths[:2]
    assert squares[1, 0, 0, 0] == scores[0, count_scores([first])]
    assert (
        squares[1, 1, second - 1, second - 1]
        == scores[1, count_scores([first, second]) - row_pitch(second) + second - 1]
    )
    tight = layouts.tight(scores)
    assert tight.shape == (2, layouts.num_pairs)
    assert tight[1, first + 1] == scores[1, row_pitch(first) + 1]
    assert torch.equal(layouts.loose(tight), scores * layouts.is_pair)


@pytest.mark.parametrize("wrong", ["a_row", "a_user", "everything", "nan"])
@pytest.mark.parametrize("name", ["jagged_softmax", "jagged_score_softmax", "jagged_pool"])
def test_a_wrong_result_is_marked(name: str, wrong: str) -> None:
    layouts = layouts_of(FULL, torch.bfloat16)
    operation = OPERATIONS[name](layouts)
    (x,) = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in operation.operand_shapes())
    exact = operation.reference(x)
    first_score = count_scores(layouts.batch.lengths[:-1])
    place: Any = (slice(None), slice(first_score, None)) if name == "jagged_score_softmax" else -1

    def spoil(x: Tensor) -> Tensor:
        out = operation.reference(x)
        if wrong == "everything":
            return out * 1.2
        out[place] = float("nan") if wrong == "nan" else 0.0
        return out

    sets = [run.Set([x], exact)]
    row, _ = run._prepare(operation, run.Provider(spoil), sets, [exact], "forward", repeats=1, pool=None)
    assert row["status"] == "inaccurate"
    assert row["relative_error"] > 1
    row, _ = run._prepare(operation, run.Provider(operation.reference), sets, [exact], "forward", 1, None)
    assert row["status"] == "ok"


def test_a_row_that_nobody_wrote_is_marked() -> None:
    operation = OPERATIONS["jagged_softmax"](layouts_of(FULL))
    (x,) = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in operation.operand_shapes())
    exact = operation.reference(x)

    def leaves_one_out(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:-1] = operation.reference(x)[:-1]
        return out

    row, _ = run._prepare(operation, run.Provider(leaves_one_out), [run.Set([x], exact)], [exact], "forward", 1, None)
    assert row["status"] == "inaccurate"


def test_an_inaccurate_row_has_no_ratio() -> None:
    rows = [
        {"provider": OURS, "status": "inaccurate", "device_ms": 1.0},
        {"provider": PADDED, "status": "ok", "device_ms": 9.0},
    ]
    run._fill_ratios(rows)
    assert "ratio_to_best_peer" not in rows[0]
    assert rows[1]["ratio_to_padded"] == 1.0


def test_rows_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory\nat all")

    providers = OPERATIONS["jagged_softmax"].providers
    monkeypatch.setattr(
        OPERATIONS["jagged_softmax"],
        "providers",
        lambda self: {**providers(self), OURS: providers(self)[PADDED], "sll": run.Provider(fails)},
    )
    output = tmp_path / "rows.csv"
    arguments = f"--device cpu --operations jagged_softmax --shapes tiny --modes forward --repeats 1 --output {output}"
    if not INTERPRETED:
        pytest.skip("the bench refuses a CPU where Triton doesn't interpret")
    rows = {row["provider"]: row for row in run_benchmark(parse_options(arguments.split()))}
    assert rows[OURS]["status"] == rows[PADDED]["status"] == "ok"
    assert (rows["sll"]["status"], rows["sll"]["reason"]) == ("out of memory", "no memory")
    assert rows["fbgemm"]["status"] == "absent"
    assert rows[OURS]["ratio_to_padded"] == pytest.approx(rows[PADDED]["device_ms"] / rows[OURS]["device_ms"], abs=1e-3)
    with output.open() as file:
        written = list(csv.DictReader(file))
    assert [row["provider"] for row in written] == list(PROVIDERS)
    assert tuple(written[0]) == COLUMNS
    assert "geometric mean" in table(list(rows.values()), "forward")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--operations conv", "there is no operation conv: allowed are jagged_dense_bmm"),
        ("--shapes S9", "there is no shape S9: allowed are S1"),
        ("--providers fa4", "there is no provider fa4: allowed are ours, padded, torch, nested, fbgemm, sll"),
        ("--repeats 0", "--repeats is 0"),
        ("--shape name=X,users=1,heads=2,kv_heads=1,head_dim=16,mean=1,max=1", "here all have as many heads, 2"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert message in capsys.readouterr().err
