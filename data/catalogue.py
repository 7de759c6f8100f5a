"""The items of the synthetic data: categories, popularity and quality, all functions of the id."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from data import hashing
from data.config import SyntheticConfig
from data.hashing import F32

I64 = npt.NDArray[np.int64]


class Catalogue:
    """Items of `config.num_categories` categories.

    Item number `rank · C + category` is the one of that popularity rank in its category; its id is
    `(number · a + b) mod num_items`, so that popular rows lie all over the table as they do in real ones.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self.num_items, self.num_categories = config.num_items, config.num_categories
        self.exponent = config.planted.item_exponent
        self.quality_weight = np.float32(config.planted.quality_weight)
        self._quality = hashing.stream(config.seed, "quality")
        self._multiplier = _coprime_near(int(self.num_items * 0.618), self.num_items)
        self._shift = int(hashing.stream(config.seed, "item_shift")) % self.num_items
        weights = np.arange(1, self.num_categories + 1, dtype=np.float64) ** -config.planted.category_exponent
        bounds = np.cumsum(weights / weights.sum())
        # The categories at 65536 evenly spaced points of the distribution: one look-up per draw.
        table = np.searchsorted(bounds, (np.arange(65536) + 0.5) / 65536, side="right")
        self._category_table = np.minimum(table, self.num_categories - 1).astype(np.int64)

    def category(self, bits: npt.NDArray[np.uint16]) -> I64:
        """A category by popularity for every 16-bit number."""
        return self._category_table[bits]

    def item(self, category: I64, u: F32) -> I64:
        """Item ids of the categories by popularity, for uniform numbers `u`: ranks follow a cut-off Zipf law.

        The continuous law with density x^-s on [1, n + 1) is inverted and rounded down.
        """
        # The last rank is there for the first categories only when C does not divide the number of items.
        count = self.num_items // self.num_categories + (category < self.num_items % self.num_categories)
        if abs(self.exponent - 1) < 1e-6:
            ranks = np.exp(u * np.log(count.astype(np.float32) + 1))
        else:
            power = np.float32(1 - self.exponent)
            ranks = (1 + u * ((count.astype(np.float32) + 1) ** power - 1)) ** (1 / power)
        rank = np.clip(ranks.astype(np.int64) - 1, 0, count - 1)
        return ((rank * self.num_categories + category) * self._multiplier + self._shift) % self.num_items

    def category_of(self, item: I64) -> I64:
        """The category of each item id."""
        inverse = pow(self._multiplier, -1, self.num_items) if self.num_items > 1 else 0
        return ((item - self._shift) * inverse % self.num_items) % self.num_categories

    def quality(self, item: I64) -> F32:
        """The effect of each item on the logits: normal with standard deviation `planted.quality_weight`."""
        return hashing.normal(hashing.keys(self._quality, item)) * self.quality_weight


def _coprime_near(start: int, number: int) -> int:
    """The first of start, start + 1, … that shares no factor with `number`."""
    candidate = max(1, start)
    while math.gcd(candidate, number) != 1:
        candidate += 1
    return candidate
