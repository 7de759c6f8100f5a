"""The comparison itself: every operation by every provider on every shape in every mode, one row each."""

from __future__ import annotations

import argparse
import gc
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.attention.accuracy import row_limit
from benchmarks.attention.shapes import INPUTS_SEED, SHAPES, Batch, Shape
from benchmarks.csv_file import append_rows, check_columns
from benchmarks.interaction.layouts import Layouts
from benchmarks.interaction.operations import OPERATIONS, OURS, PADDED, PROVIDERS, Operation, Provider
from benchmarks.options import DTYPES, add_common_options, check_common_options, names_of, shape_of
from benchmarks.poison import poisoned_memory
from benchmarks.rows import (
    ABSENT,
    OK,
    UNSUPPORTED,
    Row,
    cell,
    failure,
    judged,
    line,
    milliseconds,
    timing_figures,
    work_figures,
)  # fmt: skip
from benchmarks.timing import MODES, Calls, Ready, Timing, prepare, sets_past_cache, time_in_turns
from kernels.jagged import unavailable_reason
from recsys.tables import format_table
from recsys.versions import environment

GIGABYTE = Shape("G1", users=8192, heads=4, head_dim=64, mean=128, max=512)
"""About a gigabyte of traffic where rows are read and written once; for operations that have no scores."""

GIGABYTE_OF_SCORES = Shape("G2", users=3072, heads=4, head_dim=64, mean=128, max=512)
"""The same where scores are."""

ALL_SHAPES = {**SHAPES, GIGABYTE.name: GIGABYTE, GIGABYTE_OF_SCORES.name: GIGABYTE_OF_SCORES}
DEFAULT_SHAPES = {"cuda": ["S1", "S3", "M1", "L1", "G1", "G2"], "cpu": ["tiny"]}

SHAPE = ("shape", "users", "heads", "head_dim", "causal", "window", "tokens", "mean_length", "max_length", "scores")
FIGURES = (
    "status", "reason", "method", "device_ms", "call_ms", "peak_mib", "gflop", "tflop_per_s", "mb", "gb_per_s",
    "floor_ms", "fraction_of_floor", "ratio_to_best_peer", "ratio_to_padded", "relative_error",
)  # fmt: skip
ENVIRONMENT = ("device", "torch", "triton", "cuda", "fbgemm", "git_commit", "command")
COLUMNS = ("operation", *SHAPE, "dtype", "mode", "provider", *FIGURES, *ENVIRONMENT)


@dataclass(frozen=True)
class Options:
    """What to compare."""

    operations: list[str]
    shapes: list[Shape]
    providers: list[str]
    modes: list[str]
    dtype: torch.dtype
    device: torch.device
    repeats: int
    output: Path | None
    command: str


