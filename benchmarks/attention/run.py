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
from benchmarks.attention.rows import Row
from benchmarks.attention.shapes import (
    DEFAULT_SHAPES,
    ROOF_GPU,
    SHAPES,
    Batch,
    Inputs,
    Shape,
    Work,
    parse_shape,
    work_of,
)
from benchmarks.csv_file import append_rows, check_columns
from benchmarks.timing import MODES, Ready, Timing, prepare, time_in_turns
from recsys.versions import environment

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
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
    parser.add_argument("--shapes", type=_names, help=f"names of {', '.join(SHAPES)}; default: all but tiny")
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="another shape, e.g. name=X,users=64,heads=4,head_dim=64,mean=300,max=2048,causal=true; also "
        "kv_heads, window, targets",
    )
    parser.add_argument("--providers", type=_names, default=list(PROVIDERS), help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--modes", type=_names, default=list(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=21, help="turns of each provider, of which the median counts")
    parser.add_argument("--output", type=Path, help="CSV file that the rows are added to")
    parser.add_argument("--plot", type=Path, help="folder for plots")
    given = parser.parse_args(arguments)
    names = given.shapes
    if names is None:
        names = [] if given.shape else DEFAULT_SHAPES[given.device]
    for what, chosen, allowed in (
        ("shape", names, SHAPES),
        ("provider", given.providers, PROVIDERS),
        ("mode", given.modes, MODES),
    ):
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            parser.error(f"there is no {what} {', '.join(unknown)}: allowed are {', '.join(allowed)}")
    if given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}: allowed are values >= 1")
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


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse hides what a ValueError says


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


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
                if row["status"] != rows.ABSENT:
                    print(_line(row), flush=True)
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
        "gflop": round(work.flop / 1e9, 3),
        "mb": round(work.num_bytes / 1e6, 3),
        "floor_ms": round(work.floor_ms, 5) if _has_floor(batch.device) else None,
    }


def _has_floor(device: torch.device) -> bool:
    """The floor's constants were measured on one kind of GPU, and say nothing of others."""
    return device.type == "cuda" and ROOF_GPU in torch.cuda.get_device_name(device)


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
            row = {**row, **_figures(timing, work_of(batch, mode), _has_floor(batch.device))}
        elif timing is not None:
            row = _failure(timing)
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
        return Prepared({"status": rows.ABSENT, "reason": absent})
    refused = provider.refuses(batch)
    if refused is not None:
        return Prepared({"status": rows.UNSUPPORTED, "reason": refused})
    try:
        return _check(provider, batch, inputs, reference, mode, repeats, pool)
    except Exception as error:  # a peer's own bug must not end the comparison
        return Prepared(_failure(error))
    finally:
        if batch.device.type == "cuda":
            torch.cuda.empty_cache()


def _failure(error: Exception) -> Row:
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": rows.OUT_OF_MEMORY, "reason": _short(error)}
    if isinstance(error, ValueError | NotImplementedError):
        return {"status": rows.UNSUPPORTED, "reason": _short(error)}
    return {"status": rows.FAILED, "reason": f"{type(error).__name__}: {_short(error)}"}


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

    accurate = errors.relative <= 1.0
    row = {
        "status": rows.OK if accurate else rows.INACCURATE,
        "reason": "" if accurate else f"the error is {errors.relative:.2g} times what {batch.dtype} explains",
        **{f"error_{name}": float(f"{error:.4g}") for name, error in errors.greatest.items()},
        "relative_error": float(f"{errors.relative:.3g}"),
        "prepare_s": round(prepare_s, 2),
    }
    return Prepared(row, prepare(calls_of(attention, converted, mode), batch.device, repeats, pool))


def _figures(timing: Timing, work: Work, has_floor: bool) -> Row:
    return {
        "method": timing.method,
        "device_ms": round(timing.device_ms, 5),
        "call_ms": round(timing.call_ms, 5),
        "peak_mib": None if timing.peak_mib is None else round(timing.peak_mib, 3),
        "tflop_per_s": round(work.flop / timing.device_ms / 1e9, 3),
        "gb_per_s": round(work.num_bytes / timing.device_ms / 1e6, 2),
        "fraction_of_floor": round(work.floor_ms / timing.device_ms, 4) if has_floor else None,
    }


def _poison_free_memory(batch: Batch) -> None:
    """Leave NaN in the memory that the next call gets, so that a row that it doesn't write can't pass for right."""
    shape = batch.shape
    size = (batch.total, shape.heads, shape.head_dim)
    blocks = [torch.full(size, float("nan"), dtype=batch.dtype, device=batch.device) for _ in range(POISONED_BLOCKS)]
    del blocks


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _line(row: Row) -> str:
    name = f"{row['shape']}, {row['mode']}, {row['provider']}"
    if row.get("device_ms") is None:
        return f"{name}: {row['status']}: {row['reason']}"
    note = "" if row["status"] == rows.OK else f", {row['status']}: {row['reason']}"
    return f"{name}: {row['device_ms']:.4f} ms ({row['method']}), {row['call_ms']:.4f} ms a call{note}"


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
