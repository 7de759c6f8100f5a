"""The compiler takes every kernel, for GPUs that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("capability", "has_hopper_forward"), [((9, 0), True), ((8, 0), False)], ids=["hopper", "ampere"]
)
def test_kernels_compile(capability: tuple[int, int], has_hopper_forward: bool) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for", *map(str, capability)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for name in ("jagged_flash_attention_forward_kernel", "dq_kernel", "dkv_kernel", "jagged_tile_lists_kernel"):
        assert f" {name}\n" in run.stdout
    assert ("hopper_forward_kernel" in run.stdout) == has_hopper_forward
