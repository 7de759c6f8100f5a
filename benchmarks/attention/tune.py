"""Tiles for the GPU at hand: measure a short list of candidates per kernel, and keep the best in a file.

    python -m benchmarks.attention.tune
    python -m benchmarks.attention.tune --head-dims 64 --max-seqlens 512,2048 --masks causal --output tiles.json

One setting is a dtype, a padded head dim, a mask and a length up to which users go. Its batch is lognormal, with a mean
of a quarter of that length. Candidates (`candidates.py`) are compiled by several processes. Then every result is
compared with that of the table's tiles, and calls are timed in replayed CUDA graphs that take turns
(`kernel_bench.py`). What is best goes into the file that `kernels/jagged_flash_attention/tuning.py` reads. See
docs/tuning.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton

from benchmarks.attention.candidates import KERNELS, Candidate, candidates, describe, shared_memory
from benchmarks.attention.kernel_bench import Bench, Setting, replace_tile, times_us
from kernels.jagged.launch import INTERPRETED
from kernels.jagged_flash_attention.tuning import (
    DTYPES,
    FILE_VARIABLE,
    PADDED_HEAD_DIMS,
    Machine,
    Tile,
    Tiles,
    TunedRow,
    find_machine,
    read_tuning,
    table_tiles,
    tuning_path,
    write_tuning,
)
from recsys.tables import format_table

COMPILE_TOKENS = 512
MOST_PROCESSES = 16
MASKS = {"causal": True, "full": False}

# What other tiles have to be better by, or the table's stay: two runs of one kernel differ by about as much.
LEAST_GAIN = 0.02
# A pass for short users is tried where they have at least this fraction of the tokens.
LEAST_SHORT_TOKENS = 0.02

Times = dict[Candidate, float]
"""In microseconds."""

TimesOf = Callable[[list[tuple[str, Candidate]], int], Times]
"""Of kernels with a candidate, where users of at most so many tokens are left to the short pass."""

Tried = dict[str, list[Candidate]]
"""By kernel, the candidates that work."""

Key = TypeVar("Key")


class Job(NamedTuple):
    """One kernel to compile: what doesn't depend on lengths."""

    dtype: torch.dtype
    head_dim: int
    causal: bool
    kernel: str
    candidate: Candidate

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {describe(self.candidate)} ({dtype}, head dim {self.head_dim}, {mask})"


class Comparison(NamedTuple):
    """The tiles of one pass: what the table has and what was chosen, with microseconds."""

    what: str
    table: str
    table_us: float
    chosen: str
    chosen_us: float


class Chosen(NamedTuple):
    """What was chosen for a setting."""

    tiles: Tiles
    comparisons: list[Comparison]

    def table(self) -> str:
        """For the terminal."""
        lines = [
            [x.what, x.table, f"{x.table_us:.1f}", x.chosen, f"{x.chosen_us:.1f}", f"{x.table_us / x.chosen_us:.2f}"]
            for x in self.comparisons
        ]
        return format_table(["pass", "table", "us", "best", "us", "gain"], lines)


def choose(table: Tiles, tried: Tried, times_of: TimesOf, short_fraction: Callable[[int], float]) -> Chosen:
    """The fastest tiles of a setting; the table's, unless others are better by `LEAST_GAIN`.

    Where a kernel for Hopper wins, a tile is chosen too: it serves the calls that this kernel can't do.

    Args:
        table: its tiles, which are all among those tried.
        tried: what to choose from.
        times_of: see `TimesOf`.
        short_fraction: of all tokens, those of users of at most so many.
    """
    forward = times_of(_both(tried, "forward"), 0)
    own = table.hopper_forward or table.forward
    best = _fastest(forward, own)
    of_forward = Comparison("forward", describe(own), forward[own], describe(best), forward[best])
    tiles = _with(table, "forward", best, forward)

    blocks = {tile.block_m for tile in _tiles(tried["short"])}
    worthwhile = {block for block in blocks if short_fraction(block) >= LEAST_SHORT_TOKENS}
    tiles, of_backward = _choose_backward(tiles, tried, times_of, worthwhile)
    return Chosen(tiles, [of_forward, of_backward])


