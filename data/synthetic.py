"""Synthetic user histories with a planted interest, made on the spot for any set of users.

Every value is a hash of (seed, purpose, user, position), so a user is the same in whatever batch, process or order
they are made, and nothing is stored or sent. The model behind the labels is described in docs/synthetic_data.md.

Letters: `B` users, `L` events, `N` candidates, `T` tasks, `F` dense features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data import hashing
from data.batch import Batch, make_batch
from data.catalogue import Catalogue
from data.config import SyntheticConfig
from data.hashing import F32, U64
from data.schema import Feature, Schema

I64 = npt.NDArray[np.int64]

_EVAL_START = 1 << 41
"""First id of the eval users: past the largest train split, so that eval users don't depend on its size."""
_EPOCH_SECONDS = 1_735_689_600
"""Requests start here (2025-01-01 UTC) and spread over `_REQUEST_SPAN_SECONDS`."""
_REQUEST_SPAN_SECONDS = 30 * 86_400
_WITHIN_SESSION_SECONDS = 60.0
"""Mean seconds between two events of a session (exponential, cut at 20 minutes)."""
_SHORTEST_PAUSE_SECONDS = 1800.0
"""Least seconds between two sessions; more come on top (exponential), on average this times the user's pace."""
_PACES = 500.0
"""Users' paces are log-uniform from 1 to this: what is old for one is new for another."""


@dataclass
class _Users:
    """What the parts of a batch share."""

    ids: I64
    """(B,)"""
    interests: I64
    """(B, K) the categories a user moves between."""
    current: I64
    """(B,) the category of the newest session: what the labels depend on."""
    current_slot: I64
    """(B,) its place in `interests`."""


@dataclass
class _History:
    """Events of all users, each user's in the order of time."""

    lengths: I64
    values: dict[str, I64]
    time: I64
    request_time: I64


