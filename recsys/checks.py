"""Checks of configured values: what was wrong, and what is allowed."""


def at_least(name: str, value: float, least: float) -> None:
    """Raise `ValueError` unless `value >= least`."""
    if not value >= least:  # NaN is no value either
        raise ValueError(f"{name} is {value}: allowed are values >= {least}")


def between(name: str, value: float, least: float, most: float) -> None:
    """Raise `ValueError` unless `least <= value <= most`."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}: allowed are values from {least} to {most}")


def decay_rates(name: str, betas: tuple[float, float]) -> None:
    """Raise `ValueError` unless both lie from 0 up to, not including, 1."""
    for beta in betas:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} holds {beta}: allowed are 0 <= beta < 1")
