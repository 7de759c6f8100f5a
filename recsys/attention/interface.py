"""What every attention backend takes and gives.

Letters: `B` users, `L` tokens of all users, `S` tokens of the longest user, `H` heads, `D` head dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kernels.score_pitch import ROW_MULTIPLE, row_pitch

T = TypeVar("T")


@dataclass(frozen=True)
class MaskSpec:
    """Who sees whom among the tokens of one user.

    History follows `causal` and `window`; a candidate sees the whole history and itself, never another
    candidate. The host integers describe `num_targets`, so that no backend has to ask the device.
    """

    causal: bool = True
    """A history token sees itself and earlier ones only."""

    window: int | None = None
    """History query i sees keys j with `i - j < window` (not causal: `|i - j| < window`). Candidates: all."""

    num_targets: Tensor | None = None
    """`(B,)` integers on the device: the last `num_targets[b]` tokens of user b are candidates."""

    total_targets: int | None = None
    """`num_targets.sum()`, known on the host. `varlen` needs it."""

    max_targets: int | None = None
    """An upper bound of `num_targets`; None means `layout.max_seqlen`. A tight one makes `varlen` faster."""

    max_history: int | None = None
    """An upper bound of the history lengths; None means `layout.max_seqlen`."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"the attention window is {self.window}: allowed are None and integers >= 1")

    def simplified(self, layout: JaggedLayout) -> MaskSpec:
        """The same mask without the parts that hide nothing in this layout, so that the fast paths apply."""
        mask = self
        if mask.window is not None and mask.window >= layout.max_seqlen:
            mask = replace(mask, window=None)
        if mask.num_targets is not None and mask.total_targets == 0:
            mask = replace(mask, num_targets=None)
        return mask


def _check_total_scores(total_scores: int, least: int, most: int, users: str) -> None:
    if not least <= total_scores <= most or total_scores % ROW_MULTIPLE:
        raise ValueError(
            f"total_scores is {total_scores}: `count_scores` of {users}, is a multiple of {ROW_MULTIPLE} from {least} "
            f"to {most}"
        )


@dataclass(frozen=True, eq=False)
class JaggedLayout:
    """Where each user's tokens lie in a `(L, ...)` tensor: user b owns rows `offsets[b]:offsets[b + 1]`."""

    offsets: Tensor
    """`(B + 1,)` int32 or int64 on the device, from 0 to `total`."""

    max_seqlen: int
    """An upper bound of the users' lengths, best the longest one."""

    total: int
    """`L`."""

    total_scores: int | None = None
    """Elements of the users' scores, known on the host: `count_scores` of the lengths. `jagged` needs it."""

    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.offsets.dim() != 1 or self.offsets.numel() == 0 or self.offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"offsets are {self.offsets.dtype} of shape {tuple(self.offsets.shape)}: "
                "allowed are int32 and int64 of shape (B + 1,)"
            )
        if self.max_seqlen < 0 or self.total < 0 or self.total > self.num_users * self.max_seqlen:
            raise ValueError(
                f"{self.num_users} users of at most max_seqlen={self.max_seqlen} tokens "
                f"can't have total={self.total} tokens"
            )
        if self.total_scores is not None:
            least, most = self.total * row_pitch(1), self.total * row_pitch(self.max_seqlen)
            users = f"the lengths of users with {self.total} tokens, at most {self.max_seqlen} each"
            _check_total_scores(self.total_scores, least, most, users)

    @property
    def num_users(self) -> int:
        return self.offsets.numel() - 1

    @property
    def is_rectangular(self) -> bool:
        """Every user has exactly `max_seqlen` tokens, as far as host integers tell."""
        return self.total == self.num_users * self.max_seqlen

    def cached(self, kind: str, mask: MaskSpec, build: Callable[[], T]) -> T:
        """`build()`, made once per layout and mask: all layers of a step share it."""
        # Not the mask itself: torch.compile can't make one as a key. The key keeps `num_targets` alive, so that its
        # identity, by which tensors are told apart, can't be reused.
        key = (kind, mask.causal, mask.window, mask.num_targets)
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]


