"""The manifest of a checkpoint: what it holds, and how to tell that all of it is still there."""

import json
import os
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from recsys.training.checkpoint.collective import CheckpointRefused
from recsys.training.checkpoint.inventory import optimizers_differ

FORMAT, FORMAT_VERSION = "recsys.checkpoint", 1
MANIFEST = "manifest.json"
WHOLE_BYTES, SAMPLE_BYTES, NUM_SAMPLES = 1 << 28, 1 << 20, 64


def fingerprint(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file: of all of it up to 256 MiB, beyond that of 64 evenly spaced MiB."""
    size, crc = path.stat().st_size, 0
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
        else:
            for index in range(NUM_SAMPLES):
                file.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
                crc = zlib.crc32(file.read(SAMPLE_BYTES), crc)
    return {"bytes": size, "crc32": crc}


def build_manifest(
    step: int,
    users_consumed: int,
    world_size: int,
    description: dict[str, Any],
    files: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """The manifest's content; `description` as from `inventory.merge`."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "users_consumed": users_consumed,
        "world_size": world_size,
        "versions": {"torch": torch.__version__, **{name: _version(name) for name in ("torchrec", "recsys")}},
        **description,
        "files": files,
    }


def write_synced(path: Path, data: bytes) -> None:
    """Write a file so that it survives a power cut."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`.

    Raises:
        CheckpointRefused: there is none, it doesn't parse, or it is of another format.
    """
    if not path.is_dir():
        raise CheckpointRefused(f"{path}: there is no such checkpoint directory")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointRefused(f"{path} is torn or foreign: it has no {MANIFEST}, which is written last") from None
    except ValueError:
        raise CheckpointRefused(f"{path} is torn: its {MANIFEST} is not valid JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointRefused(f"{path} is foreign: its {MANIFEST} isn't of the format {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointRefused(
            f"{path} is foreign: its format version is {manifest.get('format_version')}, "
            f"this code reads {FORMAT_VERSION}"
        )
    return manifest


def check_files(path: Path, manifest: dict[str, Any], *, contents: bool = True) -> None:
    """Every file that the manifest names is there, of its size and, if `contents`, with its checksum.

    Raises:
        CheckpointRefused: naming the first file that isn't.
    """
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointRefused(f"{path} is torn: its file {name} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointRefused(
                f"{path} is torn: its file {name} has {size} bytes, {expected['bytes']} were written"
            )
        if contents and fingerprint(file)["crc32"] != expected["crc32"]:
            raise CheckpointRefused(f"{path} is torn: the contents of its file {name} have changed (checksum)")


def check_model(path: Path, manifest: dict[str, Any], model: dict[str, Any], *, strict_optimizer: bool) -> None:
    """The checkpoint is of this model.

    model: as from `inventory.merge`. With `strict_optimizer`, optimizers have to be the same ones too.

    Raises:
        CheckpointRefused: naming what differs.
    """
    differences = _differences("table", manifest["tables"], model["tables"], lambda t: (t["rows"], t["dim"]))
    differences += _differences("parameter", manifest["dense"], model["dense"], lambda p: tuple(p["shape"]))
    if differences:
        shown = "; ".join(differences[:8]) + (f"; and {len(differences) - 8} more" if len(differences) > 8 else "")
        raise CheckpointRefused(f"{path} is foreign, it is of another model: {shown}")
    if strict_optimizer and (differences := _optimizer_differences(manifest, model)):
        raise CheckpointRefused(
            f"{path} is of a run with other optimizers: {'; '.join(differences[:8])}. "
            f"With strict_optimizer=False the weights are loaded and these optimizers start afresh"
        )


def _differences(kind: str, saved: dict[str, Any], here: dict[str, Any], shape_of: Any) -> list[str]:
    found = [f"{kind} {name} is in the checkpoint only" for name in saved if name not in here]
    found += [f"{kind} {name} is in the model only" for name in here if name not in saved]
    for name in saved:
        if name in here and shape_of(saved[name]) != shape_of(here[name]):
            before, now = shape_of(saved[name]), shape_of(here[name])
            found.append(f"{kind} {name} has shape {before} in the checkpoint and {now} in the model")
    return found


def _optimizer_differences(manifest: dict[str, Any], model: dict[str, Any]) -> list[str]:
    found = []
    for name, here in model["tables"].items():
        saved = manifest["tables"][name]
        if optimizers_differ(saved, here):
            kinds = [
                " ".join([t["optimizer"], "with", *(t["states"] + t["row_states"] or ["no state"])])
                for t in (saved, here)
            ]
            found.append(f"table {name} was trained by {kinds[0]}, here by {kinds[1]}")
    for name, here in model["dense"].items():
        before, now = manifest["dense"][name].get("optimizer"), here.get("optimizer")
        if now is not None and before != now:
            found.append(f"parameter {name} was trained by {before or 'no optimizer'}, here by {now}")
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
