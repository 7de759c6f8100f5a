"""The compiler takes every kernel, for GPUs that need not be there; which of them begin before others end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LISTS = "jagged_tile_lists_kernel"
PORTABLE = (
    "jagged_flash_attention_forward_kernel",
    "dq_kernel",
    "dkv_kernel",
    LISTS,
    "jagged_scores_kernel",
    "jagged_weighted_sum_kernel",
    "jagged_dense_bmm_kernel",
    "jagged_jagged_bmm_kernel",
    "jagged_score_softmax_kernel",
    "jagged_score_softmax_backward_kernel",
    "jagged_softmax_kernel",
    "jagged_softmax_backward_kernel",
    "move_rows_kernel",
    "jagged_to_padded_kernel",
    "padded_to_jagged_kernel",
    "jagged_dense_elementwise_kernel",
    "jagged_dense_elementwise_backward_kernel",
    "jagged_jagged_bmm_parts_kernel",
    "partial_sums_kernel",
    "jagged_pair_kernel",
    "jagged_pool_kernel",
    "jagged_pool_backward_kernel",
)
PRODUCTS = [name for name in PORTABLE if "bmm" in name or name.endswith(("scores_kernel", "weighted_sum_kernel"))]
FOR_HOPPER = [
    f"hopper_{kind}_{kernel}_kernel" for kind in ("one_group", "two_group") for kernel in ("forward", "dq", "dkv")
]
FOLLOWING = [name for name in FOR_HOPPER if name.endswith("forward_kernel")]  # begin while lists are being made


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)], ids=["hopper", "ampere"])
def test_kernels_compile(capability: tuple[int, int]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for", *map(str, capability)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for name in PORTABLE:
        assert f" {name}\n" in run.stdout
    for name in FOR_HOPPER:
        assert (f" {name}\n" in run.stdout) == (capability == (9, 0)), name
    for name in PRODUCTS:
        assert f" {name} on tensor cores\n" in run.stdout, f"{name} multiplies 16-bit operands otherwise"
    counts = {line: int(count) for count, line in (x.split(" ", 1) for x in run.stdout.splitlines())}
    if capability < (9, 0):
        assert not [line for line in counts if "griddepcontrol" in line or "launch_pdl" in line]
        return
    assert counts[f"{LISTS} griddepcontrol.launch_dependents"] == counts[LISTS]
    for name in FOLLOWING:
        assert counts[f"{name} launch_pdl"] == counts[name]
        groups = 1 if "one_group" in name else 2
        assert counts[f"{name} {groups} votes"] == counts[name], "a warp would vote where it may be alone"
    for line, count in counts.items():
        if line.endswith(" launch_pdl"):
            assert counts.get(line.replace("launch_pdl", "griddepcontrol.wait")) == count, "it would not wait"
