"""The comparison of attention kernels: its counts, its judgement of results, its rows. Speed is not tested."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.attention import plots, providers, run
from benchmarks.attention.accuracy import Reference, checked_users, user_mask
from benchmarks.attention.calls import copies_past_cache, run_once
from benchmarks.attention.providers import PROVIDERS, Provider, flex_block_mask
from benchmarks.attention.rows import best_peer, fill_ratios, table
from benchmarks.attention.run import Options, main, parse_options, run_benchmark
from benchmarks.attention.shapes import SHAPES, Batch, Inputs, Shape, parse_shape, visible_pairs, work_of
from benchmarks.rows import Row
from benchmarks.timing import MODES, Ready, Timing, _capture_or_none, time_in_turns, turns_in_order
from kernels.jagged_flash_attention import dense_mask
from tests.conftest import INTERPRETED

CPU = torch.device("cpu")
SMALL = Shape("small", users=5, heads=2, head_dim=16, mean=14, max=30)
VARIANTS = {
    "causal": SMALL,
    "full": dataclasses.replace(SMALL, causal=False),
    "window": dataclasses.replace(SMALL, window=4),
    "full window": dataclasses.replace(SMALL, causal=False, window=4),
    "targets": dataclasses.replace(SMALL, targets=3),
    "targets, window": dataclasses.replace(SMALL, targets=3, window=4),
    "all": dataclasses.replace(SMALL, causal=False, targets=3, window=4),
}
variants = pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)


def small_batch(shape: Shape = SMALL, dtype: torch.dtype = torch.float32) -> Batch:
    return Batch(shape, dtype, CPU)


def options_of(arguments: str) -> Options:
    return parse_options(arguments.split())


def full_mask(batch: Batch) -> Tensor:
    """`(B, N, N)`, by the kernel's own reference."""
    return dense_mask(
        batch.offsets,
        batch.max_seqlen,
        causal=batch.shape.causal,
        window=batch.window,
        num_targets=batch.num_targets,
    )


# Shapes


def test_the_named_shapes_are_those_of_the_comparison() -> None:
    assert list(SHAPES) == ["S1", "S2", "S3", "M1", "M2", "L1", "L2", "L3", "tiny"]
    assert [name for name, shape in SHAPES.items() if not shape.causal] == ["S3", "M2"]
    assert SHAPES["L3"].lengths() == [4096] * 16


@pytest.mark.parametrize("name", SHAPES)
def test_lengths_are_reproducible_and_in_bounds(name: str) -> None:
    shape = SHAPES[name]
    lengths = shape.lengths()
    assert lengths == shape.lengths()
    assert len(lengths) == shape.users
    assert 1 <= min(lengths) <= max(lengths) <= shape.max


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    lengths = Shape("x", users=20_000, heads=1, head_dim=16, mean=100, max=100_000).lengths()
    assert sum(lengths) / len(lengths) == pytest.approx(100, rel=0.05)
    assert sorted(lengths)[10_000] == pytest.approx(100 * 2.718 ** (-1 / 2), rel=0.05)  # the median of sigma 1


def test_parse_shape() -> None:
    text = "name=X,users=64,heads=4,head_dim=64,mean=300,max=2048,causal=FALSE,kv_heads=2,window=7,targets=3"
    assert parse_shape(text) == Shape(
        "X", users=64, heads=4, head_dim=64, mean=300, max=2048, causal=False, kv_heads=2, window=7, targets=3
    )
    short = parse_shape("name=Y, users=1, heads=4, head_dim=8, mean=3, max=3")
    assert (short.causal, short.kv_heads, short.window, short.targets) == (True, 4, 0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name=X,users=64", "lacks heads, head_dim, mean, max"),
        ("name=X,size=3", "expected key=value, keys are name, users"),
        ("name=X,causal", "expected key=value"),
        ("name=X,name=Y", "has name twice"),
        ("name=X,users=many", "users=many: it must be an integer"),
        ("name=X,causal=perhaps", "allowed are true and false"),
        ("name=X,users=0,heads=4,head_dim=64,mean=3,max=20", "users is 0: allowed are values >= 1"),
        ("name=X,users=1,heads=4,head_dim=64,mean=30,max=20", "mean=30 is greater than max=20"),
        ("name=X,users=1,heads=4,kv_heads=3,head_dim=64,mean=3,max=20", "heads=4 is not a multiple of kv_heads=3"),
    ],
)
def test_a_wrong_shape_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


