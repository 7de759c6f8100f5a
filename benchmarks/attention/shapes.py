"""What is measured: shapes, the batches made of them, and the work and traffic that a batch can't do without.

Letters: `L` tokens of all users, `H` query heads, `D` head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from recsys.checks import at_least

LENGTHS_SEED = 0
INPUTS_SEED = 1
LOGNORMAL_SIGMA = 1.0

# Measured on an NVIDIA H200: what every figure is compared with.
COPY_BYTES_PER_SECOND = 4.26e12  # a copy kernel, bytes read and written
MATMUL_FLOP_PER_SECOND = 798e12  # a bfloat16 matmul of 8192³ on random data
ROOF_GPU = "H200"

FORWARD_FLOP_PER_PAIR = 4  # q·k and p·v, a multiplication and an addition each; times head dim and heads
BACKWARD_FLOP_PER_PAIR = 10  # q·k again, dout·v, and the products for dq, dk and dv


@dataclass(frozen=True)
class Shape:
    """A kind of batch.

    Lengths are lognormal (sigma 1) with mean `mean`, cut to 1 ... `max`; with `mean` equal to `max` all users have
    that length. They are the same in every run.
    """

    name: str
    users: int
    heads: int
    """Heads of the queries."""

    head_dim: int
    mean: int
    """Tokens per user before the cut to `max`, candidates included."""

    max: int
    causal: bool = True
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as of queries."""

    window: int = 0
    """How many tokens a history token sees; 0: all."""

    targets: int = 0
    """Candidates at the end of each user; fewer where no history would be left."""

    def __post_init__(self) -> None:
        for name in ("users", "heads", "head_dim", "mean", "max"):
            at_least(name, getattr(self, name), 1)
        for name in ("kv_heads", "window", "targets"):
            at_least(name, getattr(self, name), 0)
        if self.mean > self.max:
            raise ValueError(f"shape {self.name}: mean={self.mean} is greater than max={self.max}")
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.heads % self.kv_heads != 0:
            raise ValueError(f"shape {self.name}: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")

    def lengths(self) -> list[int]:
        """Tokens of each user."""
        if self.mean == self.max:
            return [self.max] * self.users
        normal = torch.randn(self.users, generator=torch.Generator().manual_seed(LENGTHS_SEED), dtype=torch.float64)
        # The mean of a lognormal distribution is exp(mu + sigma² / 2).
        lengths = (math.log(self.mean) - LOGNORMAL_SIGMA**2 / 2 + LOGNORMAL_SIGMA * normal).exp()
        return lengths.round().long().clamp(1, self.max).tolist()


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S1", users=512, heads=4, head_dim=64, mean=100, max=512),
        Shape("S2", users=1024, heads=4, head_dim=32, mean=100, max=512),
        Shape("S3", users=2048, heads=2, head_dim=32, mean=50, max=256, causal=False),
        Shape("M1", users=128, heads=4, head_dim=64, mean=512, max=2048),
        Shape("M2", users=128, heads=4, head_dim=64, mean=512, max=2048, causal=False),
        Shape("L1", users=32, heads=4, head_dim=64, mean=2048, max=8192),
        Shape("L2", users=32, heads=4, head_dim=128, mean=2048, max=8192),
        Shape("L3", users=16, heads=8, head_dim=128, mean=4096, max=4096),
        Shape("tiny", users=6, heads=2, head_dim=32, mean=20, max=48),
    )
}
DEFAULT_SHAPES = {"cuda": [name for name in SHAPES if name != "tiny"], "cpu": ["tiny"]}


def parse_shape(text: str) -> Shape:
    """A `Shape` from `name=X,users=64,heads=4,head_dim=64,mean=300,max=2048,causal=true`.

    Raises:
        ValueError: on an unknown or missing field, or a value that doesn't fit.
    """
    types = {field.name: str(field.type) for field in fields(Shape)}
    values: dict[str, object] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if key not in types or not equals:
            raise ValueError(f"'{part.strip()}' in shape '{text}': expected key=value, keys are {', '.join(types)}")
        if key in values:
            raise ValueError(f"shape '{text}' has {key} twice")
        values[key] = _parse_value(key, value, types[key])
    missing = [name for name in ("name", "users", "heads", "head_dim", "mean", "max") if name not in values]
    if missing:
        raise ValueError(f"shape '{text}' lacks {', '.join(missing)}")
    return Shape(**values)  # type: ignore[arg-type]


