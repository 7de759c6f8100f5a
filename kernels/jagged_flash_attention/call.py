"""What one call of attention asks for, as the kernels take it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kernels.jagged.launch import LOG2_E


@dataclass(frozen=True)
class Call:
    """Mask, scale and dropout of one call, as the kernels take them."""

    causal: bool
    window: int | None
    has_targets: bool
    scale: float
    """Positive."""

    dropout_p: float = 0.0
    precision: str = "ieee"
    """Of float32 products: `ieee` or `tf32`."""

    @functools.cached_property
    def scale_log2(self) -> float:
        """Brings scores to base 2."""
        return self.scale * LOG2_E

    @functools.cached_property
    def drop_below(self) -> int:
        """A pair is dropped if its 32 random bits are below."""
        return int(self.dropout_p * 2**32)

    @functools.cached_property
    def keep_scale(self) -> float:
        """What the probabilities that are kept are multiplied with."""
        return 1.0 / (1.0 - self.dropout_p)

    @functools.cached_property
    def constants(self) -> tuple[bool, bool, bool, bool, str]:
        """What the kernels are compiled for: CAUSAL, HAS_WINDOW, HAS_TARGETS, DROPOUT, PRECISION."""
        return self.causal, self.window is not None, self.has_targets, self.dropout_p > 0.0, self.precision