def test_a_batch_leaves_every_user_some_history() -> None:
    batch = small_batch(dataclasses.replace(SMALL, users=200, targets=10))
    assert max(batch.targets) == 10
    assert all(0 <= targets < length for targets, length in zip(batch.targets, batch.lengths, strict=True))
    assert min(batch.targets) < 10
    assert batch.bounds == batch.offsets.tolist()
    assert batch.bounds[-1] == batch.total == sum(batch.lengths)


# Work


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 9, 50])
@pytest.mark.parametrize("history", [1, 2, 9, 20])
@pytest.mark.parametrize("targets", [0, 4])
def test_visible_pairs_counts_the_mask(history: int, targets: int, window: int, causal: bool) -> None:
    length = history + targets
    mask = dense_mask(
        torch.tensor([0, length]),
        length,
        causal=causal,
        window=window or None,
        num_targets=torch.tensor([targets]),
    )
    assert visible_pairs(history, targets, causal, window) == int(mask.sum())


def test_work_of_a_batch_counted_by_hand() -> None:
    """Two users of 3 tokens: 6 pairs each under a causal mask; 2 heads of 8 in bfloat16, 1 head of keys."""
    batch = small_batch(Shape("x", users=2, heads=2, kv_heads=1, head_dim=8, mean=3, max=3), torch.bfloat16)
    q, k = 6 * 2 * 8 * 2, 6 * 1 * 8 * 2  # bytes
    forward, both = work_of(batch, "forward"), work_of(batch, "forward_backward")
    assert forward.flop == 4 * 12 * 2 * 8
    assert both.flop == 14 * 12 * 2 * 8
    assert forward.num_bytes == (q + 2 * k) + q
    # then q, k, v, out, dout are read, and dq, dk, dv written
    assert both.num_bytes == forward.num_bytes + (q + 2 * k + q + q) + (q + 2 * k)


def test_floor_is_the_slower_of_memory_and_matrix_units() -> None:
    short = work_of(small_batch(SHAPES["S1"], torch.bfloat16), "forward")
    long = work_of(small_batch(SHAPES["L3"], torch.bfloat16), "forward")
    assert short.floor_ms == pytest.approx(short.num_bytes / 4.26e12 * 1e3)
    # 16 users x 8 heads x 4 x 128 x 4096 x 4097 / 2 at 798 TFLOP/s
    assert long.floor_ms == pytest.approx(0.689, abs=0.001)


# Accuracy


@variants
def test_the_reference_mask_is_the_kernels(shape: Shape) -> None:
    batch = small_batch(shape)
    expected = full_mask(batch)
    for user, length in enumerate(batch.lengths):
        mask = user_mask(length, batch.targets[user], shape.causal, batch.window, CPU)
        assert torch.equal(mask, expected[user, :length, :length])


@variants
@pytest.mark.parametrize("name", ["dense", "sdpa"])
def test_right_results_are_accepted(shape: Shape, name: str) -> None:
    batch = small_batch(shape)
    inputs = batch.make_inputs(1)[0]
    errors = Reference(batch, inputs).compare(run_once(PROVIDERS[name](batch), inputs, "forward_backward"))
    assert list(errors.greatest) == ["out", "dq", "dk", "dv"]
    assert 0 < errors.greatest["dv"] < 1e-5
    assert errors.relative < 1


