"""Random jagged batches through forward and backward of jagged flash attention, for as long as it is given.

    python -m benchmarks.attention.soak --batches 10000 --seconds 60
    python -m benchmarks.attention.soak --first 1234 --batches 1        # one batch again
    TRITON_INTERPRET=1 python -m benchmarks.attention.soak --batches 4  # without a GPU, small

Of every batch: all results are finite, though memory that nobody wrote is NaN and so is what lies around the inputs;
and a second run gives the same bits. Of every n-th one, some users are compared with float32 attention. Batches are
drawn from a few kinds (head dim, mask, dtype, ...), because compiling kernels takes longer than running them.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.accuracy import LEAST_ROW_SIZE, RESULTS, row_limit
from benchmarks.poison import poisoned_memory
from kernels.jagged import unavailable_reason
from kernels.jagged_flash_attention import jagged_flash_attention, reference_attention

COMPARED_USERS = 4
GUARD_ROWS = 64  # of NaN, before and after the rows of q, k, v and dout
HEAD_DIMS = (16, 24, 32, 40, 64, 64, 80, 128, 128, 256)
# Of a user, at most; by device. Tiles depend on it, so one kind of batch keeps to one of them.
LONGEST = {"cuda": (60, 300, 1000, 2100), "cpu": (40,)}
MOST_TOKENS = {"cuda": 40_000, "cpu": 80}
MOST_USERS = {"cuda": 300, "cpu": 5}

# Where a query sees few keys its dq may be zero but for the rounding of a sum that cancels, and so may what it gives to
# dk. So errors of rows that see or are seen by fewer than so many are judged as if rows were at least of this size.
FEW_KEYS = 64
CANCELLED_SIZE = 0.25


@dataclass(frozen=True)
class Kind:
    """What kernels are compiled for: all batches of a kind share it."""

    head_dim: int
    key_heads: int
    group: int
    """Query heads per key head."""

    dtype: torch.dtype
    longest: int
    causal: bool
    has_window: bool
    has_targets: bool
    dropout_p: float
    is_cross: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        mask = "cross" if self.is_cross else "causal" if self.causal else "full"
        text = f"{dtype}, head dim {self.head_dim}, {self.key_heads}x{self.group} heads, to {self.longest}, {mask}"
        text += (", window" if self.has_window else "") + (", candidates" if self.has_targets else "")
        return text + (f", dropout {self.dropout_p}" if self.dropout_p else "")


def draw_kind(rng: random.Random, device: torch.device) -> Kind:
    """A random kind; on a CPU one that the interpreter does quickly."""
    is_cpu = device.type == "cpu"
    is_cross = rng.random() < 0.15
    return Kind(
        head_dim=rng.choice((16, 24) if is_cpu else HEAD_DIMS),
        key_heads=1 if is_cpu else rng.choice((1, 2)),
        group=rng.choice((1, 1, 2, 3)),
        dtype=torch.float32 if is_cpu else rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
        longest=rng.choice(LONGEST[device.type]),
        causal=not is_cross and rng.random() < 0.7,
        has_window=not is_cross and rng.random() < 0.25,
        has_targets=not is_cross and rng.random() < 0.5,
        dropout_p=rng.choice((0.0, 0.0, 0.0, 0.3)),
        is_cross=is_cross,
    )


@dataclass
class Case:
    """One batch: tensors and options of a call."""

    kind: Kind
    lengths: list[int]
    key_lengths: list[int]
    window: int | None
    tensors: list[Tensor]
    """q, k, v and dout; views of larger ones that are NaN around them."""

    offsets: Tensor
    options: dict[str, Any] = field(default_factory=dict)


def draw_case(kind: Kind, rng: random.Random, device: torch.device) -> Case:
    """A random batch of a kind."""
    lengths = _draw_lengths(kind, rng, device)
    key_lengths = _draw_lengths(kind, rng, device, len(lengths)) if kind.is_cross else lengths
    generator = torch.Generator(device).manual_seed(rng.getrandbits(62))
    heads = kind.key_heads * kind.group
    shapes = [(sum(lengths), heads), (sum(key_lengths), kind.key_heads)]
    tensors = []
    for rows, num_heads in (shapes[0], shapes[1], shapes[1], shapes[0]):
        around = torch.full(
            (rows + 2 * GUARD_ROWS, num_heads, kind.head_dim), float("nan"), dtype=kind.dtype, device=device
        )
        inner = around[GUARD_ROWS : GUARD_ROWS + rows]
        inner.copy_(torch.randn(inner.shape, generator=generator, dtype=torch.float32, device=device))
        tensors.append(inner)
    window = rng.choice((1, 7, 63, 64, 65, 128, rng.randint(1, kind.longest))) if kind.has_window else None
    if window is not None:
        window = min(window, kind.longest - 1)  # a wider one hides nothing, and is another kind of batch
    case = Case(kind, lengths, key_lengths, window, tensors, _offsets(lengths, device))
    case.options = {"causal": kind.causal, "window": window}
    if kind.has_targets:
        dealt = [rng.choice((0, min(1, n), min(20, n), rng.randint(0, n), n)) for n in lengths]
        case.options["num_targets"] = torch.tensor(dealt, dtype=torch.int64, device=device)
    if kind.is_cross:
        case.options |= {"key_offsets": _offsets(key_lengths, device), "max_key_seqlen": kind.longest}
    if kind.dropout_p > 0.0:
        seed = torch.tensor([rng.getrandbits(62)], device=device)
        case.options |= {"dropout_p": kind.dropout_p, "seed": seed}
    return case


def _draw_lengths(kind: Kind, rng: random.Random, device: torch.device, num_users: int | None = None) -> list[int]:
    """Of users: empty, single, at the edges of tiles, any length, the longest."""
    most = num_users or rng.randint(1, MOST_USERS[device.type])
    lengths: list[int] = []
    for _ in range(most):
        edge = rng.choice((16, 32, 64, 128, 256)) + rng.randint(-1, 1)
        length = rng.choice((0, 1, edge, rng.randint(0, kind.longest), rng.randint(0, kind.longest), kind.longest))
        length = min(length, kind.longest)
        if sum(lengths) + length > MOST_TOKENS[device.type]:
            length = 0
        lengths.append(length)
    return lengths


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device)


def run_case(case: Case) -> list[Tensor]:
    """out, dq, dk and dv of the kernels."""
    *qkv, dout = case.tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
    q, k, v = leaves
    with poisoned_memory():
        out = jagged_flash_attention(q, k, v, case.offsets, case.kind.longest, **case.options)
        gradients = torch.autograd.grad(out, leaves, dout)
    return [out.detach(), *gradients]


def find_faults(case: Case) -> list[str]:
    """What is wrong without a reference: values that are not finite, bits that differ in a second run."""
    results, again = run_case(case), run_case(case)
    faults = []
    for name, first, second in zip(RESULTS, results, again, strict=True):
        not_finite = int((~torch.isfinite(first)).sum())
        if not_finite:
            faults.append(f"{name} has {not_finite} of {first.numel()} values that are not finite")
        elif not torch.equal(first, second):
            faults.append(f"{name} differs in {int((first != second).sum())} of {first.numel()} values when run again")
    return faults


def greatest_error(case: Case, users: Sequence[int]) -> tuple[float, str]:
    """Of these users, relative to what rounding explains: above 1 something is wrong. And where that is."""
    results = run_case(case)
    kind = case.kind
    limit = row_limit(kind.dtype)
    worst, where = 0.0, "nowhere"
    for user in users:
        own, keys = _rows_of(case.lengths, user), _rows_of(case.key_lengths, user)
        for name, actual, exact in zip(RESULTS, results, _reference(case, user), strict=True):
            rows = keys if name in ("dk", "dv") else own
            if exact[rows].numel() == 0:
                continue
            error = (actual[rows].float() - exact[rows]).square().mean(dim=(1, 2)).sqrt()
            size = exact[rows].square().mean(dim=(1, 2)).sqrt()
            size = size.clamp_min(LEAST_ROW_SIZE * float(size.square().mean().sqrt()))
            if name in ("dq", "dk"):
                cancelled = size[: _rows_with_few_keys(case, user)]
                cancelled.clamp_min_(CANCELLED_SIZE * _growth_under_dropout(case, user, name))
            relative = float((error / size.clamp_min(torch.finfo(torch.float32).tiny)).max()) / limit
            if not relative <= worst:  # NaN is worse
                worst, where = relative, f"{name} of user {user}, {case.lengths[user]} tokens"
    return worst, where


def _rows_with_few_keys(case: Case, user: int) -> int | None:
    """How many rows, from the user's first, have few keys to look at; None: all of them."""
    if case.kind.dropout_p > 0.0 or case.window is not None or _history(case, user) < FEW_KEYS:
        return None
    return FEW_KEYS if case.kind.causal else 0