def parse_options(arguments: Sequence[str]) -> Options:
    """Options of the command line; a wrong one ends the program with a message that says what is allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interaction",
        description="Time, memory and accuracy of the building blocks of interactions on jagged batches.",
    )
    parser.add_argument("--operations", type=names_of, default=list(OPERATIONS), help=f"of {', '.join(OPERATIONS)}")
    parser.add_argument("--shapes", type=names_of, help=f"names of {', '.join(ALL_SHAPES)}")
    parser.add_argument(
        "--shape", type=shape_of, action="append", default=[], metavar="KEY=VALUE,...", help="another, as for attention"
    )
    add_common_options(parser, PROVIDERS)
    given = parser.parse_args(arguments)
    names = given.shapes
    if names is None:
        names = [] if given.shape else DEFAULT_SHAPES[given.device]
    check_common_options(
        parser,
        given,
        operation=(given.operations, OPERATIONS),
        shape=(names, ALL_SHAPES),
        provider=(given.providers, PROVIDERS),
        mode=(given.modes, MODES),
    )
    shapes = [*(ALL_SHAPES[name] for name in names), *given.shape]
    for shape in shapes:
        if shape.kv_heads != shape.heads:
            parser.error(
                f"shape {shape.name} has kv_heads={shape.kv_heads}: here all have as many heads, {shape.heads}"
            )
    device = torch.device(given.device)
    reason = unavailable_reason(device)
    if reason is not None:
        parser.error(reason)
    return Options(
        given.operations, shapes, given.providers, given.modes, DTYPES[given.dtype], device, given.repeats,
        given.output, shlex.join(["python", "-m", "benchmarks.interaction", *arguments]),
    )  # fmt: skip


def run_benchmark(options: Options) -> list[Row]:
    """Measure everything, print a table per mode, and keep rows where the options say.

    Raises:
        ValueError: `options.output` is a file with other columns.
    """
    if options.output is not None:
        check_columns(options.output, COLUMNS)
    known = {**environment(), "command": options.command}
    known_columns = {name: known[name] for name in ENVIRONMENT}
    print(f"{known['device']}, torch {known['torch']}, triton {known['triton']}, commit {known['git_commit']}")
    everything: list[Row] = []
    for shape in options.shapes:
        layouts = Layouts(Batch(shape, options.dtype, options.device))
        for name in options.operations:
            operation = OPERATIONS[name](layouts)
            other = GIGABYTE_OF_SCORES if operation.on_scores else GIGABYTE
            if shape in (GIGABYTE, GIGABYTE_OF_SCORES) and shape is not other:
                print(f"{name}, {shape.name}: left out, a gigabyte for it is {other.name}")
                continue
            for mode in options.modes:
                group = [{**_described(operation, mode, name), **known_columns} for name in options.providers]
                for row, figures in zip(group, _measure(options, operation, mode), strict=True):
                    row |= figures
                    print(line(row, "operation", "shape", "mode", "provider"), flush=True)
                _fill_ratios(group)
                everything += group
                if options.output is not None:
                    append_rows(options.output, group, COLUMNS)
                gc.collect()
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()
    for mode in options.modes:
        print(f"\n{mode}, device ms\n{table(everything, mode)}")
    return everything


def _described(operation: Operation, mode: str, provider: str) -> Row:
    batch, shape, work = operation.batch, operation.shape, operation.work(mode)
    return {
        "operation": operation.name,
        "shape": shape.name,
        **{name: getattr(shape, name) for name in ("users", "heads", "head_dim", "causal", "window")},
        "tokens": batch.total,
        "mean_length": round(batch.total / shape.users, 1),
        "max_length": batch.max_seqlen,
        "scores": operation.layouts.num_pairs,
        "dtype": str(batch.dtype).removeprefix("torch."),
        "mode": mode,
        "provider": provider,
        **work_figures(work, batch.device),
    }


class Set(NamedTuple):
    """One set of inputs."""

    operands: list[Tensor]
    dout: Tensor
    """The gradient of the result."""


def _measure(options: Options, operation: Operation, mode: str) -> list[Row]:
    """Status and figures of all providers; whatever goes wrong in one is its status and reason."""
    batch = operation.batch
    generator = torch.Generator(batch.device).manual_seed(INPUTS_SEED)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=batch.dtype, device=batch.device)

    shapes = operation.operand_shapes()
    num_bytes = sum(int(torch.Size(shape).numel()) for shape in shapes) * batch.dtype.itemsize
    num_sets = sets_past_cache(num_bytes, batch.device)
    try:
        sets = [Set([normal(shape) for shape in shapes], normal(operation.result_shape())) for _ in range(num_sets)]
        exact = _results(operation.reference, [x.float() for x in sets[0].operands], sets[0].dout.float(), mode)
        known = operation.providers()
    except torch.OutOfMemoryError as error:  # a shape too large for this GPU must not end the comparison
        return [failure(error) for _ in options.providers]
    pool = torch.cuda.graph_pool_handle() if batch.device.type == "cuda" else None
    prepared: list[tuple[Row, Ready | Timing | None]] = []
    for name in options.providers:
        if name not in known:
            prepared.append(
                ({"status": UNSUPPORTED, "reason": "it doesn't have this operation, or not this mask"}, None)
            )
            continue
        reason = known[name].absent(batch.device)
        if reason is not None:
            prepared.append(({"status": ABSENT, "reason": reason}, None))
            continue
        try:
            prepared.append(_prepare(operation, known[name], sets, exact, mode, options.repeats, pool))
        except Exception as error:  # a peer's own bug must not end the comparison
            prepared.append((failure(error), None))
        if batch.device.type == "cuda":
            torch.cuda.empty_cache()
    turns = iter(time_in_turns([ready for _, ready in prepared if isinstance(ready, Ready)], options.repeats))
    measured = []
    for row, ready in prepared:
        timing = next(turns) if isinstance(ready, Ready) else ready
        if isinstance(timing, Timing):
            row = {**row, **timing_figures(timing, operation.work(mode), batch.device)}
        elif timing is not None:
            row = failure(timing)
        measured.append(row)
    return measured


def _results(call: Callable[..., Tensor], operands: Sequence[Tensor], dout: Tensor, mode: str) -> list[Tensor]:
    """The result, and the gradients of the operands."""
    if mode == "forward":
        with torch.no_grad():
            return [call(*operands)]
    leaves = [x.detach().requires_grad_() for x in operands]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def _prepare(
    operation: Operation,
    provider: Provider,
    sets: Sequence[Set],
    exact: Sequence[Tensor],
    mode: str,
    repeats: int,
    pool: Any,
) -> tuple[Row, Ready | Timing]:
    dtype, device = operation.batch.dtype, operation.batch.device
    convert = provider.operands or [lambda x: x] * len(sets[0].operands)
    convert_dout = provider.dout or (lambda x: x)
    converted = [
        Set([one(x) for one, x in zip(convert, operands, strict=True)], convert_dout(dout)) for operands, dout in sets
    ]
    with poisoned_memory():
        results = _results(provider.call, *converted[0], mode)
    restore = [provider.result, *(provider.gradients or [lambda x: x] * len(convert))]
    pairs = zip(restore, results, exact, strict=False)
    error = max(operation.layouts.worst_error(one(actual), expected) for one, actual, expected in pairs)
    del results
    row = judged(error / row_limit(dtype), dtype)

    def make_calls() -> Calls:
        leaves = [[x.detach().requires_grad_(mode != "forward") for x in one.operands] for one in converted]

        def call(i: int) -> object:
            operands, dout = leaves[i % len(leaves)], converted[i % len(leaves)].dout
            if mode == "forward":
                with torch.no_grad():
                    return provider.call(*operands)
            out = provider.call(*operands)
            return out, torch.autograd.grad(out, operands, dout)

        return call

    return row, prepare(make_calls, device, repeats, pool)


def _fill_ratios(rows: Sequence[Row]) -> None:
    """How many times faster a row is than the fastest accurate peer, and than the padded one."""
    timed = [row for row in rows if row.get("device_ms") is not None]
    peers = [row["device_ms"] for row in timed if row["provider"] != OURS and row["status"] == OK]
    padded = [row["device_ms"] for row in timed if row["provider"] == PADDED and row["status"] == OK]
    for row in (row for row in timed if row["status"] == OK):
        row["ratio_to_best_peer"] = round(min(peers) / row["device_ms"], 3) if peers else None
        row["ratio_to_padded"] = round(padded[0] / row["device_ms"], 3) if padded else None


def table(rows: Sequence[Row], mode: str) -> str:
    """The rows of one mode: a line per operation and shape, and the geometric mean of how ours stands."""
    rows = [row for row in rows if row["mode"] == mode]
    providers = [name for name in PROVIDERS if any(r["provider"] == name and r["status"] != ABSENT for r in rows)]
    header = ["operation", "shape", "floor", *providers, "peer/ours", "padded/ours", "of floor", "MiB", "MiB padded"]
    lines, ratios = [], []
    for operation, shape in dict.fromkeys((row["operation"], row["shape"]) for row in rows):
        of = {row["provider"]: row for row in rows if (row["operation"], row["shape"]) == (operation, shape)}
        ours, padded = of.get(OURS, {}), of.get(PADDED, {})
        if ours.get("ratio_to_best_peer") and ours["status"] == OK:
            ratios.append(ours["ratio_to_best_peer"])
        floor = next(iter(of.values())).get("floor_ms")
        lines.append([
            operation, shape, cell(floor, ".3f"), *(milliseconds(of.get(name)) for name in providers),
            cell(ours.get("ratio_to_best_peer"), ".2f"), cell(ours.get("ratio_to_padded"), ".2f"),
            cell(ours.get("fraction_of_floor"), ".0%"), cell(ours.get("peak_mib"), ",.0f"),
            cell(padded.get("peak_mib"), ",.0f"),
        ])  # fmt: skip
    text = format_table(header, lines, [name not in ("operation", "shape") for name in header])
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        text += f"\npeer/ours, geometric mean: {mean:.2f}"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; rows of other columns in the output file end it with a message."""
    try:
        run_benchmark(parse_options(sys.argv[1:] if arguments is None else arguments))
    except ValueError as error:
        sys.exit(f"benchmarks.interaction: {error}")