def test_the_reference_with_fewer_heads_of_keys_is_that_of_repeated_heads() -> None:
    few = small_batch(dataclasses.replace(SMALL, heads=4, kv_heads=2))
    inputs = few.make_inputs(1)[0]
    leaves = {"k": inputs.k, "v": inputs.v}
    many = small_batch(dataclasses.replace(SMALL, heads=4))
    dense = PROVIDERS["dense"](many)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))

    results = run_once(repeated, inputs, "forward_backward")
    assert results[2].shape == leaves["k"].shape
    assert Reference(few, inputs).compare(results).relative < 1


@pytest.mark.parametrize("which", range(4), ids=["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_one_wrong_row_is_noticed(which: int, value: float) -> None:
    batch = small_batch(dtype=torch.bfloat16)
    inputs = batch.make_inputs(1)[0]
    results = [x.detach().clone() for x in run_once(PROVIDERS["dense"](batch), inputs, "forward_backward")]
    reference = Reference(batch, inputs)
    assert reference.compare(results).relative < 1
    last_of_the_longest = batch.bounds[batch.lengths.index(batch.max_seqlen) + 1] - 1
    results[which][last_of_the_longest] += value
    assert reference.compare(results).relative > 1


def test_a_wrong_mask_is_noticed() -> None:
    batch = small_batch(dataclasses.replace(SMALL, mean=300, max=600), torch.bfloat16)
    inputs = batch.make_inputs(1)[0]
    windowed = small_batch(dataclasses.replace(batch.shape, window=batch.max_seqlen - 32), torch.bfloat16)
    results = run_once(PROVIDERS["dense"](windowed), inputs, "forward")
    assert Reference(batch, inputs).compare(results).relative > 1


def test_checked_users_include_the_longest_that_fits_and_none_of_one_token() -> None:
    batch = small_batch(dataclasses.replace(SMALL, users=6))
    batch.__dict__["lengths"] = [1, 40, 7, 9000, 12, 1]
    assert checked_users(batch) == [1, 4, 2]
    batch.__dict__["lengths"] = [1, 1]
    assert checked_users(batch) == []


# Providers


@variants
def test_flex_block_mask_is_the_mask(shape: Shape) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch = small_batch(dataclasses.replace(shape, users=9))
    block_mask = flex_block_mask(batch, block=16, rows_at_once=40)
    exact = create_block_mask(
        block_mask.mask_mod, None, None, batch.total, batch.total, device=CPU, BLOCK_SIZE=16, _compile=False
    )
    assert block_mask.shape == exact.shape
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(block_mask, name), getattr(exact, name)), name

    inputs = batch.make_inputs(1)[0]
    q, k, v = (x.detach().transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    out = flex_attention(q, k, v, block_mask=block_mask)[0].transpose(0, 1)
    assert Reference(batch, inputs).compare((out,)).relative < 1


@pytest.mark.skipif(not INTERPRETED, reason="on a CPU, Triton kernels run in the interpreter only")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of rows past a user's end
@pytest.mark.parametrize("name", ["sll", "jagged_flash", "jagged_flash_shared"])
def test_triton_providers_are_compared_in_one_layout_and_scale(name: str) -> None:
    batch = small_batch(dataclasses.replace(SMALL, causal=False))
    assert PROVIDERS[name].absent(CPU) is None
    assert PROVIDERS[name].refuses(batch) is None
    inputs = batch.make_inputs(1)[0]
    provider = PROVIDERS[name](batch)
    results = provider.restore(run_once(provider, provider.convert(inputs), "forward_backward"))
    assert Reference(batch, inputs).compare(results).relative < 1


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("sll", SMALL, torch.bfloat16, "a causal mask"),
        ("sll", VARIANTS["full window"], torch.bfloat16, "a window"),
        ("fa4", VARIANTS["targets"], torch.bfloat16, "candidates"),
        ("fa4", SMALL, torch.float32, "float32"),
        ("dense", dataclasses.replace(SMALL, kv_heads=1), torch.bfloat16, "fewer heads of keys"),
        ("varlen", SMALL, torch.float32, "float32"),
    ],
)
def test_what_a_provider_cannot_do_it_says(name: str, shape: Shape, dtype: torch.dtype, reason: str) -> None:
    refused = PROVIDERS[name].refuses(small_batch(shape, dtype))
    assert refused is not None
    assert reason in refused