def _choose_backward(table: Tiles, tried: Tried, times_of: TimesOf, worthwhile: set[int]) -> tuple[Tiles, Comparison]:
    """As a whole: which users have the pass for short ones decides how much is left to the kernels of dq and dkv."""
    own = (table.hopper_dq or table.dq, table.hopper_dkv or table.dkv, table.short)
    times: dict[int, tuple[Times, Times]] = {}  # of dq and dkv, by the users that are left to the short pass
    totals: dict[tuple[Candidate, Candidate, Tile | None], float] = {}
    for block in sorted({0, _block_of(table.short)} | worthwhile):
        dq_times = times_of(_both(tried, "dq"), block)
        dkv_times = times_of(_both(tried, "dkv"), block)
        short_times: dict[Tile | None, float] = {None: 0.0}
        if block > 0:
            of_block = [tile for tile in _tiles(tried["short"]) if tile.block_m == block]
            times_of_short = times_of([("short", tile) for tile in of_block], block)
            short_times = {tile: times_of_short[tile] for tile in of_block}
        for dq, dkv, short in itertools.product(dq_times, dkv_times, short_times):
            totals[dq, dkv, short] = dq_times[dq] + dkv_times[dkv] + short_times[short]
        times[block] = dq_times, dkv_times
    best = _fastest(totals, own)
    dq_times, dkv_times = times[_block_of(best[2])]
    tiles = _with(_with(table, "dq", best[0], dq_times), "dkv", best[1], dkv_times)
    described = [" / ".join(map(describe, candidates)) for candidates in (own, best)]
    comparison = Comparison("dq / dkv / short", described[0], totals[own], described[1], totals[best])
    return dataclasses.replace(tiles, short=best[2]), comparison


def _block_of(short: Tile | None) -> int:
    return 0 if short is None else short.block_m


def _both(tried: Tried, kernel: str) -> list[tuple[str, Candidate]]:
    """Candidates of a kernel and of the one for Hopper that does the same."""
    return [(name, candidate) for name in (kernel, f"hopper_{kernel}") for candidate in tried[name]]


def _with(tiles: Tiles, kernel: str, best: Candidate, times: Times) -> Tiles:
    """With the best candidate and, if that is one for Hopper, the best tile beside it."""
    own = getattr(tiles, kernel)
    tile = best if isinstance(best, Tile) else _fastest({tile: times[tile] for tile in _tiles(times)}, own)
    tiles = replace_tile(tiles, kernel, tile)
    return replace_tile(tiles, f"hopper_{kernel}", None if isinstance(best, Tile) else best)


def _tiles(candidates: Iterable[Candidate]) -> list[Tile]:
    return [candidate for candidate in candidates if isinstance(candidate, Tile)]


def _fastest(times: dict[Key, float], own: Key) -> Key:
    best = min(times, key=lambda key: times[key])
    return best if times[best] < (1.0 - LEAST_GAIN) * times[own] else own


# On the GPU


