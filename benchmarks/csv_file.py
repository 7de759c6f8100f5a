"""CSV files of results, which every run adds its rows to."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """`ValueError` if a file is there and has other columns, so that no figure lands under a wrong name."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        present = next(csv.reader(file), [])
    if present != list(columns):
        raise ValueError(f"{path} has other columns, {present}: write to another file")


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Add rows to a CSV file, which is made with a header if it isn't there; what a row lacks stays empty.

    Raises:
        ValueError: the file has other columns.
    """
    check_columns(path, columns)
    unknown = sorted({name for row in rows for name in row} - set(columns))
    assert not unknown, unknown
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