def test_copies_on_a_cpu_is_one() -> None:
    assert copies_past_cache(small_batch()) == 1


# Rows


def timed(provider: str, ms: float, status: str = rows.OK, shape: str = "S1", mode: str = "forward") -> Row:
    return {
        **{name: getattr(SHAPES[shape], name) for name in ("heads", "kv_heads", "head_dim", "causal")},
        "window": 0,
        "targets": 0,
        "shape": shape,
        "mode": mode,
        "provider": provider,
        "status": status,
        "device_ms": ms,
        "mean_length": 100.0,
        "peak_mib": 64.0,
        "floor_ms": 0.05,
        "fraction_of_floor": 0.05 / ms,
        "device": "some GPU",
    }


def test_ratios_are_to_the_fastest_accurate_peer() -> None:
    group = [
        timed("dense", 8.0),
        timed("varlen", 2.0),
        timed("sll", 0.5, status=rows.INACCURATE),
        timed("jagged_flash", 1.0),
        {"shape": "S1", "mode": "forward", "provider": "fa4", "status": rows.ABSENT, "reason": "not there"},
    ]
    assert best_peer(group) is group[1]
    fill_ratios(group)
    assert [row["ratio_to_best_peer"] for row in group] == [0.25, 1.0, 4.0, 2.0, None]


def test_without_a_peer_there_is_no_ratio() -> None:
    group = [timed("jagged_flash", 1.0)]
    fill_ratios(group)
    assert group[0]["ratio_to_best_peer"] is None


def test_table_has_a_line_per_shape_and_says_who_could_not() -> None:
    group = [
        timed("sdpa", 0.2),
        timed("varlen", 0.1),
        timed("sll", 0.05, status=rows.INACCURATE),
        {"shape": "S1", "mode": "forward", "provider": "flex", "status": rows.OUT_OF_MEMORY, "floor_ms": 0.05},
        {"shape": "S1", "mode": "forward", "provider": "fa4", "status": rows.ABSENT, "floor_ms": 0.05},
        timed("jagged_flash", 0.0625),
    ]
    fill_ratios(group)
    other_mode = timed("sdpa", 7.0, mode="forward_backward", shape="S2")
    header, _, line = table([*group, other_mode], "forward").splitlines()
    assert " ".join(header.split()) == (
        "shape floor sdpa varlen sll flex jagged_flash best peer peer/jagged_flash of floor MiB MiB peer"
    )
    assert " ".join(line.split()) == "S1 0.050 0.200 0.100 0.050! out of memory 0.062 varlen 1.60 80% 64 64"


def test_plots_are_drawn_or_their_absence_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib is not installed" in str(plots.unavailable())
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    group = [timed("sdpa", 0.2), timed("jagged_flash", 0.1), timed("sdpa", 0.4, shape="S2")]
    fill_ratios(group)
    names = [path.name for path in plots.draw(group, tmp_path / "plots")]
    assert names == ["forward_time.png", "forward_memory.png", "forward_ratio.png"]
    assert all((tmp_path / "plots" / name).stat().st_size > 1000 for name in names)


# The whole