@dataclass(frozen=True, eq=False)
class CrossLayout:
    """Queries and keys of the same users, in tensors of their own: a query sees all keys of its user."""

    queries: JaggedLayout
    keys: JaggedLayout
    total_scores: int | None = None
    """Elements of the users' scores, known on the host: `count_scores` of the lengths. `jagged` needs it."""

    _cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.queries.num_users != self.keys.num_users:
            raise ValueError(
                f"the queries are of {self.queries.num_users} users, the keys of {self.keys.num_users}: they must be "
                "the same users"
            )
        if self.total_scores is not None:
            queries, keys = self.queries, self.keys
            by_query = queries.total * row_pitch(keys.max_seqlen)
            by_key = queries.max_seqlen * keys.total + queries.total * (ROW_MULTIPLE - 1)
            most = min(by_query, by_key // ROW_MULTIPLE * ROW_MULTIPLE)
            users = (
                f"{queries.total} queries and {keys.total} keys, of users with at most {queries.max_seqlen} and "
                f"{keys.max_seqlen}"
            )
            _check_total_scores(self.total_scores, 0, most, users)

    def cached(self, kind: str, build: Callable[[], T]) -> T:
        """`build()`, made once per layout: all layers of a step share it."""
        if kind not in self._cache:
            self._cache[kind] = build()
        return self._cache[kind]


@dataclass(frozen=True)
class Request:
    """The part of a call that decides whether a backend can serve it; all of it is known on the host."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    mask: MaskSpec
    dropout_p: float
    knows_scores: bool = True
    """The layout says how many scores there are (`count_scores`)."""


class AttentionBackend(ABC):
    """Softmax attention inside each user's tokens: `softmax(scale · q kᵀ + mask) v`.

    A backend that can't do what is asked raises `ValueError` and names those that can; it never becomes
    another one.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend can't run on `device`, in plain words; None when it can."""

    @abstractmethod
    def refuses(self, request: Request) -> str | None:
        """Why an available backend can't serve `request`, in plain words; None when it can."""

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        mask: MaskSpec,
        scale: float,
        dropout_p: float,
    ) -> Tensor:
        """Compute a checked, non-empty call."""

    @abstractmethod
    def attend_across(
        self, q: Tensor, k: Tensor, v: Tensor, layout: CrossLayout, scale: float, dropout_p: float
    ) -> Tensor:
        """Compute a checked, non-empty call of `cross`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        mask: MaskSpec,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Attention output `(L, H, D)`, in the dtype of `q` (under autocast, in autocast's dtype).

        Args:
            q, k, v: `(L, H, D)`, one dtype, on the device of `layout.offsets`.
            layout: which rows belong to which user.
            mask: who sees whom.
            scale: factor of the scores; None is `1 / sqrt(D)`.
            dropout_p: probability of dropping an attention weight; pass 0 in evaluation.

        Raises:
            ValueError: shapes, dtypes or devices that don't fit, or a request this backend can't serve.
        """
        q, k, v = _as_autocast_would(q, k, v)
        _check_tensors(q, k, v, layout, mask)
        mask = mask.simplified(layout)
        self._check_request(q, mask, dropout_p, layout.total_scores)
        if layout.total == 0:
            # No token on this rank. The sum keeps q, k and v in the graph, so that every projection gets a
            # (zero) gradient and DDP doesn't wait for it.
            return q + k + v
        return self.attend(q, k, v, layout, mask, 1.0 / math.sqrt(q.shape[2]) if scale is None else scale, dropout_p)

    def cross(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: CrossLayout,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Cross attention `(N, H, D)`: every query sees all keys of its user. Zero for users without keys.

        Args:
            q: `(N, H, D)`, on the device of the layout's offsets.
            k, v: `(L, H, D)`, in the dtype of q.
            layout: which rows belong to which user.
            scale, dropout_p: as for `__call__`.

        Raises:
            ValueError: as `__call__`.
        """
        q, k, v = _as_autocast_would(q, k, v)
        _check_cross_tensors(q, k, v, layout)
        self._check_request(q, MaskSpec(causal=False), dropout_p, layout.total_scores)
        if layout.queries.total == 0 or layout.keys.total == 0:
            # Zero, and q, k and v stay in the graph, so that DDP doesn't wait for gradients.
            return q * 0.0 + (k[:, :, :1].sum() + v[:, :, :1].sum()) * 0.0
        return self.attend_across(q, k, v, layout, 1.0 / math.sqrt(q.shape[2]) if scale is None else scale, dropout_p)

    def _check_request(self, q: Tensor, mask: MaskSpec, dropout_p: float, total_scores: int | None) -> None:
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p is {dropout_p}: allowed are values from 0 to below 1")
        request = Request(q.device, q.dtype, q.shape[2], mask, dropout_p, total_scores is not None)
        reason = self.unavailable(q.device) or self.refuses(request)
        if reason is not None:
            raise ValueError(f"attention backend '{self.name}' can't do this: {reason}. {_who_can(request)}")


BACKENDS: dict[str, AttentionBackend] = {}
"""Filled by `registry.py`, in the order in which messages name them."""


def usable_backends(request: Request) -> list[str]:
    """Names of the backends that can serve `request` on its device."""
    return [
        name for name, b in BACKENDS.items() if b.unavailable(request.device) is None and b.refuses(request) is None
    ]


def _who_can(request: Request) -> str:
    names = usable_backends(request)
    if not names:
        return "No backend can on this device"
    return "Backends that can on this device: " + ", ".join(names)


def _as_autocast_would(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as autocast does for `scaled_dot_product_attention`: every backend computes in the same dtype."""
    device_type = q.device.type
    if not torch.is_autocast_enabled(device_type) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device_type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, mask: MaskSpec) -> None:
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: "
            "they must be one and the same (L, H, D)"
        )
    if q.shape[0] != layout.total:
        raise ValueError(f"q has {q.shape[0]} tokens, the layout {layout.total}: they must be equal")
    _check_dtypes(q, k, v)
    devices = {q.device, k.device, v.device, layout.offsets.device}
    if mask.num_targets is not None:
        devices.add(mask.num_targets.device)
        if mask.num_targets.shape != (layout.num_users,):
            raise ValueError(f"num_targets has shape {tuple(mask.num_targets.shape)}: it must be ({layout.num_users},)")
    _check_devices(devices, "q, k, v, offsets and num_targets")


def _check_cross_tensors(q: Tensor, k: Tensor, v: Tensor, layout: CrossLayout) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: "
            "they must be (N, H, D) and twice (L, H, D)"
        )
    for name, x, side in (("q", q, layout.queries), ("k", k, layout.keys)):
        if x.shape[0] != side.total:
            raise ValueError(f"{name} has {x.shape[0]} tokens, its layout {side.total}: they must be equal")
    _check_dtypes(q, k, v)
    devices = {q.device, k.device, v.device, layout.queries.offsets.device, layout.keys.offsets.device}
    _check_devices(devices, "q, k, v and the offsets")


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: they must be the same")
    if not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}: allowed are floating-point dtypes")


def _check_devices(devices: set[torch.device], names: str) -> None:
    if len(devices) > 1:
        raise ValueError(f"{names} lie on {', '.join(sorted(map(str, devices)))}: they must be on one device")