def _growth_under_dropout(case: Case, user: int, name: str) -> float:
    """What cancels is larger under dropout, and in dk it adds up where a key has many queries."""
    if case.kind.dropout_p == 0.0:
        return 1.0
    queries_per_key = case.lengths[user] / max(_history(case, user), 1)
    return (max(queries_per_key, 1.0) ** 0.5 if name == "dk" else 1.0) / (1.0 - case.kind.dropout_p)


def _history(case: Case, user: int) -> int:
    """How many keys others may see."""
    targets = case.options.get("num_targets")
    return case.key_lengths[user] - (0 if targets is None else int(targets[user]))


def _rows_of(lengths: Sequence[int], user: int) -> slice:
    start = sum(lengths[:user])
    return slice(start, start + lengths[user])


def _reference(case: Case, user: int) -> list[Tensor]:
    """out, dq, dk and dv in float32; only the rows of this user mean something."""
    *qkv, dout = (x.detach().float() for x in case.tensors)
    leaves = [x.requires_grad_() for x in qkv]
    # With offsets that begin at the user's first row, rows keep their numbers, which dropout depends on.
    options = dict(case.options)
    for name, last in (("num_targets", 1), ("key_offsets", 2)):
        value = options.get(name)
        if isinstance(value, Tensor):
            options[name] = value[user : user + last]
    own = _rows_of(case.lengths, user)
    q, k, v = leaves
    out = reference_attention(q, k, v, case.offsets[user : user + 2], case.kind.longest, **options)
    gradients = torch.autograd.grad(out, leaves, dout[own])
    whole = torch.zeros_like(dout)
    whole[own] = out.detach()
    return [whole, *gradients]


