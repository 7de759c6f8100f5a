"""Tuning and soaking of jagged flash attention: what is tried, how it is chosen and checked. Speed is not tested."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.attention import kernel_bench, soak, tune
from benchmarks.attention.candidates import KERNELS, Candidate, candidates, describe, shared_memory
from benchmarks.attention.kernel_bench import Bench, Setting, disagreement, replace_tile
from benchmarks.attention.tune import Job, Tuner, choose, find_output, merge_rows, parse_options, tune_all
from benchmarks.poison import poisoned_memory
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.hopper.two_groups.config import TwoGroupForwardConfig
from kernels.jagged_flash_attention.tuning import (
    FILE_VARIABLE,
    PADDED_HEAD_DIMS,
    Machine,
    Tile,
    Tiles,
    TunedRow,
    read_tuning,
    table_tiles,
    write_tuning,
)
from tests.conftest import INTERPRETED

CPU = torch.device("cpu")
MACHINE = Machine("NVIDIA A10", (8, 6), "3.6.0")
SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (9, 0): 227, (12, 0): 99}  # KB of a program
A, B, C = Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)
SMALL = Setting(torch.float32, 16, 32, True)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs kernels on the CPU; set TRITON_INTERPRET=1")


# Candidates


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", PADDED_HEAD_DIMS)
def test_candidates_are_a_short_list_that_fits(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    for max_seqlen, causal in itertools.product((512, 2048), (True, False)):
        table = table_tiles(head_dim, dtype, capability, max_seqlen, causal)
        for kernel in KERNELS:
            found = candidates(kernel, head_dim, dtype, capability, table)
            assert len(set(found)) == len(found) <= 36
            own = getattr(table, kernel)
            assert own is None or found[0] == own, "the table's comes first"
            memory = [shared_memory(kernel, candidate, head_dim, dtype) for candidate in found]
            assert own is None or memory[0] <= SHARED_MEMORY[capability] * 1024
            fitting = sum(needed <= SHARED_MEMORY[capability] * 1024 for needed in memory)
            assert fitting >= 2 or kernel.startswith("hopper") or kernel == "short"
            for candidate in found:
                if not isinstance(candidate, Tile):
                    assert kernel.startswith("hopper")
                    assert capability == (9, 0)
                    continue
                # Their sizes are checked by Tile itself: powers of two, no fewer than 16, which tl.dot takes.
                assert not candidate.tma or capability >= (9, 0)
                assert kernel != "short" or candidate.block_m == candidate.block_n
                # Registers: the accumulators of a program, in float32, are at most half of what its threads can have.
                rows = {"forward": candidate.block_m, "dq": candidate.block_m}.get(kernel, 2 * candidate.block_n)
                assert rows * head_dim <= 128 * 32 * candidate.num_warps or candidate == own
                assert (candidate.max_registers or 255) * 32 * candidate.num_warps <= 65_536


@pytest.mark.parametrize("kernel", ["hopper_forward", "hopper_dq", "hopper_dkv"])
def test_kernels_for_hopper_are_tried_where_they_exist(kernel: str) -> None:
    def number(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
        table = table_tiles(head_dim, dtype, capability, 512, True)
        return len(candidates(kernel, head_dim, dtype, capability, table))

    assert number(128, torch.float16, (9, 0)) > 0
    assert number(256, torch.bfloat16, (9, 0)) == number(64, torch.float32, (9, 0)) == 0
    assert number(64, torch.bfloat16, (8, 0)) == 0


def test_candidates_are_described_apart() -> None:
    table = table_tiles(64, torch.bfloat16, (9, 0), 512, True)
    for kernel in KERNELS:
        found = candidates(kernel, 64, torch.bfloat16, (9, 0), table)
        assert len({describe(candidate) for candidate in found}) == len(found)
    assert describe(Tile(64, 32, 4, 3, tma=True, max_registers=96)) == "64x32 w4 s3 tma r96"
    assert describe(Tile(64, 32, 4, 3, split=False)) == "64x32 w4 s3 one loop"
    assert describe(None) == "none"


# Choosing


def choose_by(table: Tiles, times: dict[tuple[str, Candidate, int], float], short_fraction: float = 0.5) -> Tiles:
    """The choice among all that have a time: by kernel, candidate and the short users that are left out."""
    tried = {kernel: list(dict.fromkeys(c for k, c, _ in times if k == kernel)) for kernel in KERNELS}

    def times_of(pairs: list[tuple[str, Candidate]], short: int) -> dict[Candidate, float]:
        return {candidate: times[kernel, candidate, short] for kernel, candidate in pairs}

    return choose(table, tried, times_of, lambda block: short_fraction).tiles


BACKWARD = {("dq", A, 0): 10.0, ("dkv", A, 0): 10.0}
TABLE = Tiles(forward=A, dkv=A, dq=A)


@pytest.mark.parametrize(("time", "chosen"), [(97.0, B), (99.0, A), (100.0, A), (101.0, A)])
def test_the_table_stays_unless_another_is_clearly_faster(time: float, chosen: Tile) -> None:
    tiles = choose_by(TABLE, {("forward", A, 0): 100.0, ("forward", B, 0): time, **BACKWARD})
    assert tiles == dataclasses.replace(TABLE, forward=chosen)


def test_the_hopper_forward_is_chosen_beside_a_tile() -> None:
    config = TwoGroupForwardConfig(block_n=64, num_stages=4)
    times = {("forward", A, 0): 100.0, ("forward", B, 0): 90.0, ("hopper_forward", config, 0): 80.0, **BACKWARD}
    assert choose_by(TABLE, times) == dataclasses.replace(TABLE, forward=B, hopper_forward=config)
    with_config = dataclasses.replace(TABLE, hopper_forward=config)
    slow = {**times, ("hopper_forward", config, 0): 95.0}
    assert choose_by(with_config, slow) == dataclasses.replace(TABLE, forward=B)
    equal = {**times, ("hopper_forward", config, 0): 90.5}
    assert choose_by(with_config, equal) == dataclasses.replace(with_config, forward=B)


def test_the_backward_is_chosen_as_a_whole() -> None:
    """B is the best dq only with the pass for short users, which pays only with it."""
    times = {
        ("forward", A, 0): 1.0,
        **{("dq", A, 0): 10.0, ("dq", B, 0): 12.0, ("dq", A, 16): 9.0, ("dq", B, 16): 5.0},
        **{("dkv", A, 0): 10.0, ("dkv", A, 16): 9.0, ("short", C, 16): 2.0},
    }
    assert choose_by(TABLE, times) == dataclasses.replace(TABLE, dq=B, short=C)
    assert choose_by(TABLE, times, short_fraction=0.01) == TABLE, "too few short users to try"
    assert choose_by(TABLE, {**times, ("short", C, 16): 7.0}) == TABLE
    with_short = dataclasses.replace(TABLE, short=C)
    few = choose_by(with_short, {**times, ("short", C, 16): 3.0}, short_fraction=0.01)
    assert few == dataclasses.replace(TABLE, dq=B, short=C), "the table's own is tried in any case"
    assert choose_by(with_short, {**times, ("short", C, 16): 11.0}) == TABLE


def test_the_hopper_backward_is_chosen_kernel_by_kernel() -> None:
    """Beside a tile that is the best of those where the same users are short."""
    config = OneGroupConfig(num_stages=3, programs_per_sm=2)
    times = {
        ("forward", A, 0): 1.0,
        **{("dq", A, 0): 10.0, ("dq", B, 0): 12.0, ("dq", A, 16): 9.0, ("dq", B, 16): 8.0},
        **{("hopper_dq", config, 0): 20.0, ("hopper_dq", config, 16): 4.0},
        **{("dkv", A, 0): 10.0, ("dkv", A, 16): 9.0, ("hopper_dkv", config, 0): 9.0, ("hopper_dkv", config, 16): 9.5},
        ("short", C, 16): 2.0,
    }
    expected = dataclasses.replace(TABLE, dq=B, hopper_dq=config, short=C)
    assert choose_by(TABLE, times) == expected
    assert choose_by(expected, times) == expected
    without_short = dataclasses.replace(TABLE, hopper_dkv=config)
    assert choose_by(TABLE, times, short_fraction=0.0) == without_short


# Kernels on a batch


def small_bench(setting: Setting = SMALL, tokens: int = 40) -> Bench:
    table = dataclasses.replace(table_tiles(setting.head_dim, setting.dtype, (8, 6), 32, setting.causal), short=C)
    return Bench(setting, table, CPU, tokens)


@interpreted
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_bench_runs_kernels_alone_and_compares_them(causal: bool) -> None:
    bench = small_bench(dataclasses.replace(SMALL, causal=causal))
    assert 0.0 < bench.short_fraction(16) < 1.0
    assert bench.short_fraction(32) == 1.0
    for kernel, tile in [("forward", B), ("dq", Tile(16, 32, 1, 1)), ("dkv", B), ("short", Tile(32, 32, 1, 1))]:
        results = bench.run(kernel, tile, 0, 5)
        assert all(len(x) > 0 for x in results)
        assert bench.disagreement(kernel, tile) < 0.1


@interpreted
def test_a_wrong_candidate_is_found_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = kernel_bench.launch_forward

    def lose_a_row(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Any, tile: Tile, lse: Tensor) -> Tensor:
        out = launch(q, k, v, tiles, call, tile, lse)
        if tile == B:
            out[7] = 0.0
        return out

    monkeypatch.setattr(kernel_bench, "launch_forward", lose_a_row)
    tuner = tuner_of([A, B, C], monkeypatch)
    rows = tune_all(tuner)
    assert tuner.wrong == ["forward 32x16 w4 s1 (float32, head dim 16, causal)"]
    assert "times what rounding explains" in tuner.left_out[tuner.wrong[0]]
    assert [row.tiles.forward for row in rows] == [C]


def test_disagreement_is_of_rows() -> None:
    expected = [torch.randn(500, 2, 8), torch.randn(2, 500)]
    assert disagreement(expected, expected, torch.bfloat16) == 0.0
    rounded = [x.bfloat16().float() for x in expected]
    assert 0.0 < disagreement(rounded, expected, torch.bfloat16) < 0.2
    lost = [expected[0].clone(), expected[1]]
    lost[0][77] = 0.0
    assert disagreement(lost, expected, torch.bfloat16) > 10.0
    lost[0][77] = float("nan")
    assert disagreement(lost, expected, torch.bfloat16) == float("inf")


# The command


def tuner_of(tiles: Sequence[Tile], monkeypatch: pytest.MonkeyPatch) -> Tuner:
    """Of one small setting on the CPU, where of these forward tiles a later one is said to be faster."""

    def few(kernel: str, *_: object) -> list[Candidate]:
        return list(tiles) if kernel == "forward" else [getattr(TABLE, kernel)] if kernel in ("dq", "dkv") else []

    def fake_times(functions: Sequence[Callable[[int], object]]) -> list[float]:
        for function in functions:
            function(0)
        return [100.0 - 10.0 * i for i in range(len(functions))]

    monkeypatch.setattr(tune, "candidates", few)
    monkeypatch.setattr(tune, "times_us", fake_times)
    monkeypatch.setattr(tune, "Bench", lambda setting, table, device: Bench(setting, table, device, 40))
    return Tuner([SMALL], MACHINE, CPU, 99 * 1024)


@interpreted
def test_tuning_gives_rows_and_tells_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    too_large = Tile(64, 256, 8, 4)
    tuner = tuner_of([A, too_large, B], monkeypatch)
    rows = tune_all(tuner)
    assert rows == [TunedRow(SMALL.dtype, 16, 32, True, replace_tile(TABLE, "forward", B))]
    printed = capsys.readouterr().out
    assert "float32, head dim 16, up to 32 tokens, causal" in printed
    assert re.search(r"forward +32x32 w4 s1 +100.0 +32x16 w4 s1 +90.0 +1.11\n", printed)
    assert "left out: 1\n  forward 64x256 w8 s4 (float32, head dim 16, causal): needs 128 KB" in printed
    assert not tuner.wrong


@interpreted
def test_a_setting_whose_table_does_not_work_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = tuner_of([A, B], monkeypatch)
    tuner.left_out[str(Job(SMALL.dtype, 16, True, "forward", A))] = "it is broken"
    assert tune_all(tuner) == []
    assert "the table's tile for forward, 32x32 w4 s1, is itself left out" in tuner.left_out[str(SMALL)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels compile")
def test_candidates_that_do_not_compile_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = tuner_of([A], monkeypatch)
    tuner.compile_all(processes=1)
    assert len(tuner.left_out) == 3
    of_torch = ("Torch not compiled with CUDA", "Found no NVIDIA driver")  # a build for CPUs; for CUDA
    assert all(any(known in reason for known in of_torch) for reason in tuner.left_out.values())


def test_options_are_settings() -> None:
    text = "--head-dims 64,64,128 --max-seqlens 512 --masks full --dtypes float16,bfloat16"
    options = parse_options(text.split())
    assert options.settings == [
        Setting(dtype, head_dim, 512, False) for dtype in (torch.float16, torch.bfloat16) for head_dim in (64, 128)
    ]
    assert len(parse_options([]).settings) == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--head-dims 48", "there is no head dim 48: allowed are 16, 32, 64, 128, 256"),
        ("--head-dims wide", "'wide': expected integers"),
        ("--head-dims ,", "there is no head dim"),
        ("--dtypes int8", "there is no dtype int8: allowed are float32, float16, bfloat16"),
        ("--masks window", "there is no mask window: allowed are causal, full"),
        ("--max-seqlens 500", "allowed are powers of two >= 16"),
        ("--processes 0", "--processes is 0: allowed are values >= 1"),
    ],
)
def test_wrong_options_are_explained(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_options(arguments.split())
    assert message in capsys.readouterr().err


def test_tuning_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="tune: tuning measures kernels, so it needs a CUDA GPU"):
        tune.main([])


def test_the_file_has_to_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, "")
    with pytest.raises(ValueError, match="KERNELS_TUNING_FILE is empty, which means no file: give --output"):
        find_output(parse_options([]), MACHINE)
    assert find_output(parse_options(["--output", "x.json"]), MACHINE) == Path("x.json")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path))
    assert find_output(parse_options([]), MACHINE) == tmp_path


def test_rows_of_other_settings_stay_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiles.json"
    old = [TunedRow(torch.float16, head_dim, 512, True, TABLE) for head_dim in (32, 64)]
    new = [TunedRow(torch.float16, 64, 512, True, replace_tile(TABLE, "dq", C))]
    assert merge_rows(path, MACHINE, new) == new
    write_tuning(path, MACHINE, old, "tune")
    assert merge_rows(path, MACHINE, new) == [old[0], *new]
    write_tuning(path, MACHINE, merge_rows(path, MACHINE, new), "tune")
    assert set(read_tuning(path, MACHINE)) == {old[0], *new}
    other = dataclasses.replace(MACHINE, triton="3.7.1")
    assert merge_rows(path, other, new) == new
    assert "is replaced: expected triton 3.7.1" in capsys.readouterr().out


# Soak


@interpreted
def test_soak_finds_nothing_in_what_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="0"):
        soak.main(["--batches=2", "--kinds=2", "--compare-every=1", "--seed=4"])
    printed = capsys.readouterr().out
    assert "2 batches, " in printed
    assert "0 faults" in printed
    assert " 0 users" not in printed


def lose_a_row(results: list[Tensor], _: int) -> None:
    results[0][-1] = 0.0


def leave_a_row(results: list[Tensor], _: int) -> None:
    results[2][0] = float("nan")


def waver(results: list[Tensor], call: int) -> None:
    results[3] += call * 1e-7


@interpreted
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_row, "times what rounding explains: out of user"),
        (leave_a_row, "dk has .* values that are not finite"),
        (waver, "dv differs in .* when run again"),
    ],
)
def test_soak_finds_faults(
    spoil: Callable[[list[Tensor], int], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_case, calls = soak.run_case, itertools.count()

    def spoiled(case: soak.Case) -> list[Tensor]:
        results = run_case(case)
        spoil(results, next(calls))
        return results

    monkeypatch.setattr(soak, "run_case", spoiled)
    monkeypatch.setattr(soak, "COMPARED_USERS", 5)
    # A batch whose last user isn't empty.
    summary = soak.soak(soak.parse_options(["--batches=1", "--kinds=1", "--seed=4"]), CPU)
    assert len(summary.faults) == 1
    assert re.search(message, summary.faults[0])


def test_soak_draws_the_same_batch_again_with_nan_around_it() -> None:
    kind = soak.draw_kind(random.Random(1), CPU)
    kind = dataclasses.replace(kind, has_targets=True, is_cross=False, has_window=True, dropout_p=0.3)
    first, second = (soak.draw_case(kind, random.Random("0 batch 7"), CPU) for _ in range(2))
    assert first.lengths == second.lengths
    assert first.window == second.window
    for x, y in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(x, y)
        around = x.as_strided((soak.GUARD_ROWS, *x.shape[1:]), x.stride(), 0)
        assert around.isnan().all()
    targets = first.options["num_targets"]
    assert ((targets >= 0) & (targets <= torch.tensor(first.lengths))).all()


def test_soak_poisons_fresh_memory() -> None:
    with poisoned_memory():
        assert torch.empty(5).isnan().all()
        assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batches 0", "--batches is 0: allowed are values >= 1"),
        ("--compare-every 0", "--compare-every is 0"),
        ("--seconds 0", "--seconds greater than 0"),
        ("--first -1", "--first must be at least 0"),
    ],
)
def test_wrong_soak_options_are_explained(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        soak.parse_options(arguments.split())
    assert message in capsys.readouterr().err
