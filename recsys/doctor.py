"""`python -m recsys.doctor`: can this machine run the project, and if not, why not?

Prints versions and whether they belong together, devices, and each attention backend. The exit code is 0 when the
project is usable here and 1 when something it can't do without is missing or broken.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

REQUIRED = (
    "torch",
    "triton",
    "fbgemm_gpu",
    "torchrec",
    "torchmetrics",
    "hydra",
    "omegaconf",
    "kernels",
    "data",
)
"""Modules that nothing works without, in an order in which the first failure is the cause of the later ones."""

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """Versions that belong together and that the project is tested with."""

    where: str
    torch: str
    fbgemm: str
    torchrec: str
    triton: str
    torchmetrics: tuple[str, ...]

    def mismatches(self, installed: Mapping[str, str | None]) -> list[str]:
        """What `installed` has otherwise, as `torch 2.12.0 (wanted 2.13.0)`."""
        wanted = {
            "torch": (self.torch,),
            "fbgemm": (self.fbgemm,),
            "torchrec": (self.torchrec,),
            "triton": (self.triton,),
            "torchmetrics": self.torchmetrics,
        }
        return [
            f"{name} {installed.get(name) or 'missing'} (wanted {' or '.join(versions)})"
            for name, versions in wanted.items()
            if _public(installed.get(name)) not in versions
        ]


ROWS = (
    Row("requirements/", "2.13.0", "1.8.0", "1.8.0", "3.7.1", ("1.0.3",)),
    Row("torch 2.11 hosts", "2.11.0", "1.6.0", "1.6.1", "3.6.0", ("1.0.3", "1.9.0")),
)


def nearest_row(installed: Mapping[str, str | None]) -> tuple[Row, list[str]]:
    """The tested row with the fewest mismatches, and those mismatches."""
    return min(((row, row.mismatches(installed)) for row in ROWS), key=lambda pair: len(pair[1]))


def _public(version: str | None) -> str | None:
    """`2.13.0` of `2.13.0+cpu`: the same release, built for something else."""
    return None if version is None else version.split("+")[0]


def failed_imports() -> dict[str, str]:
    """Modules of `REQUIRED` that can't be imported, and what Python says about it."""
    failures = {}
    for name in REQUIRED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a binary that doesn't fit raises OSError, RuntimeError or worse
            failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return failures


def report_versions() -> None:
    """Print the installed versions and how they fit together."""
    from recsys.versions import package_versions

    installed = package_versions()
    print("Versions")
    print(f"  python        {platform.python_version()}")
    for name, version in installed.items():
        print(f"  {name:<13} {version or 'missing'}")
    row, mismatches = nearest_row(installed)
    if not mismatches:
        print(f"  These belong together (as in: {row.where}).")
        return
    print(f"  WARNING: not a combination that is tested. Nearest ({row.where}) is")
    print(f"    torch {row.torch}, fbgemm {row.fbgemm}, torchrec {row.torchrec}, triton {row.triton}; here differ")
    for mismatch in mismatches:
        print(f"    {mismatch}")


def report_devices() -> list[str]:
    """Print devices and communication; the device types that can be used."""
    import psutil
    import torch
    import torch.distributed as dist

    print("Devices")
    memory = psutil.virtual_memory()
    print(
        f"  cpu      {psutil.cpu_count(logical=True)} cores, {memory.total // MIB} MiB ({memory.available // MIB} free)"
    )
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(num_gpus):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        print(f"  cuda:{index}   {properties.name}, {capability}, {total // MIB} MiB ({free // MIB} free)")
    if num_gpus == 0:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "the driver reports no GPU"
        print(f"  cuda     none: {why}")
    for name, available in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())):
        print(f"  {name}     {'available' if available else 'not in this build of torch'}")
    return ["cpu"] + (["cuda"] if num_gpus else [])


def report_backends(device_types: list[str]) -> bool:
    """Print each attention backend per device type; is there one for every device type?"""
    import torch

    from recsys.attention import backends

    all_served = True
    for device_type in device_types:
        print(f"Attention backends on {device_type}")
        reasons = {name: b.unavailable(torch.device(device_type)) for name, b in backends().items()}
        for name, reason in reasons.items():
            print(f"  {name:<13} {f'usable: {backends()[name].summary}' if reason is None else f'no: {reason}'}")
        all_served &= None in reasons.values()
    return all_served


def main() -> int:
    """Print the report; 0 when the project is usable on this machine, else 1."""
    failures = failed_imports()
    if "torch" not in failures:
        report_versions()
    if failures:
        print("Broken")
        for name, reason in failures.items():
            print(f"  {name:<13} {reason}")
        print("Not usable. `make setup` installs what is missing; remove .venv first if it is half installed.")
        return 1
    usable = report_backends(report_devices())
    print("Usable." if usable else "Not usable: a device has no attention backend.")
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main())
