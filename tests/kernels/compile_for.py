"""Compile every kernel of some calls for a GPU that need not be there: `python -m tests.kernels.compile_for 9 0`.

Interpreting a kernel doesn't show what the compiler refuses. Here the operator runs as it would on a GPU of the given
compute capability, except that each launch ends when its kernel is compiled.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.attention.candidates import HOPPER_CONFIGS
from kernels.jagged import Schedule, launch, tile_lists
from kernels.jagged.score_layout import ScoreLayout
from kernels.jagged_concat import jagged_concat, jagged_last, jagged_split
from kernels.jagged_concat import op as concat_op
from kernels.jagged_elementwise import (
    jagged_dense_elementwise,
    jagged_jagged_elementwise,
    jagged_to_padded,
    op_padded,
    padded_to_jagged,
)
from kernels.jagged_elementwise import op as elementwise_op
from kernels.jagged_flash_attention import jagged_flash_attention, op, tuning
from kernels.jagged_flash_attention.hopper import items
from kernels.jagged_matmul import jagged_dense_bmm, jagged_jagged_bmm, jagged_scores, jagged_weighted_sum
from kernels.jagged_matmul import op as matmul_op
from kernels.jagged_pooling import jagged_pool
from kernels.jagged_pooling import op as pooling_op
from kernels.jagged_softmax import jagged_score_softmax, jagged_softmax
from kernels.jagged_softmax import op as softmax_op
from kernels.score_pitch import count_scores

LENGTHS = [5, 0, 70]
WAIT = "griddepcontrol.wait"
MARKS = (WAIT, "griddepcontrol.launch_dependents")


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -1  # where CPU tensors are

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(major: int, minor: int) -> list[CompiledKernel]:
    """Make launches compile only; the compiled kernels are collected in the result."""
    compiled: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    triton.runtime.driver.set_active(Driver(10 * major + minor))
    tuning._compute_capability = lambda device: (major, minor)  # type: ignore[assignment]
    launch._is_watched = lambda kernel: True  # no launch goes past Triton
    items._num_multiprocessors = lambda device: 132  # type: ignore[assignment]
    for other in (op, tile_lists, matmul_op, softmax_op, concat_op, elementwise_op, op_padded, pooling_op):
        other.require_triton = lambda device: None  # type: ignore[attr-defined]
    return compiled


def call(
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    max_seqlen: int = 70,
    group: int = 1,
    has_targets: bool = False,
    is_cross: bool = False,
    without_gradient: bool = False,
    **options: Any,
) -> None:
    """Forward and backward of one small batch; if asked for, also a forward that keeps nothing for a backward."""
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    total, num_users = sum(LENGTHS), len(LENGTHS)
    q = torch.zeros(total, 2 * group, head_dim, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(total, 2, head_dim, dtype=dtype, requires_grad=True) for _ in range(2))
    if has_targets:
        options["num_targets"] = torch.ones(num_users, dtype=torch.int64).clamp(max=offsets.diff())
    if is_cross:
        options |= {"causal": False, "key_offsets": offsets, "max_key_seqlen": max_seqlen}
    out = jagged_flash_attention(q, k, v, offsets, max_seqlen, **options)
    out.backward(torch.ones_like(out))
    if without_gradient:
        with torch.no_grad():
            jagged_flash_attention(q, k, v, offsets, max_seqlen, **options)


def call_unfused(dtype: torch.dtype, head_dim: int) -> None:
    """Forward and backward of every operator on jagged operands but fused attention."""
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    total, num_users = sum(LENGTHS), len(LENGTHS)
    targets = torch.ones(num_users, dtype=torch.int64).clamp(max=offsets.diff())
    schedule = Schedule(offsets, total, max(LENGTHS), num_targets=targets)
    layout = ScoreLayout(schedule, count_scores(LENGTHS))
    q, k, v = (torch.zeros(total, 2, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
    w = torch.zeros(num_users, 2, head_dim, 100, dtype=dtype, requires_grad=True)
    weights = jagged_score_softmax(jagged_scores(q, k, layout), layout, causal=True, window=9)
    out = jagged_weighted_sum(weights, v, layout).flatten(1)
    jagged_softmax(out, schedule).sum().backward()
    (jagged_dense_bmm(q, w, schedule).sum() + jagged_jagged_bmm(q, k, schedule).sum()).backward()
    x, y = q.flatten(1), k.flatten(1)
    dense = torch.zeros(num_users, 2 * head_dim, dtype=dtype, requires_grad=True)
    seed = torch.zeros(1, dtype=torch.int64)
    z = jagged_dense_elementwise(x, dense, schedule, op="mul", activation="gelu", dropout_p=0.1, seed=seed)
    z, _ = jagged_jagged_elementwise(z, y, schedule, schedule, lengths="longer", total=total)
    z = padded_to_jagged(jagged_to_padded(z, schedule), schedule)
    first, _ = jagged_split(jagged_concat(z, y, schedule, schedule), schedule, schedule)
    last, _ = jagged_last(first, schedule, 9, sum(min(n, 9) for n in LENGTHS))
    pooled = [jagged_pool(first, schedule, mode).sum() for mode in ("mean", "max")]
    (last.sum() + pooled[0] + pooled[1]).backward()
    for longest in (1000, 8192):
        for_long = Schedule(offsets, total, longest)
        jagged_jagged_bmm(q, k, for_long)
        long_layout = ScoreLayout(for_long, layout.total)
        scores = torch.zeros(2, layout.total, dtype=dtype, requires_grad=True)
        jagged_score_softmax(scores, long_layout, causal=True).sum().backward()
    jagged_softmax(q.flatten(1), for_long).sum().backward()
    jagged_pool(q.flatten(1), for_long, "mean")


def use_hopper_kernels(number: int) -> None:
    """From now on all kernels written for Hopper, in the configuration of that number, whatever the table says."""

    def choose(head_dim: int, *args: Any) -> tuning.Tiles:
        tables = {kernel: table[head_dim] for kernel, table in HOPPER_CONFIGS.items() if head_dim in table}
        chosen = {kernel: configs[min(number, len(configs) - 1)] for kernel, configs in tables.items()}
        return replace(tuning.choose_tiles(head_dim, *args), **chosen)

    op.choose_tiles = choose


def described(kernel: CompiledKernel) -> list[str]:
    """Its name, and its name with what a test asks for."""
    name, ptx = kernel.metadata.name, kernel.asm["ptx"]
    has = {mark: mark in ptx for mark in MARKS}
    has["launch_pdl"] = kernel.metadata.launch_pdl
    has["on tensor cores"] = "mma" in ptx
    has[f"{ptx.count('vote.sync.any')} votes"] = "vote.sync.any" in ptx
    return [name, *[f"{name} {mark}" for mark in has if has[mark]]]


def main() -> None:
    compiled = pretend(int(sys.argv[1]), int(sys.argv[2]))
    call(64, has_targets=True, without_gradient=True)
    call(64, causal=False, has_targets=True, window=9, dropout_p=0.1, group=2)
    call(64, max_seqlen=2048)
    call(64, max_seqlen=2048, causal=False)
    call(64, max_seqlen=8192, has_targets=True)
    call(32, has_targets=True, window=9)
    call(32, causal=False, group=2)
    call(48, is_cross=True, dropout_p=0.1)
    call(128, has_targets=True)
    call(128, max_seqlen=2048, has_targets=True, without_gradient=True)
    call(128, torch.float16, max_seqlen=2048, causal=False, group=2)
    call(256, has_targets=True, without_gradient=True)
    call(64, torch.float32, has_targets=True)
    call(32, torch.float32, precision="tf32")
    call_unfused(torch.bfloat16, 64)
    call_unfused(torch.float32, 24)
    if sys.argv[1] == "9":
        for number in range(max(len(configs) for table in HOPPER_CONFIGS.values() for configs in table.values())):
            use_hopper_kernels(number)
            for head_dim in (32, 64, 128):
                call(head_dim, has_targets=True)
                call(head_dim, torch.float16, causal=False, group=2)
    counts = Counter(line for kernel in compiled for line in described(kernel))
    print("\n".join(f"{counts[line]} {line}" for line in sorted(counts)))


if __name__ == "__main__":
    main()
