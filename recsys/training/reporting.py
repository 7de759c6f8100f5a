"""What a run tells while it runs: progress bar, log lines, `metrics.jsonl`, TensorBoard, traces."""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Protocol

from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from recsys.config import TrainConfig
from recsys.training.distributed import Ranks
from recsys.training.metrics import TaskQuality
from recsys.training.run_dir import RunDir
from recsys.training.summary import quality_table


class Steppable(Protocol):
    """Told about the end of every step."""

    def step(self) -> None:
        """A step ended."""


class _NoProfiler:
    def step(self) -> None:
        """Nothing to do."""


class Reporter:
    """Writes on rank 0 only, but for traces, which every rank writes.

    Args:
        config: which of the channels are on.
        run_dir: where they go.
        ranks: who reports.
    """

    def __init__(self, config: TrainConfig, run_dir: RunDir, ranks: Ranks) -> None:
        self.config, self.run_dir, self.ranks = config, run_dir, ranks
        self.writer: Any = None
        self._open_tensorboard(purge_step=None)
        self.progress_bar: tqdm | None = None

    def forget_after(self, step: int) -> None:
        """A resumed run takes the steps after `step` again: drop what was written of them."""
        self.run_dir.forget_metrics_after(step)
        self._open_tensorboard(purge_step=step + 1)

    def plan(self, text: str) -> None:
        """Print and keep the sharding plan in force."""
        self.run_dir.write_text("plan.txt", text + "\n")
        self.say(f"sharding plan\n{text}\n")

    def bar(self, first_step: int) -> tqdm:
        """The progress bar; on a terminal only, log lines serve elsewhere."""
        shown = self.ranks.is_main and self.config.trainer.progress_bar and sys.stderr.isatty()
        self.progress_bar = tqdm(
            total=self.config.trainer.max_steps,
            initial=first_step,
            disable=not shown,
            unit="step",
            dynamic_ncols=True,
        )
        return self.progress_bar

    def window(self, step: int, loss: float, rates: dict[str, float], quality: dict[str, TaskQuality]) -> None:
        """Report a window of training steps."""
        ne = ", ".join(f"{task} {q.ne:.4f}" for task, q in quality.items())
        auc = ", ".join(f"{task} {q.auc:.4f}" for task, q in quality.items())
        text = f"loss {loss:.4f} | NE {ne} | AUC {auc} | {rates['samples_per_second']:,.0f} QPS"
        if self.progress_bar is not None and not self.progress_bar.disable:
            self.progress_bar.set_postfix_str(text)
        else:
            self.say(f"step {step:>6,} | {text}")
        self._record("train", step, {"loss": loss, **rates}, quality)

    def evaluation(
        self, step: int, quality: dict[str, TaskQuality], seconds: float, samples: int, *, show: bool
    ) -> None:
        """Report an evaluation on held-out users; the last one is shown with the summary."""
        if show:
            self.say(f"\nstep {step:,}: {samples:,} held-out users in {seconds:.1f} s\n{quality_table(quality)}\n")
        self._record("eval", step, {"samples": samples, "seconds": seconds}, quality)

    def say(self, text: str) -> None:
        """A line for the user, clear of the progress bar."""
        if self.ranks.is_main and text:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def profiler(self, first_step: int) -> AbstractContextManager[Steppable]:
        """Records the steps of `trainer.profile_steps`, if any, into `trace_rank<r>.json` and `trace_rank<r>.txt`."""
        if not self.config.trainer.profile_steps:
            return nullcontext(_NoProfiler())
        first, last = self.config.trainer.profile_steps
        if first < first_step + 2:
            raise ValueError(f"trainer.profile_steps begins at {first}, but the run goes on from step {first_step}")
        activities = [ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        wait = first - first_step - 2
        return profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=1, active=last - first + 1, repeat=1),
            on_trace_ready=self._write_trace,
        )

    def close(self) -> None:
        """Flush what is buffered."""
        if self.writer is not None:
            self.writer.close()

    def _open_tensorboard(self, purge_step: int | None) -> None:
        if not self.ranks.is_main or not self.config.trainer.tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter  # the tensorboard package is needed only when it is on

        self.close()
        self.writer = SummaryWriter(str(self.run_dir.tensorboard), purge_step=purge_step)

    def _write_trace(self, trace: Any) -> None:
        stem = self.run_dir.path / f"trace_rank{self.ranks.rank}"
        trace.export_chrome_trace(str(stem.with_suffix(".json")))
        by = "self_device_time_total" if self.ranks.device.type == "cuda" else "self_cpu_time_total"
        stem.with_suffix(".txt").write_text(trace.key_averages().table(sort_by=by, row_limit=60))

    def _record(self, split: str, step: int, scalars: dict[str, float], quality: dict[str, TaskQuality]) -> None:
        tasks = {task: asdict(q) for task, q in quality.items()}
        self.run_dir.append_metrics({"split": split, "step": step, **scalars, "tasks": tasks})
        if self.writer is None:
            return
        for name, value in scalars.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)
        for task, values in tasks.items():
            for name, value in values.items():
                if not math.isnan(value):
                    self.writer.add_scalar(f"{split}_{task}/{name}", value, step)
