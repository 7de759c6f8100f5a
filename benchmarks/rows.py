"""What the rows of all comparisons have in common: how a provider fared, its figures, a line and a cell of text."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention.shapes import ROOF_GPU, Work
from benchmarks.timing import Timing

Row = dict[str, Any]

OK = "ok"
INACCURATE = "inaccurate"
"""Timed, but its result is further from the reference than its dtype explains; no peer to be compared with."""

ABSENT = "absent"
UNSUPPORTED = "unsupported"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"


def failure(error: Exception) -> Row:
    """Status and reason of what went wrong in a provider."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": OUT_OF_MEMORY, "reason": reason}
    if isinstance(error, ValueError | NotImplementedError):
        return {"status": UNSUPPORTED, "reason": reason}
    return {"status": FAILED, "reason": f"{type(error).__name__}: {reason}"}


def judged(relative: float, dtype: torch.dtype) -> Row:
    """Status and reason of a result whose error is `relative` to what rounding explains."""
    accurate = relative <= 1.0
    return {
        "status": OK if accurate else INACCURATE,
        "reason": "" if accurate else f"the error is {relative:.2g} times what {dtype} explains",
        "relative_error": float(f"{relative:.3g}"),
    }


def has_floor(device: torch.device) -> bool:
    """The floor's constants were measured on one kind of GPU, and say nothing of others."""
    return device.type == "cuda" and ROOF_GPU in torch.cuda.get_device_name(device)


def work_figures(work: Work, device: torch.device) -> Row:
    """What a call can't do without."""
    return {
        "gflop": round(work.flop / 1e9, 3),
        "mb": round(work.num_bytes / 1e6, 3),
        "floor_ms": round(work.floor_ms, 5) if has_floor(device) else None,
    }


def timing_figures(timing: Timing, work: Work, device: torch.device) -> Row:
    """What a call took."""
    return {
        "method": timing.method,
        "device_ms": round(timing.device_ms, 5),
        "call_ms": round(timing.call_ms, 5),
        "peak_mib": None if timing.peak_mib is None else round(timing.peak_mib, 3),
        "tflop_per_s": round(work.flop / timing.device_ms / 1e9, 3),
        "gb_per_s": round(work.num_bytes / timing.device_ms / 1e6, 2),
        "fraction_of_floor": round(work.floor_ms / timing.device_ms, 4) if has_floor(device) else None,
    }


def line(row: Row, *names: str) -> str:
    """A row for the terminal, headed by the columns of these names."""
    head = ", ".join(row[name] for name in names)
    if row.get("device_ms") is None:
        return f"{head}: {row['status']}: {row['reason']}"
    note = "" if row["status"] == OK else f", {row['status']}: {row['reason']}"
    return f"{head}: {row['device_ms']:.4f} ms ({row['method']}), {row['call_ms']:.4f} ms a call{note}"


def milliseconds(row: Row | None) -> str:
    """Device time for a table, or the status; `!` marks an inaccurate result."""
    if row is None:
        return "-"
    if row.get("device_ms") is None:
        return str(row["status"])
    return f"{row['device_ms']:.3f}" + ("!" if row["status"] == INACCURATE else "")


def cell(value: float | None, pattern: str) -> str:
    """A number for a table."""
    return "-" if value is None else format(value, pattern)