class Tuner:
    """Compiles, checks and times the candidates of some settings.

    Args:
        settings: what to tune for.
        machine: the GPU that `device` is.
        device: where.
        memory: shared memory that a program can have, in bytes.
    """

    def __init__(self, settings: Sequence[Setting], machine: Machine, device: torch.device, memory: int) -> None:
        self.settings = settings
        self.machine = machine
        self.device = device
        self.memory = memory
        self.left_out: dict[str, str] = {}
        """What was not timed, and why."""
        self.wrong: list[str] = []
        """Candidates with a wrong result: a bug in a kernel."""

    def jobs_of(self, setting: Setting) -> list[Job]:
        """The candidates that this GPU has the memory for."""
        table = self.table_of(setting)
        jobs = []
        for kernel in KERNELS:
            kind = (setting.dtype, setting.head_dim, setting.causal, kernel)
            for candidate in candidates(
                kernel, setting.head_dim, setting.dtype, self.machine.compute_capability, table
            ):
                job = Job(*kind, candidate)
                needed = shared_memory(kernel, candidate, setting.head_dim, setting.dtype)
                if needed <= self.memory:
                    jobs.append(job)
                else:
                    self.left_out[str(job)] = (
                        f"needs {needed >> 10} KB of shared memory, the GPU has {self.memory >> 10}"
                    )
        return jobs

    def table_of(self, setting: Setting) -> Tiles:
        return table_tiles(
            setting.head_dim, setting.dtype, self.machine.compute_capability, setting.max_seqlen, setting.causal
        )

    def compile_all(self, processes: int) -> None:
        """Fill Triton's cache; what can't be compiled is left out from now on."""
        jobs = list(dict.fromkeys(job for setting in self.settings for job in self.jobs_of(setting)))
        start = time.perf_counter()
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            running = {job: pool.submit(compile_job, job) for job in jobs}
            for job, future in running.items():
                died = future.exception()  # of the process itself, after which the pool takes no more
                reason = f"the process that compiled it ended: {died}" if died else future.result()
                if reason is not None:
                    self.left_out[str(job)] = reason
        seconds = time.perf_counter() - start
        print(f"compiled {len(jobs)} kernels in {seconds:.0f} s with {processes} processes", flush=True)

    def tune(self, setting: Setting) -> Chosen | None:
        """The choice for a setting; None, with a line in `left_out`, if the table's tiles themselves don't work."""
        table = self.table_of(setting)
        bench = Bench(setting, table, self.device)
        tried: Tried = {kernel: [] for kernel in KERNELS}
        for job in self.jobs_of(setting):
            if str(job) not in self.left_out and self._is_right(bench, job):
                tried[job.kernel].append(job.candidate)
        for kernel in KERNELS:
            own = getattr(table, kernel)
            if own is not None and own not in tried[kernel]:
                self.left_out[str(setting)] = f"the table's tile for {kernel}, {describe(own)}, is itself left out"
                return None

        def times_of(candidates: list[tuple[str, Candidate]], short: int) -> Times:
            def calls_of(kernel: str, candidate: Candidate) -> Callable[[int], object]:
                return lambda i: bench.run(kernel, candidate, short, i)

            times = times_us([calls_of(*pair) for pair in candidates])
            return {candidate: time for (_, candidate), time in zip(candidates, times, strict=True)}

        return choose(table, tried, times_of, bench.short_fraction)

    def _is_right(self, bench: Bench, job: Job) -> bool:
        worst = bench.disagreement(job.kernel, job.candidate)
        if worst > 1.0:
            self.left_out[str(job)] = f"differs from the table's result by {worst:.3g} times what rounding explains"
            self.wrong.append(str(job))
        return worst <= 1.0


def compile_job(job: Job) -> str | None:
    """Run a kernel on a small batch, so that it is compiled and in Triton's cache; the reason if that fails."""
    try:
        bench = _small_bench(Setting(job.dtype, job.head_dim, COMPILE_TOKENS, job.causal))
        bench.run(job.kernel, job.candidate, 0, 0)
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler or the driver says is the reason
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return None


@cache
def _small_bench(setting: Setting) -> Bench:
    device = torch.device("cuda", torch.cuda.current_device())
    table = table_tiles(
        setting.head_dim, setting.dtype, torch.cuda.get_device_capability(), setting.max_seqlen, setting.causal
    )
    return Bench(setting, table, device, COMPILE_TOKENS)


# Command line


@dataclasses.dataclass(frozen=True)
class Options:
    settings: list[Setting]
    output: Path | None
    processes: int
    command: str


