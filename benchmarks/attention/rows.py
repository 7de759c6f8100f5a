"""Rows of figures: their columns, the CSV file, the terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.attention.providers import PROVIDERS
from benchmarks.rows import ABSENT, OK, Row, cell, milliseconds
from recsys.tables import format_table

SHAPE = (
    "shape",
    "users",
    "heads",
    "kv_heads",
    "head_dim",
    "mean",
    "max",
    "causal",
    "window",
    "targets",
    "tokens",
    "mean_length",
    "max_length",
)
FIGURES = (
    "status",
    "reason",
    "method",
    "device_ms",
    "call_ms",
    "peak_mib",
    "gflop",
    "tflop_per_s",
    "mb",
    "gb_per_s",
    "floor_ms",
    "fraction_of_floor",
    "ratio_to_best_peer",
    "error_out",
    "error_dq",
    "error_dk",
    "error_dv",
    "relative_error",
    "prepare_s",
)
ENVIRONMENT = ("device", "torch", "triton", "cuda", "fbgemm", "flash_attn", "git_commit", "command")
COLUMNS = (*SHAPE, "dtype", "mode", "provider", *FIGURES, *ENVIRONMENT)


def fill_ratios(rows: Sequence[Row]) -> None:
    """Set `ratio_to_best_peer` in the rows of one shape and mode.

    It is the device time of the fastest provider that isn't ours, over the row's own: above 1, the row is faster
    than every peer.
    """
    best = best_peer(rows)
    for row in rows:
        timed = row.get("device_ms") is not None
        row["ratio_to_best_peer"] = round(best["device_ms"] / row["device_ms"], 3) if best and timed else None


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest accurate row that isn't ours; None where there is none."""
    peers = [row for row in rows if row["status"] == OK and not PROVIDERS[row["provider"]].is_ours]
    return min(peers, key=lambda row: row["device_ms"], default=None)


def table(rows: Sequence[Row], mode: str) -> str:
    """The rows of one mode: a line per shape, milliseconds of each provider, and how ours stands.

    `!` marks an inaccurate result. `peer/` above 1 means that ours is faster than the best peer by that factor;
    `of floor` is what fraction of our time the floor is. Memory is that of ours and of the best peer. Providers that
    are absent have no column.
    """
    rows = [row for row in rows if row["mode"] == mode and row["status"] != ABSENT]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    ours = [provider for provider in providers if PROVIDERS[provider].is_ours]
    header = ["shape", "floor", *providers, "best peer"]
    for provider in ours:
        header += [f"peer/{provider}", "of floor", "MiB"]
    header.append("MiB peer")
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        by_provider = {row["provider"]: row for row in rows if row["shape"] == shape}
        best = best_peer(list(by_provider.values()))
        floor = next((row["floor_ms"] for row in by_provider.values()), None)
        line = [shape, cell(floor, ".3f"), *(milliseconds(by_provider.get(name)) for name in providers)]
        line.append(best["provider"] if best else "-")
        for name in ours:
            row = by_provider.get(name, {})
            line += [
                cell(row.get("ratio_to_best_peer"), ".2f"),
                cell(row.get("fraction_of_floor"), ".0%"),
                cell(row.get("peak_mib"), ",.0f"),
            ]
        line.append(cell(best["peak_mib"] if best else None, ",.0f"))
        lines.append(line)
    to_the_right = [name not in ("shape", "best peer") for name in header]
    return format_table(header, lines, to_the_right)
