"""Typed settings of the input side, checked when Hydra makes objects of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class OutOfRangeIds(Enum):
    """What the loader does with an id outside its table."""

    error = "error"
    """Stop, and name the feature, the id and the table."""
    clip = "clip"
    """Use the nearest row of the table."""
    hash = "hash"
    """Use a row chosen by hashing the id, so that unknown ids spread over the table."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ValueError` with what was wrong and what is allowed unless `ok`."""
    if not ok:
        raise ValueError(f"data.{name} is {value!r}; allowed: {allowed}")


def _require_probability(name: str, value: float) -> None:
    require(0 <= value <= 1, name, value, "a probability, 0 to 1")


@dataclass
class DataConfig:
    """What every data set needs: how much of it there is and how a rank is fed."""

    batch_size: int = 64
    """Users per rank and step."""
    num_workers: int = 0
    """Processes that make batches, per rank; 0 makes them in the training process."""
    prefetch_batches: int = 2
    """Batches each worker keeps ready; without workers a batch is made when it is asked for."""
    pin_memory: bool = True
    """Copy batches to page-locked memory, so that the copy to the GPU overlaps compute; ignored without CUDA."""
    out_of_range_ids: OutOfRangeIds = OutOfRangeIds.error
    """What to do with an id outside its table."""
    cycle_batches: int = 0
    """Make this many training batches once and cycle through them, to measure throughput without the input
    side; 0 is off."""
    num_train_users: int = 1_000_000
    """Users of the train split; training wraps around at the end."""
    num_eval_users: int = 4096
    """Users of the eval split, none of whom is a train user."""
    seed: int = 1
    """Determines the data, and nothing else."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more users")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more processes")
        require(self.prefetch_batches >= 1, "prefetch_batches", self.prefetch_batches, "1 or more batches")
        require(self.cycle_batches >= 0, "cycle_batches", self.cycle_batches, "0 (off) or more batches")
        require(1 <= self.num_train_users <= 2**40, "num_train_users", self.num_train_users, "1 to 2^40 users")
        require(0 <= self.num_eval_users <= 2**40, "num_eval_users", self.num_eval_users, "0 to 2^40 users")


@dataclass
class HistoryConfig:
    """Lengths of the histories: lognormal, at least one event, clamped to `max`; and some empty ones."""

    mean: float = 48.0
    """Mean events of a user who has any, before clamping to `max`: the mean that comes out is smaller, the more
    so the closer `max` is and the larger `sigma`."""
    max: int = 160
    """Most events of a user."""
    sigma: float = 0.5
    """Spread: the standard deviation of the logarithm of the length; 0 gives everybody `mean` events."""
    empty_fraction: float = 0.02
    """Share of users without any event."""

    def __post_init__(self) -> None:
        require(self.max >= 0, "history.max", self.max, "0 or more events")
        require(self.mean >= 1, "history.mean", self.mean, "1 or more events")
        require(self.sigma >= 0, "history.sigma", self.sigma, "0 or more")
        _require_probability("history.empty_fraction", self.empty_fraction)


@dataclass
class CandidatesConfig:
    """How many items are scored per user: uniform from `min` to `max`."""

    min: int = 6
    """Fewest candidates of a user."""
    max: int = 12
    """Most candidates of a user."""

    def __post_init__(self) -> None:
        require(self.min >= 1, "candidates.min", self.min, "1 or more")
        require(self.max >= self.min, "candidates.max", self.max, f"candidates.min ({self.min}) or more")


@dataclass
class ContextFeatureConfig:
    """One pooled context feature: its table and how many values a user has."""

    name: str = "country"
    """The key, and the name of the table."""
    cardinality: int = 50
    """Rows of the table."""
    min_length: int = 1
    """Fewest values of a user."""
    max_length: int = 1
    """Most values of a user; lengths are uniform from `min_length`."""

    def __post_init__(self) -> None:
        what = f"context[{self.name}]"
        require(self.cardinality >= 1, f"{what}.cardinality", self.cardinality, "1 or more rows")
        require(self.min_length >= 0, f"{what}.min_length", self.min_length, "0 or more values")
        require(
            self.max_length >= self.min_length,
            f"{what}.max_length",
            self.max_length,
            f"min_length ({self.min_length}) or more",
        )


@dataclass
class TaskConfig:
    """One label. The first task stands alone; each later one is only reached through the one before it
    (a like needs a click), so that P(task) = P(task before) · sigmoid(its own logit)."""

    name: str = "click"
    """Column of the labels."""
    bias: float = -2.5
    """Logit of an average item that does not meet the user's current interest."""
    interest_weight: float = 5.0
    """Added to the logit when the candidate's category is the user's current interest."""


