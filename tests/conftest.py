"""What every test shares: the Triton interpreter on a machine without CUDA, devices, and poisoned memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share few cores

import pytest
import torch

# `@triton.jit` looks at this variable when it decorates, and so do Triton's own `tl.sum` and friends when
# triton is imported: it has to be set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
CPU_AND_CUDA = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has no devices for."""
    num_gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("multi_gpu") and num_gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
        elif item.get_closest_marker("gpu") and num_gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=CPU_AND_CUDA)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The test runs once on the CPU and, where there is one, once on a GPU (marked `gpu`)."""
    return torch.device(request.param)


@pytest.fixture(params=CPU_AND_CUDA)
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Like `device`, for tests of Triton kernels: the CPU counts only where Triton interprets."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("Triton compiles for CUDA here; set TRITON_INTERPRET=1 to interpret on the CPU")
    return torch.device(request.param)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh floating-point memory with NaN, so that a row that nobody writes can't pass for zero."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
