"""Plain-text tables for the terminal."""

from collections.abc import Sequence


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], to_the_right: Sequence[bool] | None = None
) -> str:
    """Columns under a header; without `to_the_right`, columns of numbers go to the right and text to the left."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    if to_the_right is None:
        to_the_right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_the_right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def _is_number(text: str) -> bool:
    return (
        text == "-" or text.replace(",", "").replace(".", "", 1).replace("%", "").lstrip("-").isdigit() or text == "nan"
    )