def parse_options(arguments: Sequence[str]) -> Options:
    """Options of the command line; a wrong one ends the program with a message that says what is allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention.tune", description="Measure tiles of jagged flash attention on this GPU."
    )
    parser.add_argument("--head-dims", type=_numbers, default=[32, 64, 128], help="padded: powers of two, 16 to 256")
    parser.add_argument("--dtypes", type=_names, default=["bfloat16"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument(
        "--max-seqlens", type=_numbers, default=[512, 2048, 8192], help="a row serves up to this length"
    )
    parser.add_argument("--masks", type=_names, default=list(MASKS), help=f"of {', '.join(MASKS)}")
    parser.add_argument("--output", type=Path, help=f"file; default: ${FILE_VARIABLE}, or one in ~/.cache/recsys")
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    parser.add_argument("--processes", type=int, default=processes, help="that compile")
    given = parser.parse_args(arguments)
    for what, chosen, allowed in (
        ("head dim", given.head_dims, PADDED_HEAD_DIMS),
        ("dtype", given.dtypes, DTYPES),
        ("mask", given.masks, MASKS),
    ):
        unknown = [str(value) for value in chosen if value not in allowed]
        if unknown or not chosen:
            parser.error(f"there is no {what} {', '.join(unknown)}: allowed are {', '.join(map(str, allowed))}")
    if not given.max_seqlens or any(n < 16 or n & (n - 1) for n in given.max_seqlens):
        parser.error(f"--max-seqlens is {given.max_seqlens}: allowed are powers of two >= 16")
    if given.processes < 1:
        parser.error(f"--processes is {given.processes}: allowed are values >= 1")
    kinds = itertools.product(given.dtypes, given.head_dims, given.max_seqlens, given.masks)
    settings = [Setting(DTYPES[dtype], head_dim, n, MASKS[mask]) for dtype, head_dim, n, mask in kinds]
    command = shlex.join(["python", "-m", "benchmarks.attention.tune", *arguments])
    return Options(list(dict.fromkeys(settings)), given.output, given.processes, command)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected integers with commas between them") from None


def find_output(options: Options, machine: Machine) -> Path:
    """Where the file goes; ValueError if nothing says so."""
    path = options.output or tuning_path(machine)
    if path is None:
        raise ValueError(f"{FILE_VARIABLE} is empty, which means no file: give --output")
    return path


def merge_rows(path: Path, machine: Machine, rows: Sequence[TunedRow]) -> list[TunedRow]:
    """These rows, and those of other keys that the file has already, if it is one of this machine."""
    kept: list[TunedRow] = []
    if path.exists():
        try:
            kept = [row for row in read_tuning(path, machine) if row.key not in {new.key for new in rows}]
            print(f"{path} has {len(kept)} rows of other settings, which stay")
        except (OSError, ValueError) as error:
            print(f"{path} is replaced: {error}")
    return [*kept, *rows]


def run(options: Options) -> int:
    """Tune for the current GPU, print what came out, write the file; the exit code: 1 if a kernel was wrong.

    Raises:
        ValueError: there is no GPU, Triton interprets, or there is no name for the file.
    """
    if not torch.cuda.is_available() or INTERPRETED:
        raise ValueError("tuning measures kernels, so it needs a CUDA GPU, and TRITON_INTERPRET must not be set")
    device = torch.device("cuda", torch.cuda.current_device())
    machine = find_machine(device)
    assert machine is not None
    path = find_output(options, machine)
    print(f"{machine}: {len(options.settings)} settings, for {path}")
    memory = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    tuner = Tuner(options.settings, machine, device, memory)
    tuner.compile_all(options.processes)
    rows = tune_all(tuner)
    if rows:
        write_tuning(path, machine, merge_rows(path, machine, rows), options.command)
        print(f"wrote {path}")
    return 1 if tuner.wrong or not rows else 0


def tune_all(tuner: Tuner) -> list[TunedRow]:
    """The rows of all settings, with a table for each; at the end, what was left out and why."""
    rows = []
    for setting in tuner.settings:
        chosen = tuner.tune(setting)
        if chosen is not None:
            print(f"\n{setting}\n{chosen.table()}", flush=True)
            rows.append(TunedRow(setting.dtype, setting.head_dim, setting.max_seqlen, setting.causal, chosen.tiles))
    print(f"\nleft out: {len(tuner.left_out)}")
    for what, reason in tuner.left_out.items():
        print(f"  {what}: {reason}")
    if tuner.wrong:
        print(f"WRONG results, a bug in a kernel or the compiler: {'; '.join(tuner.wrong)}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    try:
        sys.exit(run(parse_options(sys.argv[1:] if arguments is None else arguments)))
    except ValueError as error:
        sys.exit(f"benchmarks.attention.tune: {error}")


if __name__ == "__main__":
    main()
