"""The `attention` config group."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class BackendName(Enum):
    """What `attention.backend` may be; `recsys/attention/registry.py` holds the implementations."""

    auto = "auto"
    dense = "dense"
    sdpa = "sdpa"
    varlen = "varlen"
    jagged = "jagged"
    jagged_flash = "jagged_flash"


@dataclass
class AttentionConfig:
    """How the tokens of a user see each other, and which code computes it."""

    backend: BackendName = BackendName.auto
    """`auto` is `jagged_flash` on CUDA and `sdpa` on a CPU; any other name is taken literally or refused."""

    causal: bool = True
    """A history event sees itself and earlier events only. Candidates always see the whole history."""

    window: int | None = None
    """Tokens a history event sees back, itself included (not causal: as many ahead); None is no limit."""

    dropout: float = 0.0
    """Probability of dropping an attention weight in training. Above 0 all but `varlen` can."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention.window is {self.window}: allowed are null and integers >= 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"attention.dropout is {self.dropout}: allowed are values from 0 to below 1")
