"""Where batches come from. A new data set is one class here or beside it, and one config."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from data.batch import Batch
from data.config import DataConfig, SyntheticConfig
from data.schema import Schema
from data.synthetic import SyntheticSource

SPLITS = ("train", "eval")


class Source(Protocol):
    """A data set that can be asked for any of its users. It travels to the loader's workers, so it must pickle."""

    schema: Schema

    def num_users(self, split: str) -> int:
        """Users of the split `train` or `eval`."""
        ...

    def batch(self, split: str, users: npt.NDArray[np.int64]) -> Batch:
        """A host-side batch of the users with these indices, 0 to `num_users(split)` - 1, in this order.

        The same user gives the same row in whatever batch; no users give an empty batch.
        """
        ...


def build_source(config: DataConfig) -> Source:
    """The source that reads what `config` describes.

    Raises:
        ValueError: no source knows this kind of config.
    """
    if isinstance(config, SyntheticConfig):
        return SyntheticSource(config)
    raise ValueError(f"no source for a {type(config).__name__}; there are sources for: SyntheticConfig")