def _parse_value(key: str, value: str, kind: str) -> object:
    if kind == "str":
        return value
    if kind == "bool":
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{key}={value}: allowed are true and false")
        return value.lower() == "true"
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{key}={value}: it must be an integer") from None


@dataclass(frozen=True)
class Inputs:
    """One set of tensors of a call; q, k and v require gradients."""

    q: Tensor
    """`(L, H, D)`"""

    k: Tensor
    """`(L, KH, D)`"""

    v: Tensor
    dout: Tensor
    """The gradient of the output, like q."""


@dataclass(frozen=True)
class Batch:
    """A shape on a device: who owns which rows. The inputs come apart, because there are several sets of them."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each user, candidates included."""
        return self.shape.lengths()

    @cached_property
    def targets(self) -> list[int]:
        """Candidates of each user."""
        return [min(self.shape.targets, length - 1) for length in self.lengths]

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @cached_property
    def bounds(self) -> list[int]:
        """First row of each user, and `L`, on the host."""
        bounds = [0]
        for length in self.lengths:
            bounds.append(bounds[-1] + length)
        return bounds

    @cached_property
    def offsets(self) -> Tensor:
        """`bounds` on the device, int32."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)

    @cached_property
    def num_targets(self) -> Tensor | None:
        """`(B,)` int32 on the device; None where the shape has no candidates."""
        if self.shape.targets == 0:
            return None
        return torch.tensor(self.targets, dtype=torch.int32, device=self.device)

    @property
    def window(self) -> int | None:
        return self.shape.window or None

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    def make_inputs(self, copies: int) -> list[Inputs]:
        """Standard normal tensors, the same in every run."""
        generator = torch.Generator(self.device).manual_seed(INPUTS_SEED)
        shape = self.shape

        def normal(heads: int) -> Tensor:
            size = (self.total, heads, shape.head_dim)
            return torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)

        return [
            Inputs(
                q=normal(shape.heads).requires_grad_(),
                k=normal(shape.kv_heads).requires_grad_(),
                v=normal(shape.kv_heads).requires_grad_(),
                dout=normal(shape.heads),
            )
            for _ in range(copies)
        ]


def visible_pairs(history: int, targets: int, causal: bool, window: int) -> int:
    """How many (query, key) pairs of one user the mask shows; `window` 0 is none.

    History token i sees `j <= i` (causal) and `|i - j| < window` among the history; a candidate sees the whole
    history and itself.
    """
    reach = min(window or history, history)
    # Keys behind, itself included: 1, 2, ..., reach, and then reach for every further token.
    behind = reach * (reach + 1) // 2 + (history - reach) * reach
    among_history = behind if causal else 2 * behind - history
    return among_history + targets * (history + 1)


@dataclass(frozen=True)
class Work:
    """What a call can't do without: real tokens and visible pairs only."""

    flop: int
    """Multiplications and additions of the matrix products."""

    num_bytes: int
    """Every input read once and every output written once."""

    @property
    def floor_ms(self) -> float:
        """Milliseconds below which no kernel can be on an H200."""
        return 1e3 * max(self.num_bytes / COPY_BYTES_PER_SECOND, self.flop / MATMUL_FLOP_PER_SECOND)


def work_of(batch: Batch, mode: str) -> Work:
    """The work of `forward` or `forward_backward`.

    Forward reads q, k, v and writes out; backward reads those four and dout, and writes dq, dk and dv.
    """
    shape = batch.shape
    pairs = sum(
        visible_pairs(length - targets, targets, shape.causal, shape.window)
        for length, targets in zip(batch.lengths, batch.targets, strict=True)
    )
    of_queries = batch.total * shape.heads * shape.head_dim * batch.dtype.itemsize
    of_keys = batch.total * shape.kv_heads * shape.head_dim * batch.dtype.itemsize
    flop = FORWARD_FLOP_PER_PAIR * pairs * shape.heads * shape.head_dim
    num_bytes = 2 * of_queries + 2 * of_keys
    if mode == "forward_backward":
        flop += BACKWARD_FLOP_PER_PAIR * pairs * shape.heads * shape.head_dim
        num_bytes += (3 * of_queries + 2 * of_keys) + (of_queries + 2 * of_keys)
    return Work(flop, num_bytes)