def test_a_run_on_a_cpu_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.csv"
    main(f"--device cpu --shapes tiny --providers dense,sdpa,fa4 --repeats 2 --output {output}".split())
    with output.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["mode"], row["provider"], row["status"]) for row in read] == [
        (mode, provider, status)
        for mode in MODES
        for provider, status in (("dense", "ok"), ("sdpa", "ok"), ("fa4", "absent"))
    ]
    for row in read:
        assert row["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a wheel may leave the build out
        assert row["command"].startswith("python -m benchmarks.attention --device cpu")
        assert (row["tokens"], row["max_length"]) == ("86", "48")
        if row["status"] == "ok":
            assert float(row["device_ms"]) > 0
            assert float(row["relative_error"]) < 1
            assert row["method"] == "wall"
            assert (row["error_dq"] != "") == (row["mode"] == "forward_backward")
            assert row["floor_ms"] == ""  # it is an H200's
    printed = capsys.readouterr().out
    assert "absent: fa4: " in printed
    assert "forward_backward, device ms" in printed


class Broken(Provider):
    """A provider whose call does what the test wants."""

    name = "dense"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    @staticmethod
    def absent(device: torch.device) -> str | None:
        return None

    @staticmethod
    def refuses(batch: Batch) -> str | None:
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise self.error  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate\nmuch"), "out of memory", "tried to allocate"),
        (ValueError("head_dim must be"), "unsupported", "head_dim must be"),
        (NotImplementedError(""), "unsupported", "NotImplementedError"),
        (AssertionError("no luck"), "failed", "AssertionError: no luck"),
    ],
)
def test_what_goes_wrong_in_a_provider_is_its_status(
    error: Exception, status: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "error", error, raising=False)
    monkeypatch.setitem(PROVIDERS, "dense", Broken)
    options = options_of("--device cpu --shapes tiny --providers dense,sdpa --modes forward --repeats 1")
    broken, fine = run_benchmark(options)
    assert (broken["status"], broken["reason"]) == (status, reason)
    assert broken.get("device_ms") is None
    assert fine["status"] == "ok"


def test_a_wrong_result_is_timed_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(providers.Dense):
        def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().__call__(q, k, v) * 1.2

    monkeypatch.setitem(PROVIDERS, "dense", Wrong)
    options = options_of("--device cpu --shapes tiny --providers dense --modes forward --repeats 1")
    (row,) = run_benchmark(options)
    assert row["status"] == "inaccurate"
    assert row["relative_error"] > 1
    assert row["device_ms"] > 0


