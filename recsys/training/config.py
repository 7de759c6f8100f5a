"""How a run goes: steps, logging, evaluation, checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path

from recsys.checks import at_least
from recsys.training.distributed import DeviceKind
from recsys.training.pipeline import NonFinite, PipelineKind
from recsys.training.sync_watch import SyncDebug


@dataclass
class TrainerConfig:
    """The training loop."""

    max_steps: int = 1000
    """Steps of the run, counted from the first one ever, not from a resume."""

    device: DeviceKind = DeviceKind.auto
    """`auto` is CUDA where there is a GPU."""

    pipeline: PipelineKind = PipelineKind.sparse_dist
    """TorchRec's pipeline; `sparse_dist` overlaps the exchange of ids with compute."""

    non_finite: NonFinite = NonFinite.stop
    """`stop` ends the run at the next logging step and says where; `skip` leaves such steps out, at one host
    synchronisation a step."""

    max_skipped_in_a_row: int = 10
    """With `non_finite=skip`: more steps left out in a row end the run."""

    log_every_steps: int = 50
    """Steps between log lines; metrics are computed then, and only then does the host wait for the GPU."""

    eval_every_steps: int | None = None
    """Steps between evaluations on held-out users; `null` evaluates at the end only."""

    final_eval: bool = True
    """Evaluate at the end of the run."""

    checkpoint_every_steps: int | None = None
    """Steps between checkpoints; `null` writes one at the end only."""

    final_checkpoint: bool = True
    """Write a checkpoint at the end of the run."""

    keep_checkpoints: int = 3
    """Newest checkpoints kept."""

    resume: str = "never"
    """`never`; `auto`: go on from the newest whole checkpoint, if there is one; or the path of a checkpoint."""

    warmup_steps: int = 5
    """First steps of a process left out of the summary's rates and step times (compilation, caches)."""

    tensorboard: bool = True
    """Write TensorBoard events."""

    progress_bar: bool = True
    """Show a bar on rank 0."""

    timeout_minutes: float = 10.0
    """A collective that waits longer ends the run."""

    sync_debug: SyncDebug = SyncDebug.off
    """Host synchronisations in CUDA training steps, after the first `warmup_steps`: `report` lists them at the end,
    `error` stops at one outside TorchRec's exchange of sizes."""

    detect_anomaly: bool = False
    """Let autograd name the operation behind a NaN gradient; slow."""

    profile_steps: list[int] = field(default_factory=list)
    """`[first, last]`: write a Chrome trace of these steps to the run directory."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "log_every_steps", "keep_checkpoints"):
            at_least(f"trainer.{name}", getattr(self, name), 1)
        for name in ("eval_every_steps", "checkpoint_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name} is {value}: allowed are null and values >= 1")
        at_least("trainer.warmup_steps", self.warmup_steps, 0)
        at_least("trainer.max_skipped_in_a_row", self.max_skipped_in_a_row, 0)
        if self.resume not in ("never", "auto") and not Path(self.resume).is_dir():
            raise ValueError(
                f"trainer.resume is {self.resume!r}, and there is no such directory: "
                "allowed are never, auto and the path of a checkpoint"
            )
        if self.timeout_minutes <= 0:
            raise ValueError(f"trainer.timeout_minutes is {self.timeout_minutes}: allowed are values > 0")
        ordered = [1, *self.profile_steps, self.max_steps]
        two = len(self.profile_steps) == 2 and self.profile_steps[0] > 1
        if self.profile_steps and not (two and ordered == sorted(ordered)):
            raise ValueError(
                f"trainer.profile_steps is {self.profile_steps}: allowed are [] and [first, last] with "
                "2 <= first <= last <= trainer.max_steps"
            )


@dataclass
class PathsConfig:
    """Where things are read and written."""

    runs_root: str = "runs"
    """Runs go to `<runs_root>/<name>/<time>`."""

    run_dir: str | None = None
    """The directory of this run, instead."""
