"""Checks of configured values: what was wrong, and what is allowed."""


def at_least(name: str, value: float, least: float) -> None:
    """Raise `ValueError` unless `value >= least`."""
    if not value >= least:  # NaN is no value either
        raise ValueError(f"{name} is {value}: allowed are values >= {least}")


def between(name: str, value: float, least: float, most: float) -> None:
    """Raise `ValueError` unless `least <= value <= most`."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}: allowed are values from {least} to {most}")