def test_unwritten_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are the size of an output, so that the allocator gives them out again."""
    made: list[Tensor] = []
    full = torch.full

    def kept(size: Sequence[int], value: float, **keywords: object) -> Tensor:
        made.append(full(size, value, **keywords))
        return made[-1]

    monkeypatch.setattr(torch, "full", kept)
    batch = small_batch()
    run._poison_free_memory(batch)
    assert {tuple(x.shape) for x in made} == {(batch.total, 2, 16)}
    assert all(bool(x.isnan().all()) for x in made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shapes S9", "there is no shape S9: allowed are S1"),
        ("--providers fa3", "there is no provider fa3"),
        ("--modes backward", "there is no mode backward: allowed are forward, forward_backward"),
        ("--repeats 0", "--repeats is 0"),
        ("--shapes S1 --shape name=S1,users=1,heads=1,head_dim=16,mean=1,max=1", "two shapes have one name"),
        ("--shape name=S1", "shape 'name=S1' lacks users"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of(arguments)
    assert message in capsys.readouterr().err


def test_default_shapes_depend_on_the_device() -> None:
    def names(arguments: str) -> list[str]:
        return [shape.name for shape in options_of(arguments).shapes]

    assert names("--device cpu") == ["tiny"]
    assert names("--device cuda") == ["S1", "S2", "S3", "M1", "M2", "L1", "L2", "L3"]
    own = "--shape name=own,users=1,heads=1,head_dim=16,mean=1,max=1"
    assert names(f"--device cuda {own}") == ["own"]
    assert names(f"--device cuda --shapes S2,L3 {own}") == ["S2", "L3", "own"]


def test_a_file_of_other_columns_ends_the_run_before_anything_is_measured(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("a,b\n")
    with pytest.raises(SystemExit, match="has other columns"):
        main(f"--device cpu --shapes tiny --providers dense --output {foreign}".split())


def test_providers_take_turns_in_a_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.ms = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def provider(name: str, ms: float, num_calls: int) -> Ready:
        def some_calls() -> None:
            calls.append(name)
            clock[0] += ms * num_calls * (100 if calls.count(name) == 3 else 1)  # once, something is in the way

        return Ready(some_calls, num_calls, "graph", call_ms=2 * ms, peak_mib=None)

    def breaks() -> None:
        calls.append("broken")
        if calls.count("broken") == 3:
            raise torch.OutOfMemoryError("no memory")

    broken = Ready(breaks, 10, "queued", call_ms=1.0, peak_mib=None)
    providers = [provider("a", 1.0, 10), broken, provider("b", 2.0, 10), provider("c", 3.0, 5)]
    a, error, b, c = time_in_turns(providers, repeats=9)
    assert isinstance(error, torch.OutOfMemoryError)
    assert calls.count("broken") == 3
    calls = [name for name in calls if name != "broken"]
    for timing, ms in ((a, 1.0), (b, 2.0), (c, 3.0)):
        assert isinstance(timing, Timing)
        assert (timing.device_ms, timing.call_ms) == (ms, 2 * ms)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 10  # the first isn't timed
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert time_in_turns([], repeats=9) == []


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 7, 12])
def test_everyone_comes_equally_often_behind_every_other(num: int) -> None:
    rounds = 4 * num
    turns = list(turns_in_order(num, rounds))
    assert turns == list(turns_in_order(num, rounds))
    assert sorted(turns) == [(i_round, i) for i_round in range(rounds) for i in range(num)]
    behind = Counter(itertools.pairwise(i for _, i in turns))
    times = [behind[first, second] for first in range(num) for second in range(num) if first != second]
    assert num == 1 or (all(behind[i, i] == 0 for i in range(num)) and max(times) - min(times) <= 3)


def test_what_fails_in_its_turn_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = Ready(lambda: None, 10, "queued", call_ms=1.0, peak_mib=None)
    monkeypatch.setattr(run, "prepare", lambda *args: ready)
    errors = iter([torch.OutOfMemoryError("no memory"), RuntimeError("a bug")] * 2)
    monkeypatch.setattr(run, "time_in_turns", lambda ready, repeats: [next(errors) for _ in ready])
    found = run_benchmark(options_of("--device cpu --shapes tiny --providers dense,sdpa"))
    assert [row["status"] for row in found] == ["out of memory", "failed"] * 2
    assert [row["reason"] for row in found] == ["no memory", "RuntimeError: a bug"] * 2
    assert all(row.get("device_ms") is None for row in found)


@pytest.mark.gpu
def test_a_capture_that_fails_gives_its_memory_back() -> None:
    x = torch.randn(2**20, device="cuda")

    def waits(i: int) -> object:
        return float(torch.cat([x] * 64).sum())  # 256 MiB, and the host waits, which a capture forbids

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        assert _capture_or_none(waits, torch.cuda.graph_pool_handle()) is None
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**26
    assert _capture_or_none(lambda i: x + i, None) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("causal", ["true", "false"])
@pytest.mark.parametrize("mode", MODES)
def test_graphs_are_replayed_on_a_gpu(mode: str, causal: str) -> None:
    """Providers that keep masks and indices beside their inputs too: the graphs read them after all are ready."""
    shape = f"name=own,users=6,heads=2,head_dim=32,mean=20,max=48,targets=2,causal={causal}"
    options = options_of(f"--device cuda --shape {shape} --providers sdpa,varlen,jagged_flash --modes {mode}")
    for row in run_benchmark(options):
        assert (row["status"], row["method"]) == ("ok", "graph"), row
        assert row["device_ms"] <= row["call_ms"] * 1.5
        assert row["peak_mib"] > 0


def test_inputs_rotate_over_different_values() -> None:
    first, second = small_batch().make_inputs(2)
    assert isinstance(first, Inputs)
    assert not torch.equal(first.q, second.q)
    assert torch.equal(first.q, small_batch().make_inputs(1)[0].q)
