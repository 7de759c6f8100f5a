"""One kernel at a time, on the batch of a setting: its results, whether they are right, and how long it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.accuracy import LEAST_ROW_SIZE, row_limit
from benchmarks.attention.calls import copies_past_cache
from benchmarks.attention.candidates import Candidate
from benchmarks.attention.shapes import Batch, Shape
from benchmarks.timing import CALLS_PER_REPLAY, capture, ms_in_turns
from kernels.jagged.schedule import ListSpec, Schedule
from kernels.jagged_flash_attention.backward import launch_backward
from kernels.jagged_flash_attention.call import Call
from kernels.jagged_flash_attention.forward import empty_lse, launch_forward
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.hopper.one_group.forward import launch_one_group_forward
from kernels.jagged_flash_attention.hopper.two_groups.config import TwoGroupForwardConfig
from kernels.jagged_flash_attention.hopper.two_groups.forward import launch_two_group_forward
from kernels.jagged_flash_attention.tuning import Tile, Tiles

HEADS = 4
TOKENS = 65_536  # of a batch, about: several times as many tiles as run at once
MEAN_PART = 4  # the mean length is this part of max_seqlen

REPLAYS = 9


@dataclass(frozen=True)
class Setting:
    """What tiles are chosen by."""

    dtype: torch.dtype
    head_dim: int
    """Padded: a power of two."""

    max_seqlen: int
    causal: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        mask = "causal" if self.causal else "full"
        return f"{dtype}, head dim {self.head_dim}, up to {self.max_seqlen} tokens, {mask}"


class Bench:
    """The batch of a setting, and every kernel on it.

    Args:
        setting: see there.
        table: the tiles that results are compared with, and that do whatever is not being tried.
        device: where.
        tokens: of the batch, about.
    """

    def __init__(self, setting: Setting, table: Tiles, device: torch.device, tokens: int = TOKENS) -> None:
        mean = min(max(setting.max_seqlen // MEAN_PART, 1), tokens)
        shape = Shape(
            "tune",
            users=max(tokens // mean, 1),
            heads=HEADS,
            head_dim=setting.head_dim,
            mean=mean,
            max=setting.max_seqlen,
            causal=setting.causal,
        )
        self.batch = Batch(shape, setting.dtype, device)
        # What was written for one architecture is tried against what serves all.
        self.portable = dataclasses.replace(table, hopper_forward=None, hopper_dq=None, hopper_dkv=None)
        self.call = Call(setting.causal, None, False, self.batch.scale)
        self.schedule = Schedule(self.batch.offsets, self.batch.total, setting.max_seqlen)
        inputs = self.batch.make_inputs(copies_past_cache(self.batch))
        self.inputs = [(one.q.detach(), one.k.detach(), one.v.detach(), one.dout) for one in inputs]
        self.forward_results = [self.run_forward(table.forward, i) for i in range(len(inputs))]

    def run(self, kernel: str, candidate: Candidate, short: int, i: int) -> Sequence[Tensor]:
        """One kernel alone, on the i-th set of inputs; what others would have computed is left unwritten.

        Args:
            kernel: of `candidates.KERNELS`.
            candidate: its tile or configuration.
            short: users of at most so many tokens are not for `dq` and `dkv`.
            i: wraps around.
        """
        i %= len(self.inputs)
        if kernel == "hopper_forward":
            assert isinstance(candidate, TwoGroupForwardConfig | OneGroupConfig)
            (tiles,) = self.schedule.query_tiles([candidate.block], self.call.causal)
            lse = empty_lse(self.inputs[i][0])
            if isinstance(candidate, OneGroupConfig):
                return launch_one_group_forward(*self.inputs[i][:3], tiles, self.call, candidate, lse), lse
            return launch_two_group_forward(*self.inputs[i][:3], tiles, self.call, candidate, lse), lse
        if kernel == "forward":
            assert isinstance(candidate, Tile)
            return self.run_forward(candidate, i)
        changed = replace_tile(self.portable, kernel, candidate)
        lists = self._backward_lists(changed, short)
        own = kernel.removeprefix("hopper_")
        return self._run_backward(changed, {name: x if name == own else x[:0] for name, x in lists.items()}, i)

    def run_forward(self, tile: Tile, i: int) -> tuple[Tensor, Tensor]:
        q, k, v, _ = self.inputs[i]
        (tiles,) = self.schedule.query_tiles([tile.block_m], self.call.causal)
        lse = empty_lse(q)
        return launch_forward(q, k, v, tiles, self.call, tile, lse), lse

    def disagreement(self, kernel: str, candidate: Candidate) -> float:
        """How far results with a candidate are from those with the table's tiles; above 1 one of them is wrong."""
        if kernel in ("forward", "hopper_forward"):
            return disagreement(self.run(kernel, candidate, 0, 0), self.forward_results[0], self.batch.dtype)
        with_candidate = self._gradients(replace_tile(self.portable, kernel, candidate))
        return disagreement(with_candidate, self._table_gradients, self.batch.dtype)

    def short_fraction(self, at_most: int) -> float:
        """Of all tokens, those of users of at most so many."""
        return sum(length for length in self.batch.lengths if length <= at_most) / self.batch.total

    @cached_property
    def _table_gradients(self) -> Sequence[Tensor]:
        return self._gradients(self.portable)

    def _gradients(self, tiles: Tiles) -> Sequence[Tensor]:
        """All of them, of the first inputs."""
        short = 0 if tiles.short is None else tiles.short.block_m
        return self._run_backward(tiles, self._backward_lists(tiles, short), 0)

    def _backward_lists(self, tiles: Tiles, short: int) -> dict[str, Tensor]:
        causal = self.call.causal
        dq_block = tiles.hopper_dq.block if tiles.hopper_dq else tiles.dq.block_m
        dkv_block = tiles.hopper_dkv.block if tiles.hopper_dkv else tiles.dkv.block_n
        (queries,) = self.schedule.query_tiles([dq_block], causal, short)
        (keys,) = self.schedule.key_tiles([dkv_block], causal, short)
        users = queries[:0]
        if tiles.short is not None:
            block = tiles.short.block_m
            (users,) = self.schedule.lists([ListSpec(False, block, causal, 0, block)])
        return {"dq": queries, "dkv": keys, "short": users}

    def _run_backward(self, tiles: Tiles, lists: dict[str, Tensor], i: int) -> Sequence[Tensor]:
        q, k, v, dout = self.inputs[i]
        out, lse = self.forward_results[i]
        for_hopper = bool(tiles.hopper_dq or tiles.hopper_dkv)
        return launch_backward(
            dout, q, k, v, out, lse, lists["dq"], lists["dkv"], lists["short"], self.call, tiles, for_hopper
        )