class SyntheticSource:
    """A `data.sources.Source` of synthetic users.

    Args:
        config: sizes, lengths and the planted model.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self.catalogue = Catalogue(config)
        tables = {"item": config.num_items, "category": config.num_categories, "action": config.num_actions}
        tables |= {feature.name: feature.cardinality for feature in config.context}
        self.schema = Schema(
            history=(
                Feature("item_id", "item"),
                Feature("category_id", "category"),
                Feature("action", "action"),
            ),
            candidates=(Feature("candidate_item_id", "item"), Feature("candidate_category_id", "category")),
            context=tuple(Feature(feature.name, feature.name) for feature in config.context),
            tables=tables,
            num_dense=config.num_dense,
            tasks=tuple(task.name for task in config.tasks),
        )

    def num_users(self, split: str) -> int:
        """Users of the split `train` or `eval`."""
        return self.config.num_eval_users if split == "eval" else self.config.num_train_users

    def batch(self, split: str, users: I64) -> Batch:
        """The users with these indices (0 to `num_users(split)` - 1) of a split, in this order.

        Returns a host-side batch whose `true_probs` are the probabilities the labels were drawn with.
        """
        ids = users.astype(np.int64) + (_EVAL_START if split == "eval" else 0)
        people = self._users(ids)
        history = self._history(people)
        candidate_lengths, candidates, match = self._candidates(people)
        context, context_effect = self._context(ids)
        dense, dense_effect = self._dense(ids)

        row = np.repeat(np.arange(len(ids)), candidate_lengths)
        effect = (context_effect + dense_effect)[row] + self.catalogue.quality(candidates["candidate_item_id"])
        labels, true_probs = self._labels(ids, candidate_lengths, match, effect)
        return make_batch(
            self.schema,
            history=history.values,
            history_lengths=history.lengths,
            history_time=history.time,
            request_time=history.request_time,
            candidates=candidates,
            candidate_lengths=candidate_lengths,
            context=context,
            dense=dense,
            labels=labels,
            true_probs=true_probs,
        )

    def _stream(self, name: str) -> np.uint64:
        return hashing.stream(self.config.seed, name)

    def _keys(self, name: str, ids: I64) -> U64:
        return hashing.keys(self._stream(name), ids)

    def _slot(self, key: U64, session: I64 | int) -> I64:
        """Which of a user's interests a session is about; sessions count back from the newest, 0."""
        number = np.asarray(session, dtype=np.uint64)
        slots = hashing.draws(key, number) >> np.uint64(33)
        return (slots % np.uint64(self.config.planted.interests_per_user)).astype(np.int64)

    def _users(self, ids: I64) -> _Users:
        count = self.config.planted.interests_per_user
        bits = hashing.draws(self._keys("interests", ids)[:, None], np.arange(count, dtype=np.uint64))
        interests = self.catalogue.category(hashing.parts16(bits)[:, 0]).reshape(-1, count)
        slot = self._slot(self._keys("sessions", ids), 0)
        return _Users(ids, interests, np.take_along_axis(interests, slot[:, None], 1)[:, 0], slot)

    def _history_lengths(self, ids: I64) -> tuple[I64, I64]:
        """Events per user, and how many of the newest are idle: at most half of what there is before clamping."""
        settings = self.config.history
        z = hashing.normal(self._keys("history_length", ids)).astype(np.float64)
        mu = math.log(settings.mean) - settings.sigma**2 / 2
        lengths = np.clip(np.rint(np.exp(mu + settings.sigma * z)), 1, None)
        most_idle = np.minimum(np.floor(lengths / 2), self.config.planted.max_idle_events)
        share = hashing.uniform(hashing.parts32(self._keys("idle", ids))[:, 0])
        idle = np.floor(share * share * (most_idle + 1)).astype(np.int64)
        lengths = np.minimum(lengths, settings.max).astype(np.int64)
        empty = hashing.uniform(hashing.parts32(self._keys("empty", ids))[:, 0]) < settings.empty_fraction
        lengths[empty] = 0
        return lengths, idle

    def _history(self, people: _Users) -> _History:
        """Events of the users. Position 0 is the newest event, so that a longer history would only add old ones."""
        planted = self.config.planted
        lengths, idle = self._history_lengths(people.ids)
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        position = np.repeat(ends, lengths) - 1 - np.arange(total)
        # Events before the idle ones, counted back from the newest of them; negative for idle events.
        active = position - np.repeat(idle, lengths)

        def event_bits(name: str) -> U64:
            return hashing.draws(np.repeat(self._keys(name, people.ids), lengths), position.view(np.uint64))

        what = hashing.parts16(event_bits("events"))
        where = hashing.parts32(event_bits("items_and_gaps"))

        # An event is the last of an older session with chance 1 / session_events, but not among the newest few.
        closes = what[:, 0] < hashing.threshold16(1 / planted.session_events)
        closes &= active >= planted.min_current_events
        session_category, session_lengths = self._sessions(people, lengths, position, closes)
        session_category = np.repeat(session_category, session_lengths)
        is_idle = active < 0
        on_interest = ~is_idle & (what[:, 1] < hashing.threshold16(planted.on_interest))
        category = np.where(on_interest, session_category, self.catalogue.category(what[:, 2]))
        # An idle event that happens to be about the interest is still a skip.
        on_interest = ~is_idle & (category == session_category)
        values = {
            "item_id": self.catalogue.item(category, hashing.uniform(where[:, 0])),
            "category_id": category,
            "action": np.where(is_idle, 0, self._actions(on_interest, what[:, 3])),
        }
        # A long pause comes after every session, and so before the first idle event.
        pause = closes | ((active == 0) & (position > 0))
        time, request_time = self._times(people.ids, lengths, pause, where[:, 1])
        return _History(lengths, values, time, request_time)

    def _sessions(self, people: _Users, lengths: I64, position: I64, closes: npt.NDArray[np.bool_]) -> tuple[I64, I64]:
        """Category and number of events of every session, in the order of the events."""
        is_last = closes | (position == 0)
        last = np.flatnonzero(is_last)
        session_lengths = np.diff(last, prepend=-1)
        user = np.repeat(np.arange(len(lengths)), lengths)[last]
        # Sessions of a user, counted back from the newest.
        sessions_up_to = np.cumsum(np.bincount(user, minlength=len(lengths)))
        number = sessions_up_to[user] - 1 - np.arange(len(last))
        slot = self._slot(self._keys("sessions", people.ids)[user], number)
        return people.interests[user, slot], session_lengths

    def _actions(self, on_interest: npt.NDArray[np.bool_], bits: npt.NDArray[np.uint16]) -> I64:
        """0 is a skip; the positive actions are equally likely."""
        planted = self.config.planted
        bound = np.where(
            on_interest,
            hashing.threshold16(planted.positive_on_interest),
            hashing.threshold16(planted.positive_off_interest),
        )
        # Below the bound the low bits are as good as new.
        return np.where(bits < bound, 1 + bits % np.uint16(self.config.num_actions - 1), 0).astype(np.int64)

    def _times(
        self, ids: I64, lengths: I64, pause: npt.NDArray[np.bool_], bits: npt.NDArray[np.uint32]
    ) -> tuple[I64, I64]:
        """Seconds of every event and of the request: the gap after an event is short within a session."""
        exponential = -np.log1p(-hashing.uniform(bits))
        within = np.minimum(exponential * np.float32(_WITHIN_SESSION_SECONDS), 1200)
        pace = hashing.uniform(hashing.parts32(self._keys("pace", ids))[:, 0])
        scale = np.float32(_SHORTEST_PAUSE_SECONDS) * np.float32(_PACES) ** pace
        between = _SHORTEST_PAUSE_SECONDS + exponential * np.repeat(scale, lengths)
        gaps = 1 + np.where(pause, between, within).astype(np.int64)
        span = (self._keys("request", ids) >> np.uint64(33)) % np.uint64(_REQUEST_SPAN_SECONDS)
        request_time = _EPOCH_SECONDS + span.astype(np.int64)
        elapsed = np.concatenate([np.zeros(1, np.int64), np.cumsum(gaps)])
        ends = np.cumsum(lengths)
        return np.repeat(request_time - elapsed[ends], lengths) + elapsed[:-1], request_time

    def _candidates(self, people: _Users) -> tuple[I64, dict[str, I64], npt.NDArray[np.bool_]]:
        """Lengths, values, and which candidates meet the current interest."""
        planted, settings = self.config.planted, self.config.candidates
        spread = np.uint64(settings.max - settings.min + 1)
        lengths = settings.min + ((self._keys("candidates", people.ids) >> np.uint64(33)) % spread).astype(np.int64)
        bits = self._candidate_bits("candidate", people.ids, lengths)
        what = hashing.parts16(bits)
        user = np.repeat(np.arange(len(lengths)), lengths)
        category = self.catalogue.category(what[:, 1])
        current = what[:, 0] < hashing.threshold16(planted.current_candidates)
        past = ~current & (what[:, 0] < hashing.threshold16(planted.current_candidates + planted.past_candidates))
        others = planted.interests_per_user - 1
        if others:
            slot = people.current_slot[user] + 1 + what[:, 2] % np.uint16(others)
            category = np.where(past, people.interests[user, slot % planted.interests_per_user], category)
        category = np.where(current, people.current[user], category)
        rank = hashing.uniform(hashing.parts32(self._candidate_bits("candidate_item", people.ids, lengths))[:, 0])
        values = {
            "candidate_item_id": self.catalogue.item(category, rank),
            "candidate_category_id": category,
        }
        return lengths, values, category == people.current[user]

    def _candidate_bits(self, name: str, ids: I64, lengths: I64) -> U64:
        first = np.cumsum(lengths) - lengths
        number = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
        return hashing.draws(np.repeat(self._keys(name, ids), lengths), number.view(np.uint64))

    def _context(self, ids: I64) -> tuple[dict[str, tuple[I64, I64]], F32]:
        """Values and lengths per feature, and their effect on a user's logits: the mean over a feature's values."""
        features: dict[str, tuple[I64, I64]] = {}
        total = np.zeros(len(ids), np.float32)
        for feature in self.config.context:
            keys = self._keys(f"context/{feature.name}", ids)
            spread = np.uint64(feature.max_length - feature.min_length + 1)
            lengths = feature.min_length + ((keys >> np.uint64(33)) % spread).astype(np.int64)
            bits = self._candidate_bits(f"context_values/{feature.name}", ids, lengths)
            # Squaring the uniform number makes the low values common, like countries and devices are.
            u = hashing.uniform(hashing.parts32(bits)[:, 0])
            values = np.minimum((u * u * feature.cardinality).astype(np.int64), feature.cardinality - 1)
            effect = hashing.normal(self._keys(f"context_effect/{feature.name}", values))
            user = np.repeat(np.arange(len(ids)), lengths)
            sums = np.bincount(user, weights=effect, minlength=len(ids))
            total += (sums / np.maximum(lengths, 1)).astype(np.float32)
            features[feature.name] = (values, lengths)
        return features, total * np.float32(self.config.planted.context_weight)

    def _dense(self, ids: I64) -> tuple[F32, F32]:
        columns = np.arange(self.config.num_dense, dtype=np.uint64)
        dense = hashing.normal(hashing.draws(self._keys("dense", ids)[:, None], columns))
        weights = hashing.normal(hashing.draws(self._stream("dense_effect") + columns, columns))
        norm = float(np.linalg.norm(weights)) or 1.0
        # Not a matrix product: BLAS rounds a row differently in batches of different sizes.
        effect = (dense * weights).sum(1) * np.float32(self.config.planted.dense_weight / norm)
        return dense, effect

    def _labels(self, ids: I64, lengths: I64, match: npt.NDArray[np.bool_], effect: F32) -> tuple[F32, F32]:
        """(N, T) labels and the probabilities they were drawn with."""
        probs, labels = [], []
        prob = np.ones(len(match), np.float32)
        label = np.ones(len(match), np.bool_)
        for task in self.config.tasks:
            logit = np.float32(task.bias) + np.float32(task.interest_weight) * match + effect
            own = (1 / (1 + np.exp(-logit))).astype(np.float32)
            draw = hashing.uniform(hashing.parts32(self._candidate_bits(f"label/{task.name}", ids, lengths))[:, 0])
            prob = (prob * own).astype(np.float32)
            label = label & (draw < own)
            probs.append(prob)
            labels.append(label.astype(np.float32))
        return np.stack(labels, 1), np.stack(probs, 1)
