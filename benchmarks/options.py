"""Options that the command lines of all comparisons have in common."""

from __future__ import annotations

import argparse

import torch

from benchmarks.attention.shapes import Shape, parse_shape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def names_of(text: str) -> list[str]:
    """Separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def shape_of(text: str) -> Shape:
    """As `parse_shape`, with an error that argparse shows."""
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse hides what a ValueError says
