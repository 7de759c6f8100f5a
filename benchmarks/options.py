"""Options that the command lines of all comparisons have in common."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from benchmarks.attention.shapes import Shape, parse_shape
from benchmarks.timing import MODES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_common_options(parser: argparse.ArgumentParser, providers: Collection[str]) -> None:
    """Who is compared, in what, where, how often, and where the rows go."""
    parser.add_argument("--providers", type=names_of, default=list(providers), help=f"of {', '.join(providers)}")
    parser.add_argument("--modes", type=names_of, default=list(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=21, help="turns of each provider, of which the median counts")
    parser.add_argument("--output", type=Path, help="CSV file that the rows are added to")


def check_common_options(
    parser: argparse.ArgumentParser, given: argparse.Namespace, **names: tuple[Sequence[str], Collection[str]]
) -> None:
    """End the program with what is allowed, if a name isn't or there are no repeats.

    Args:
        names: by what they are of: those that were chosen, and all that there are.
    """
    for what, (chosen, allowed) in names.items():
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            parser.error(f"there is no {what} {', '.join(unknown)}: allowed are {', '.join(allowed)}")
    if given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}: allowed are values >= 1")


def names_of(text: str) -> list[str]:
    """Separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def shape_of(text: str) -> Shape:
    """As `parse_shape`, with an error that argparse shows."""
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse hides what a ValueError says
