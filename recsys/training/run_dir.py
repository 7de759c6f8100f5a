"""The directory of a run, one for all ranks.

config.yaml       the composed config          tensorboard/     event files
plan.txt          the sharding plan in force   checkpoints/     see recsys.training.checkpoint
metrics.jsonl     one JSON object per line     summary.json     the figures of the finished run
"""

import json
import math
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
            resume: if `run_dir` is `None`, go on in the newest unfinished run of this name that has a checkpoint,
                or else in the newest finished one.

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
                file.write(json.dumps(finite(record)) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will take again."""
        path = self.path / "metrics.jsonl"
        if not self.is_main or not path.exists():
            return
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(path)


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
        if runs:  # rather one that isn't finished, then the newest
            return max(runs, key=lambda path: (not (path / "summary.json").exists(), path.stat().st_mtime))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        path = home / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # two runs started in the same second
            continue
    raise OSError(f"no free run directory under {home}")


def finite(value: Any) -> Any:
    """A record for JSON, which has no NaN and no infinity: they become `None`."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
