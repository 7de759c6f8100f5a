"""The directory of a run, one for all ranks.

config.yaml       the composed config          tensorboard/     event files
plan.txt          the sharding plan in force   checkpoints/     see recsys.training.checkpoint
metrics.jsonl     one JSON object per line     summary.json     the figures of the finished run
"""

import json
import time
from pathlib import Path
from typing import Any

from recsys.training.checkpoint import Checkpointer
from recsys.training.distributed import Ranks


class RunDir:
    """Paths of a run and the small files in it; only rank 0 writes.

    Use `RunDir.open` to choose the directory, the same on every rank.
    """

    def __init__(self, path: Path, is_main: bool) -> None:
        self.path = path
        self.is_main = is_main
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def open(cls, ranks: Ranks, *, run_dir: str | None, runs_root: str, name: str, resume: bool) -> "RunDir":
        """Choose and make the directory on rank 0, and agree on it.

        Args:
            ranks: who agrees.
            run_dir: the directory, or `None` for `<runs_root>/<name>/<time>`.
            runs_root, name: where runs of this name live.
            resume: go on in the newest run of this name that has a checkpoint, if `run_dir` is `None`.

        Raises:
            ValueError: on every rank, when `run_dir` already holds a run and `resume` is off.
        """
        chosen: Path | ValueError | OSError | None = None
        if ranks.is_main:
            try:
                chosen = _choose(run_dir, Path(runs_root) / name, resume)
                chosen.mkdir(parents=True, exist_ok=True)
            except (ValueError, OSError) as error:
                chosen = error
        chosen = ranks.agree(chosen)
        if isinstance(chosen, Exception):
            raise chosen
        assert chosen is not None
        return cls(chosen, ranks.is_main)

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run."""
        if self.is_main:
            (self.path / name).write_text(text)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`."""
        if self.is_main:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record, allow_nan=True) + "\n")


def _choose(run_dir: str | None, home: Path, resume: bool) -> Path:
    if run_dir is not None:
        path = Path(run_dir)
        if not resume and (path / "metrics.jsonl").exists():
            raise ValueError(
                f"paths.run_dir={run_dir} already holds a run: go on with it (trainer.resume=auto) or name another"
            )
        return path
    if resume:
        runs = [path.parent for path in home.glob("*/checkpoints") if Checkpointer(path).latest() is not None]
        if runs:
            return max(runs, key=lambda path: path.stat().st_mtime)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        path = home / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # two runs started in the same second
            continue
    raise OSError(f"no free run directory under {home}")
