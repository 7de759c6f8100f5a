"""Whole training runs side by side: QPS, memory and quality by attention backend, sharding plan and number of ranks.

Every run is `train.py` in processes of its own, under `torchrun`, exactly as a user would start it; the row is made
from its `summary.json`.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from benchmarks.csv_file import append_rows, check_columns
from recsys.checks import at_least
from recsys.config import TrainConfig, register
from recsys.tables import format_table
from recsys.versions import environment

FIGURES = (
    "device",
    "model",
    "steps",
    "samples_per_second",
    "tokens_per_second",
    "step_ms_p50",
    "step_ms_p90",
    "mfu",
    "peak_device_mib",
    "peak_host_mib",
    "auc",
    "best_auc",
    "ne",
)
VERSIONS = ("torch", "triton", "cuda", "torchrec", "fbgemm", "git_commit")
COLUMNS = ("num_processes", "sharding", "attention", *FIGURES, *VERSIONS, "failure", "command")

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class BenchmarkConfig:
    """What to compare; every combination of the lists is one run."""

    attention: list[str] = field(default_factory=lambda: ["jagged_flash", "varlen", "sdpa", "dense"])
    """Choices of the config group `attention`."""

    sharding: list[str] = field(default_factory=lambda: ["auto"])
    """Choices of the config group `sharding`."""

    num_processes: list[int] = field(default_factory=lambda: [1])
    """Ranks of a run."""

    output: str | None = None
    """CSV file that rows are added to; `null` prints the table only."""

    timeout_minutes: float = 30.0
    """A run that takes longer is stopped and noted as failed."""

    def __post_init__(self) -> None:
        for name in ("attention", "sharding", "num_processes"):
            if not getattr(self, name):
                raise ValueError(f"benchmark.{name} is empty: name at least one")
        for count in self.num_processes:
            at_least("benchmark.num_processes", count, 1)


@dataclass
class BenchmarkRun(TrainConfig):
    """Everything that `benchmark.py` can be told: what to compare, and what `train.py` can be told."""

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)


def register_benchmark() -> None:
    """Make the schemas known to Hydra; call before composing."""
    register()
    ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkRun)


@dataclass(frozen=True)
class Case:
    """One run."""

    num_processes: int
    sharding: str
    attention: str

    def command(self, overrides: Sequence[str], run_dir: Path) -> list[str]:
        """How a user would start it."""
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        choices = [f"attention={self.attention}", f"sharding={self.sharding}"]
        return [
            *launch,
            f"--nproc-per-node={self.num_processes}",
            "train.py",
            *overrides,
            *choices,
            f"paths.run_dir={run_dir}",
        ]


def cases(config: BenchmarkConfig) -> Iterator[Case]:
    """Every combination, backends innermost."""
    for combination in itertools.product(config.num_processes, config.sharding, config.attention):
        yield Case(*combination)


def run_case(case: Case, overrides: Sequence[str], timeout_minutes: float) -> dict[str, Any]:
    """Run a case and make its row; a run that fails makes a row with the reason and no figures."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        command = case.command(overrides, run_dir)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60 * timeout_minutes
            )
            failure = None if done.returncode == 0 else _reason(done.stdout + done.stderr)
        except subprocess.TimeoutExpired:
            failure = f"took longer than {timeout_minutes:g} minutes"
        summary = json.loads((run_dir / "summary.json").read_text()) if failure is None else None
    known = environment_of_failure() if summary is None else _figures(summary)
    row: dict[str, Any] = {
        "num_processes": case.num_processes,
        "sharding": case.sharding,
        "attention": case.attention,
        **known,
        "failure": failure or "",
    }
    row["command"] = " ".join(["torchrun", *command[3:-1]])
    return row


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    environment = summary["environment"]
    first_task: dict[str, Any] = next(iter(summary["eval"].values()), {})
    return {
        "device": summary["device"],
        "model": summary["model"],
        "steps": summary["steps"],
        "samples_per_second": round(summary["samples_per_second"], 1),
        "tokens_per_second": round(summary["tokens_per_second"]),
        "step_ms_p50": round(summary["step_ms_p50"], 3),
        "step_ms_p90": round(summary["step_ms_p90"], 3),
        "mfu": None if summary["mfu"] is None else round(summary["mfu"], 4),
        "peak_device_mib": max(summary["peak_device_mib_per_rank"]),
        "peak_host_mib": max(summary["peak_host_mib_per_rank"]),
        "auc": first_task.get("auc"),
        "best_auc": first_task.get("best_auc"),
        "ne": first_task.get("ne"),
        **{name: environment[name] for name in VERSIONS},
    }


def environment_of_failure() -> dict[str, Any]:
    """What a failed run was tried with."""
    known = environment()
    return {name: known[name] for name in ("device", *VERSIONS)}


# Of a failed run's output, the most telling first: what we or Python say, a library's uncaught error, a signal that
# ended a process, as torchrun reports it.
TELLING = (r"(configuration error|Error): ", r"what\(\): ", r"Signal \d+ \(SIG")


def _reason(output: str) -> str:
    """The line that tells most about a failed run: its error message, not the launcher's."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in TELLING:
        telling = [line for line in lines if re.search(pattern, line)]
        if telling:
            return telling[0][:300]
    return (lines or ["no output"])[-1][:300]


def run_benchmark(config: BenchmarkConfig, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Run every case, print the table, and keep the rows if `config.output` says where.

    Args:
        config: what to compare.
        overrides: of `train.py`, the same for every run.
    """
    if config.output is not None:
        check_columns(Path(config.output), COLUMNS)  # before the first run, which takes a while
    rows = []
    for case in cases(config):
        row = run_case(case, overrides, config.timeout_minutes)
        rows.append(row)
        print(_line(row), flush=True)
        if config.output is not None:  # at once, so that a comparison that is stopped keeps what it has
            append_rows(Path(config.output), [row], COLUMNS)
    print("\n" + table(rows), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    name = f"{row['attention']}, {row['sharding']}, {row['num_processes']} process(es)"
    return f"{name}: {row['failure'] or format(row['samples_per_second'], ',.0f') + ' QPS'}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; AUC is that of the first task."""
    header = ("ranks", "sharding", "attention", "QPS", "step ms", "device MiB", "MFU", "AUC", "failure")
    columns = (
        "num_processes",
        "sharding",
        "attention",
        "samples_per_second",
        "step_ms_p50",
        "peak_device_mib",
        "mfu",
        "auc",
    )
    patterns = ("{}", "{}", "{}", "{:,.0f}", "{:.1f}", "{:,.0f}", "{:.1%}", "{:.4f}")
    lines = []
    for row in rows:
        values = [row.get(column) for column in columns]
        cells = ["-" if v is None else pattern.format(v) for v, pattern in zip(values, patterns, strict=True)]
        lines.append([*cells, row["failure"][:60]])
    return format_table(header, lines)
