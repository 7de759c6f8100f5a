"""The comparison itself: every provider on every shape in every mode, one row each."""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.attention import plots, rows
from benchmarks.attention.accuracy import Reference
from benchmarks.attention.calls import calls_of, copies_past_cache, run_once
from benchmarks.attention.providers import PROVIDERS, Provider, flash_attention_version
from benchmarks.attention.shapes import (
    DEFAULT_SHAPES,
    SHAPES,
    Batch,
    Inputs,
    Shape,
    work_of,
)
from benchmarks.csv_file import append_rows, check_columns
from benchmarks.options import DTYPES, add_common_options, check_common_options, names_of, shape_of
from benchmarks.rows import ABSENT, UNSUPPORTED, Row, failure, judged, line, timing_figures, work_figures
from benchmarks.timing import MODES, Ready, Timing, prepare, time_in_turns
from recsys.versions import environment

POISONED_BLOCKS = 8  # as many tensors as a forward and backward allocate


@dataclass(frozen=True)
class Options:
    """What to compare."""

    shapes: list[Shape]
    providers: list[str]
    modes: list[str]
    dtype: torch.dtype
    device: torch.device
    repeats: int
    output: Path | None
    plot: Path | None
    command: str


def parse_options(arguments: Sequence[str]) -> Options:
    """Options of the command line; a wrong one ends the program with a message that says what is allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description="Time, memory and accuracy of attention kernels on jagged batches.",
    )
    parser.add_argument("--shapes", type=names_of, help=f"names of {', '.join(SHAPES)}; default: all but tiny")
    parser.add_argument(
        "--shape",
        type=shape_of,
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="another shape, e.g. name=X,users=64,heads=4,head_dim=64,mean=300,max=2048,causal=true; also "
        "kv_heads, window, targets",
    )
    add_common_options(parser, PROVIDERS)
    parser.add_argument("--plot", type=Path, help="folder for plots")
    given = parser.parse_args(arguments)
    names = given.shapes
    if names is None:
        names = [] if given.shape else DEFAULT_SHAPES[given.device]
    check_common_options(
        parser, given, shape=(names, SHAPES), provider=(given.providers, PROVIDERS), mode=(given.modes, MODES)
    )
    shapes = [*(SHAPES[name] for name in names), *given.shape]
    if len({shape.name for shape in shapes}) < len(shapes):
        parser.error("two shapes have one name")
    return Options(
        shapes=shapes,
        providers=given.providers,
        modes=given.modes,
        dtype=DTYPES[given.dtype],
        device=torch.device(given.device),
        repeats=given.repeats,
        output=given.output,
        plot=given.plot,
        command=shlex.join(["python", "-m", "benchmarks.attention", *arguments]),
    )


def run_benchmark(options: Options) -> list[Row]:
    """Measure everything, print a table per mode, and keep rows and plots where the options say.

    Raises:
        ValueError: `options.output` is a file with other columns.
    """
    if options.output is not None:
        check_columns(options.output, rows.COLUMNS)
    known = {**environment(), "flash_attn": flash_attention_version(), "command": options.command}
    known_columns = {name: known[name] for name in rows.ENVIRONMENT}
    print(f"{known['device']}, torch {known['torch']}, triton {known['triton']}, commit {known['git_commit']}")
    absent = {name: PROVIDERS[name].absent(options.device) for name in options.providers}
    for name, reason in absent.items():
        if reason is not None:
            print(f"absent: {name}: {reason}")

    everything: list[Row] = []
    for shape in options.shapes:
        batch = Batch(shape, options.dtype, options.device)
        inputs = batch.make_inputs(copies_past_cache(batch))
        reference = Reference(batch, inputs[0])
        for mode in options.modes:
            group = [{**_described(batch, mode, name), **known_columns} for name in options.providers]
            measured = _measure(options, absent, batch, inputs, reference, mode)
            for row, figures in zip(group, measured, strict=True):
                row |= figures
                if row["status"] != ABSENT:
                    print(line(row, "shape", "mode", "provider"), flush=True)
            gc.collect()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
            rows.fill_ratios(group)
            everything += group
            if options.output is not None:  # at once, so that a comparison that is stopped keeps what it has
                append_rows(options.output, group, rows.COLUMNS)
    for mode in options.modes:
        print(f"\n{mode}, device ms\n{rows.table(everything, mode)}")
    if options.plot is not None:
        _draw(everything, options.plot)
    return everything


def _described(batch: Batch, mode: str, provider: str) -> Row:
    shape, work = batch.shape, work_of(batch, mode)
    return {
        "shape": shape.name,
        **{name: getattr(shape, name) for name in rows.SHAPE if hasattr(shape, name)},
        "tokens": batch.total,
        "mean_length": round(batch.total / shape.users, 1),
        "max_length": batch.max_seqlen,
        "dtype": str(batch.dtype).removeprefix("torch."),
        "mode": mode,
        "provider": provider,
        **work_figures(work, batch.device),
    }


class Prepared(NamedTuple):
    """A provider in one mode: what is known of it already, and how it is timed, if it is."""

    row: Row
    ready: Ready | Timing | None = None


def _measure(
    options: Options,
    absent: Mapping[str, str | None],
    batch: Batch,
    inputs: Sequence[Inputs],
    reference: Reference,
    mode: str,
) -> list[Row]:
    """Status and figures of all providers; whatever goes wrong in one is its status and reason."""
    pool = torch.cuda.graph_pool_handle() if batch.device.type == "cuda" else None
    prepared = []
    for name in options.providers:
        prepared.append(_prepare(PROVIDERS[name], absent[name], batch, inputs, reference, mode, options.repeats, pool))
    turns = iter(time_in_turns([one.ready for one in prepared if isinstance(one.ready, Ready)], options.repeats))
    measured = []
    for row, ready in prepared:
        timing = next(turns) if isinstance(ready, Ready) else ready
        if isinstance(timing, Timing):
            row = {**row, **timing_figures(timing, work_of(batch, mode), batch.device)}
        elif timing is not None:
            row = failure(timing)
        measured.append(row)
    return measured


def _prepare(
    provider: type[Provider],
    absent: str | None,
    batch: Batch,
    inputs: Sequence[Inputs],
    reference: Reference,
    mode: str,
    repeats: int,
    pool: Any,
) -> Prepared:
    if absent is not None:
        return Prepared({"status": ABSENT, "reason": absent})
    refused = provider.refuses(batch)
    if refused is not None:
        return Prepared({"status": UNSUPPORTED, "reason": refused})
    try:
        return _check(provider, batch, inputs, reference, mode, repeats, pool)
    except Exception as error:  # a peer's own bug must not end the comparison
        return Prepared(failure(error))
    finally:
        if batch.device.type == "cuda":
            torch.cuda.empty_cache()


def _check(
    provider: type[Provider],
    batch: Batch,
    inputs: Sequence[Inputs],
    reference: Reference,
    mode: str,
    repeats: int,
    pool: Any,
) -> Prepared:
    start = time.perf_counter()
    attention = provider(batch)
    converted = [attention.convert(one) for one in inputs]
    _poison_free_memory(batch)
    results = attention.restore(run_once(attention, converted[0], mode))
    errors = reference.compare(results)
    del results
    prepare_s = time.perf_counter() - start

    row = {
        **judged(errors.relative, batch.dtype),
        **{f"error_{name}": float(f"{error:.4g}") for name, error in errors.greatest.items()},
        "prepare_s": round(prepare_s, 2),
    }
    return Prepared(row, prepare(calls_of(attention, converted, mode), batch.device, repeats, pool))


def _poison_free_memory(batch: Batch) -> None:
    """Leave NaN in the memory that the next call gets, so that a row that it doesn't write can't pass for right."""
    shape = batch.shape
    size = (batch.total, shape.heads, shape.head_dim)
    blocks = [torch.full(size, float("nan"), dtype=batch.dtype, device=batch.device) for _ in range(POISONED_BLOCKS)]
    del blocks


def _draw(everything: Sequence[Row], folder: Path) -> None:
    reason = plots.unavailable()
    if reason is not None:
        print(reason)
        return
    for path in plots.draw(everything, folder):
        print(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; rows of other columns in the output file end it with a message."""
    try:
        run_benchmark(parse_options(sys.argv[1:] if arguments is None else arguments))
    except ValueError as error:
        sys.exit(f"benchmarks.attention: {error}")