def _default_context() -> list[ContextFeatureConfig]:
    return [
        ContextFeatureConfig("country", 50, 1, 1),
        ContextFeatureConfig("device", 8, 1, 1),
        ContextFeatureConfig("hobbies", 100, 0, 5),
    ]


def _default_tasks() -> list[TaskConfig]:
    return [TaskConfig("click", -2.5, 5.0), TaskConfig("like", -0.5, 1.0)]


@dataclass
class PlantedConfig:
    """What the labels of the synthetic data depend on. See docs/synthetic_data.md."""

    interests_per_user: int = 4
    """Categories a user moves between; every session is about one of them."""
    session_events: float = 6.0
    """Mean events of a session. The newest session has at least `min_current_events`."""
    min_current_events: int = 5
    """Fewest events that tell the current interest (where the history has that many)."""
    max_idle_events: int = 24
    """Most of the newest events that are about nothing and skipped (a page left open): this times the square of a
    uniform number, and at most half the history. So how old an event is does not tell whether it is of the newest
    session: it has to be compared with the others."""
    on_interest: float = 0.85
    """Share of events about the session's interest; the others are about any category."""
    positive_on_interest: float = 0.9
    """Chance that an event about the interest gets a positive action (1 and up; 0 is a skip)."""
    positive_off_interest: float = 0.05
    """Chance that another event gets a positive action."""
    current_candidates: float = 0.4
    """Share of candidates from the current interest."""
    past_candidates: float = 0.5
    """Share of candidates from the user's other interests: right for whoever averages the whole history."""
    item_exponent: float = 1.0
    """Popularity of an item within its category falls as rank to the power of minus this."""
    category_exponent: float = 0.5
    """The same for the categories."""
    quality_weight: float = 0.2
    """Standard deviation of an item's own effect on every logit."""
    context_weight: float = 0.2
    """Standard deviation of the effect of one context feature's values."""
    dense_weight: float = 0.4
    """Standard deviation of the effect of the dense features."""

    def __post_init__(self) -> None:
        for name in ("on_interest", "positive_on_interest", "positive_off_interest"):
            _require_probability(f"planted.{name}", getattr(self, name))
        for name in ("current_candidates", "past_candidates"):
            _require_probability(f"planted.{name}", getattr(self, name))
        both = self.current_candidates + self.past_candidates
        require(both <= 1, "planted.current_candidates + past_candidates", both, "1 at most together")
        for name in ("interests_per_user", "session_events", "min_current_events"):
            require(getattr(self, name) >= 1, f"planted.{name}", getattr(self, name), "1 or more")
        require(self.max_idle_events >= 0, "planted.max_idle_events", self.max_idle_events, "0 or more events")
        for name in (
            "item_exponent",
            "category_exponent",
            "quality_weight",
            "context_weight",
            "dense_weight",
        ):
            require(getattr(self, name) >= 0, f"planted.{name}", getattr(self, name), "0 or more")


@dataclass
class SyntheticConfig(DataConfig):
    """Users made up on the spot, with a planted interest that drifts through the history."""

    num_items: int = 5000
    """Rows of the table `item`."""
    num_categories: int = 20
    """Rows of the table `category`; every item belongs to one."""
    num_actions: int = 4
    """Rows of the table `action`: 0 is a skip, the others are positive."""
    history: HistoryConfig = field(default_factory=HistoryConfig)
    """Lengths of the histories."""
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    """Candidates per user."""
    context: list[ContextFeatureConfig] = field(default_factory=_default_context)
    """Pooled context features."""
    num_dense: int = 8
    """Dense features."""
    tasks: list[TaskConfig] = field(default_factory=_default_tasks)
    """Labels, each reached through the one before."""
    planted: PlantedConfig = field(default_factory=PlantedConfig)
    """What the labels depend on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_categories <= self.num_items < 2**31,
            "num_items",
            self.num_items,
            f"num_categories ({self.num_categories}) to 2^31 - 1 rows",
        )
        require(1 <= self.num_categories <= 65536, "num_categories", self.num_categories, "1 to 65536 rows")
        require(2 <= self.num_actions <= 256, "num_actions", self.num_actions, "2 to 256 rows")
        require(self.num_dense >= 0, "num_dense", self.num_dense, "0 or more")
        names = [task.name for task in self.tasks]
        require(len(names) >= 1 and len(set(names)) == len(names), "tasks", names, "at least one, each name once")
        contexts = [feature.name for feature in self.context]
        taken = {"item", "category", "action"} & set(contexts)
        require(
            len(set(contexts)) == len(contexts) and not taken,
            "context",
            contexts,
            "each name once, and none of item, category, action (tables of the sequences)",
        )
