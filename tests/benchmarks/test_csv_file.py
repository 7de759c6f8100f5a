"""Rows of results end under the right names, or nowhere."""

import csv
from pathlib import Path

import pytest

from benchmarks.csv_file import append_rows

COLUMNS = ("provider", "ms", "reason")


def test_rows_are_added_under_the_same_columns_only(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "rows.csv"
    append_rows(path, [{"provider": "sdpa", "ms": 0.5}], COLUMNS)
    append_rows(path, [{"provider": "fa4", "reason": "no module, it says"}], COLUMNS)
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["provider", "ms", "reason"],
            ["sdpa", "0.5", ""],
            ["fa4", "", "no module, it says"],
        ]
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("a,b\n")
    with pytest.raises(ValueError, match="has other columns"):
        append_rows(foreign, [{"provider": "sdpa"}], COLUMNS)
    assert foreign.read_text() == "a,b\n"