def replace_tile(tiles: Tiles, kernel: str, candidate: Candidate | None) -> Tiles:
    """The same but for one kernel."""
    changed: dict[str, Any] = {kernel: candidate}
    return dataclasses.replace(tiles, **changed)


def disagreement(results: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The row that differs most, relative to what rounding explains: above 1 one of the two is wrong."""
    limit = row_limit(dtype)
    worst = 0.0
    for actual, other in zip(results, expected, strict=True):
        actual, other = (x.float().flatten(1) for x in (actual, other))  # a row is a token; of (H, L), a head
        if not bool(torch.isfinite(actual).all()):
            return float("inf")
        size = other.square().mean(dim=1).sqrt().clamp_min(LEAST_ROW_SIZE * float(other.square().mean().sqrt()))
        error = (actual - other).square().mean(dim=1).sqrt()
        worst = max(worst, float((error / size.clamp_min(torch.finfo(torch.float32).tiny)).max()) / limit)
    return worst


def times_us(functions: Sequence[Callable[[int], object]]) -> list[float]:
    """Microseconds of a call of each on the device: medians of replays, in turns, of CUDA graphs of calls 0, 1, ..."""
    pool = torch.cuda.graph_pool_handle()
    times = []
    for ms in ms_in_turns([capture(function, pool) for function in functions], REPLAYS):
        if isinstance(ms, Exception):
            raise ms
        times.append(1e3 * ms / CALLS_PER_REPLAY)
    return times