@dataclass
class Summary:
    """What came out."""

    batches: int = 0
    tokens: int = 0
    compared: int = 0
    worst: float = 0.0
    """Greatest error of the compared users, relative to what is allowed."""

    faults: list[str] = field(default_factory=list)


def soak(options: argparse.Namespace, device: torch.device) -> Summary:
    """Run batches until their number or the time is up. Every batch follows from the seed and its own number."""
    drawn = (draw_kind(random.Random(f"{options.seed} kind {i}"), device) for i in range(options.kinds))
    kinds = list(dict.fromkeys(drawn))
    summary = Summary()
    start = time.perf_counter()
    compiling = 0.0  # seconds of the first batch of each kind, which don't count
    seen: set[Kind] = set()
    for number in range(options.first, options.first + options.batches):
        if time.perf_counter() - start - compiling > options.seconds:
            break
        kind = kinds[number % len(kinds)]
        rng = random.Random(f"{options.seed} batch {number}")
        begin = time.perf_counter()
        case = draw_case(kind, rng, device)
        faults = find_faults(case)
        if kind not in seen:
            seen.add(kind)
            compiling += time.perf_counter() - begin
            print(f"kind {len(seen)} of {len(kinds)}: {kind}, {time.perf_counter() - begin:.1f} s", flush=True)
        # Kinds take turns, so it is every n-th round that is compared, with the first.
        if not faults and (number // len(kinds)) % options.compare_every == 0:
            users = rng.sample(range(len(case.lengths)), min(COMPARED_USERS, len(case.lengths)))
            error, where = greatest_error(case, users)
            summary.compared += len(users)
            summary.worst = max(summary.worst, error)
            if not error <= 1.0:
                faults.append(f"the error is {error:.3g} times what rounding explains: {where}")
        for fault in faults:
            print(f"FAULT in batch {number}, {kind}: {fault}", flush=True)
            summary.faults.append(f"batch {number}: {fault}")
        summary.batches += 1
        summary.tokens += sum(case.lengths)
    return summary


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of the command line; a wrong one ends the program with a message that says what is allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention.soak", description="Random batches through jagged flash attention."
    )
    parser.add_argument("--batches", type=int, default=10_000, help="at most so many")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most so long, compiling apart")
    parser.add_argument("--kinds", type=int, default=16, help="of batches; each has its kernels to compile")
    parser.add_argument("--compare-every", type=int, default=10, help="rounds through all kinds between comparisons")
    parser.add_argument("--first", type=int, default=0, help="number of the first batch")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for name in ("batches", "kinds", "compare_every"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}: allowed are values >= 1")
    if given.first < 0 or not given.seconds > 0.0:
        parser.error("--first must be at least 0 and --seconds greater than 0")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit code 1 if something was found."""
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reason = unavailable_reason(device)
    if reason is not None:
        sys.exit(f"benchmarks.attention.soak: {reason}")
    start = time.perf_counter()
    summary = soak(options, device)
    print(
        f"{summary.batches} batches, {summary.tokens:,} tokens in {time.perf_counter() - start:.0f} s; "
        f"{summary.compared} users compared, the greatest error {summary.worst:.2g} of what is allowed; "
        f"{len(summary.faults)} faults"
    )
    sys.exit(1 if summary.faults else 0)


if __name__ == "__main__":
    main()
