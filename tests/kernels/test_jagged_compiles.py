"""The compiler takes every kernel, for GPUs that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PORTABLE = ("jagged_flash_attention_forward_kernel", "dq_kernel", "dkv_kernel", "jagged_tile_lists_kernel")
FOR_HOPPER = [f"hopper_{kind}{kernel}_kernel" for kind in ("", "persistent_") for kernel in ("forward", "dq", "dkv")]


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
