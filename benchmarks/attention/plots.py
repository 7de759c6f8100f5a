"""The figures as pictures, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.attention.rows import Row


def unavailable() -> str | None:
    """Why nothing can be drawn; None when it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: no plots"
    return None


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Save, for each mode in `rows`, time and memory against history length and the ratio to the best peer.

    Returns:
        The PNG files. Rows without a time are left out.
    """
    import matplotlib

    matplotlib.use("Agg")  # files only, no display
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row.get("device_ms") is not None]
    paths = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = [row for row in rows if row["mode"] == mode]
        paths += [
            _against_length(of_mode, "device_ms", "device time, ms", folder / f"{mode}_time.png"),
            _against_length(of_mode, "peak_mib", "peak memory, MiB", folder / f"{mode}_memory.png"),
            _ratios(of_mode, folder / f"{mode}_ratio.png"),
        ]
    return paths


def _against_length(rows: Sequence[Row], figure: str, label: str, path: Path) -> Path:
    """A colour per provider; lines join shapes that differ in nothing but their users' number and lengths."""
    picture, axes = _new(f"{rows[0]['mode']}, {rows[0]['device']}; lines join shapes with the same heads and mask")
    for i, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        of_provider = [row for row in rows if row["provider"] == provider and row.get(figure) is not None]
        for j, kind in enumerate(dict.fromkeys(map(_kind, of_provider))):
            points = sorted((row["mean_length"], row[figure]) for row in of_provider if _kind(row) == kind)
            label_once = provider if j == 0 else None
            axes.plot(*zip(*points, strict=True), color=f"C{i}", marker="o", label=label_once)
    lengths = {row["shape"]: row["mean_length"] for row in rows}
    for i, (shape, length) in enumerate(sorted(lengths.items(), key=lambda item: item[1])):
        height = 0.01 + 0.04 * (i % 3)  # in three rows, because neighbours may be as long as each other
        axes.annotate(shape, (length, height), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="mean history length, tokens", ylabel=label)
    return _save(picture, axes, path)


def _kind(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("heads", "kv_heads", "head_dim", "causal", "window", "targets"))


def _ratios(rows: Sequence[Row], path: Path) -> Path:
    picture, axes = _new(f"best peer / provider, {rows[0]['mode']}: above 1 is faster than every peer")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        ratios = {row["shape"]: row["ratio_to_best_peer"] for row in rows if row["provider"] == provider}
        places = [at + (i - (len(providers) - 1) / 2) * width for at in range(len(shapes))]
        axes.bar(places, [ratios.get(shape) or 0.0 for shape in shapes], width, label=provider)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), shapes)
    return _save(picture, axes, path)


def _new(title: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.set_title(title)
    return picture, axes


def _save(picture: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    picture.savefig(path, dpi=120)
    pyplot.close(picture)
    return path
