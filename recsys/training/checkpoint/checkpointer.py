"""Writes, keeps, checks and loads the checkpoints of a run."""

import io
import json
import logging
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from recsys.training.checkpoint.collective import CheckpointRefused, Team
from recsys.training.checkpoint.inventory import Inventory, Loading, merge, plan_loading
from recsys.training.checkpoint.manifest import (
    MANIFEST,
    build_manifest,
    check_files,
    check_model,
    fingerprint,
    read_manifest,
    sync_directory,
    write_synced,
)
from recsys.training.checkpoint.planner import ArrayLoadPlanner, Arrays, ArraySavePlanner
from recsys.training.checkpoint.state import RestoreInfo, TrainState, restore_rng, rng_state

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"step_(\d{8,})")
TEMPORARY, REPLACED = ".tmp", ".replaced"
TRAIN_STATE = "train_state.pt"


class Checkpointer:
    """The checkpoints of one run: `<directory>/step_00000100/` and so on.

    `save` and `restore` are collectives: every rank calls them, at the same step boundary, and every rank
    gets the same error.

    Args:
        directory: one directory that all ranks see.
        keep: how many of the newest checkpoints stay.
        process_group: carries Python objects between the ranks; `None` is the default group.

    Raises:
        ValueError: `keep` below 1.
    """

    def __init__(self, directory: str | Path, keep: int = 3, process_group: dist.ProcessGroup | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: allowed are 1 (only the newest checkpoint) and more")
        self.directory = Path(directory)
        self.keep = keep
        self.process_group = process_group

    def save(self, step: int, state: TrainState) -> Path:
        """Write the checkpoint of `step` and drop those older than the newest `keep`.

        It appears under its name only when it is whole; a crash before that leaves the former ones untouched.

        Raises:
            ValueError: the state holds something that can't be saved.
            CheckpointError: writing failed on some rank.
        """
        team = Team(self.process_group)
        rng = rng_state()  # first of all, before anything could draw
        path = self.directory / f"step_{step:08d}"
        temporary = path.with_name(path.name + TEMPORARY)
        inventory, model = self._look(team, state)
        team.on_first("make the checkpoint directory", lambda: self._make_temporary(temporary))
        arrays = team.locally("prepare the tensors", inventory.arrays)
        team.locally("write the tensors", lambda: _write_tensors(temporary, arrays, team))

        def write_small_files() -> dict[str, dict[str, int]]:
            rank_state = {"rng": rng, "extras": state.rank_extras}
            write_synced(temporary / _rank_file(team.rank), _packed(rank_state, "rank_extras"))
            if team.rank == 0:
                stateful = {name: thing.state_dict() for name, thing in state.stateful.items()}
                run_state = {"stateful": stateful, "extras": state.extras, "scalars": inventory.scalars()}
                write_synced(temporary / TRAIN_STATE, _packed(run_state, "stateful and extras"))
            return {file.name: fingerprint(file) for file in _files_of(temporary, team.rank)}

        files = team.gather(team.locally("write the state", write_small_files))

        def finish() -> None:
            all_files = {name: entry for of_rank in files for name, entry in of_rank.items()}
            manifest = build_manifest(step, state.users_consumed, team.world_size, model, all_files)
            write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
            sync_directory(temporary)
            self._publish(temporary, path)
            self._drop_old(step)

        team.on_first("finish the checkpoint", finish)
        return path

    def restore(
        self, state: TrainState, path: str | Path | None = None, *, strict_optimizer: bool = True
    ) -> RestoreInfo | None:
        """Load a checkpoint into the live objects of `state`.

        Args:
            state: model, optimizers and the rest, built as for a fresh run; the plan and the world size may
                differ from those of the run that saved.
            path: the checkpoint; `None` takes the newest that is whole and of this model, and passes over
                others with a message.
            strict_optimizer: refuse a checkpoint whose optimizers are others; when off, those start afresh.

        Returns `None` when `path` is `None` and the directory holds no checkpoint at all.

        Raises:
            CheckpointRefused: (a `ValueError`) `path`, or all that the directory holds, is torn or foreign.
            CheckpointError: reading failed on some rank.
        """
        team = Team(self.process_group)
        inventory, model = self._look(team, state)
        chosen = team.on_first("choose a checkpoint", lambda: self._choose(path, model, strict_optimizer))
        if chosen is None:
            return None
        source, manifest, messages = chosen
        run_state = team.locally("read the state", lambda: _run_state(source, state))

        def line_up() -> Loading:
            inventory.purge()
            return plan_loading(inventory, manifest, run_state["scalars"])

        loading = team.locally("line the tensors up", line_up)
        team.locally("read the tensors", lambda: _read_tensors(source, loading.arrays, team))

        def apply() -> tuple[dict[str, Any] | None, str | None]:
            with torch.no_grad():
                for action in loading.then:
                    action()
            for name, thing in state.stateful.items():
                thing.load_state_dict(run_state["stateful"][name])
            known = team.rank < manifest["world_size"]
            rank_state = _unpacked(source / _rank_file(team.rank)) if known else {"rng": None, "extras": None}
            same_ranks = team.world_size == manifest["world_size"]
            # last of all, after everything that might draw
            message = restore_rng(rank_state["rng"], manifest["step"], team.rank)
            return (rank_state["extras"] if same_ranks else None), message

        rank_extras, rng_message = team.locally("take the state over", apply)
        rng_messages = [message for message in team.gather(rng_message) if message is not None]
        conversions = dict.fromkeys(message for of_rank in team.gather(loading.messages) for message in of_rank)
        messages = [*messages, *conversions, *rng_messages]
        if team.rank == 0:
            for message in messages:
                logger.warning(message)
        return RestoreInfo(
            path=source,
            step=manifest["step"],
            users_consumed=manifest["users_consumed"],
            extras=run_state["extras"],
            rank_extras=rank_extras,
            world_size=manifest["world_size"],
            messages=messages,
        )

    def latest(self) -> Path | None:
        """The newest checkpoint that looks whole (manifest, names, sizes); no collective, raises nothing."""
        for path in self._paths():
            try:
                check_files(path, read_manifest(path), contents=False)
            except CheckpointRefused:
                continue
            return path
        return None

    def _look(self, team: Team, state: TrainState) -> tuple[Inventory, dict[str, Any]]:
        """What this rank holds, and what the ranks hold together, as the manifest says it."""

        def look() -> Inventory:
            inventory = Inventory.take(state.model, state.optimizers)
            inventory.flush()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return inventory

        inventory = team.locally("look through the model", look)
        descriptions = team.gather(inventory.description())
        return inventory, team.locally("describe the model", lambda: merge(descriptions))

    def _paths(self) -> list[Path]:
        """Checkpoint directories, newest first, whole or not."""
        named = [(match, path) for path in self.directory.glob("step_*") if (match := STEP_NAME.fullmatch(path.name))]
        return [path for _, path in sorted(((int(m[1]), path) for m, path in named), reverse=True)]

    def _choose(
        self, path: str | Path | None, model: dict[str, Any], strict_optimizer: bool
    ) -> tuple[Path, dict[str, Any], list[str]] | None:
        """On rank 0: the checkpoint to load, its manifest, and why others were passed over."""
        self._recover()
        candidates = [Path(path)] if path is not None else self._paths()
        refusals: list[str] = []
        for candidate in candidates:
            try:
                manifest = read_manifest(candidate)
                check_files(candidate, manifest)
                check_model(candidate, manifest, model, strict_optimizer=strict_optimizer)
            except CheckpointRefused as refusal:
                if path is not None:
                    raise
                refusals.append(str(refusal))
                continue
            return candidate, manifest, [f"passed over a checkpoint: {refusal}" for refusal in refusals]
        if refusals:
            raise CheckpointRefused(
                f"{self.directory} holds no checkpoint that can be used: {' | '.join(refusals)}. "
                "Name another run directory to start afresh"
            )
        return None

    def _make_temporary(self, temporary: Path) -> None:
        """An empty directory to write into; what crashed writers left goes."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._recover()
        for leftover in self.directory.glob(f"step_*{TEMPORARY}"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _publish(self, temporary: Path, path: Path) -> None:
        """Give a whole checkpoint its name. One of the same step, from before a restart, makes way."""
        replaced = path.with_name(path.name + REPLACED)
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        sync_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _recover(self) -> None:
        """Finish what a crash in the middle of `_publish` left."""
        for replaced in self.directory.glob(f"step_*{REPLACED}"):
            path = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if path.exists():
                shutil.rmtree(replaced)
            else:
                os.rename(replaced, path)

    def _drop_old(self, step: int) -> None:
        """Keep the newest `keep` up to `step`. Later ones are torn or of a run that went back: left alone."""
        own = [path for path in self._paths() if int(path.name.removeprefix("step_")) <= step]
        for path in own[self.keep :]:
            shutil.rmtree(path)


def _write_tensors(directory: Path, arrays: Arrays, team: Team) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(directory, sync_files=True),
            planner=ArraySavePlanner(arrays),
            process_group=team.group,
            no_dist=not team.is_distributed,
        )


def _read_tensors(directory: Path, arrays: Arrays, team: Team) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(
            {},
            storage_reader=dcp.FileSystemReader(directory),
            planner=ArrayLoadPlanner(arrays),
            process_group=team.group,
            no_dist=not team.is_distributed,
        )


def _run_state(source: Path, state: TrainState) -> dict[str, Any]:
    """The state common to all ranks; what it schedules has to be what the run schedules."""
    run_state = _unpacked(source / TRAIN_STATE)
    if unmatched := sorted(set(state.stateful) ^ set(run_state["stateful"])):
        raise CheckpointRefused(
            f"{source} holds the state of {sorted(run_state['stateful'])}, this run has "
            f"{sorted(state.stateful)}: {', '.join(unmatched)} is in one of them only"
        )
    return run_state


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _files_of(directory: Path, rank: int) -> list[Path]:
    """The files that this rank wrote: tensors (named by DCP) and its state; rank 0 also the common ones."""
    mine = [*directory.glob(f"__{rank}_*.distcp"), directory / _rank_file(rank)]
    return [*mine, directory / TRAIN_STATE, directory / ".metadata"] if rank == 0 else mine


def _packed(content: dict[str, Any], what: str) -> bytes:
    """Bytes of plain values and tensors, checked to load without running code from the file."""
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{what} can't be saved: allowed are tensors, numbers, strings and lists, tuples and dicts "
            f"of them ({error})"
        ) from error
    return buffer.getvalue()


def _unpacked(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return content
