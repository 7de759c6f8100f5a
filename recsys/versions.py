"""What a figure was measured with."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = {
    "torch": ("torch",),
    "torchrec": ("torchrec",),
    "fbgemm": ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm_gpu"),
    "triton": ("triton",),
    "torchmetrics": ("torchmetrics",),
    "hydra": ("hydra-core",),
}


def package_versions() -> dict[str, str | None]:
    """Installed version by short name; `None` where the package is missing."""
    return {name: _first_version(distributions) for name, distributions in _PACKAGES.items()}


def environment() -> dict[str, str | None]:
    """Versions, Python, CUDA, device and git commit, for records of a run."""
    return {
        **package_versions(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Short commit of the project's checkout, with `-dirty` for uncommitted changes.

    Outside a checkout (a container, a copied tree) it is the environment variable `GIT_COMMIT`, or `None`.
    """
    root = Path(__file__).resolve().parent.parent
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT")


def _first_version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
