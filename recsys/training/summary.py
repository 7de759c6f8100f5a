"""The figures of a finished run: `summary.json`, and the table at its end."""

import json
import math
from dataclasses import asdict, dataclass, field

from recsys.tables import format_table
from recsys.training.metrics import TaskQuality
from recsys.training.run_dir import finite


@dataclass
class Summary:
    """What a run measured. Rates are over all ranks and leave out evaluation, checkpoints and the first steps."""

    name: str
    model: str
    mixer: str
    attention_backend: str
    sharding: str
    world_size: int
    device: str
    steps: int
    samples: int
    samples_per_second: float
    """QPS: user rows per second over all ranks."""
    tokens_per_second: float
    """Real tokens: history events and candidates."""
    candidates_per_second: float
    step_ms_p50: float
    step_ms_p90: float
    mfu: float | None
    """Model FLOPs (real tokens, real mask) over the bf16 peak of all devices; `None` where the peak isn't known."""
    peak_device_mib_per_rank: list[float]
    peak_host_mib_per_rank: list[float]
    table_parameters: int
    dense_parameters: int
    truncated_users: int
    truncated_events: int
    repaired_ids: int
    skipped_steps: int
    eval: dict[str, TaskQuality] = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)
    command: str = ""

    def to_json(self) -> str:
        """The summary as JSON; values that are not numbers become `null`."""
        record = asdict(self)
        for task, quality in self.eval.items():
            record["eval"][task]["auc_closed"] = quality.auc_closed
        return json.dumps(finite(record), indent=2) + "\n"

    def table(self) -> str:
        """Two tables: rates and sizes, then quality per task."""
        rows = [
            (
                "model",
                f"{self.model}, {self.dense_parameters:,} dense + {self.table_parameters:,} table parameters",
            ),
            ("attention", self.attention_backend if self.mixer == "attention" else f"none: {self.mixer}"),
            ("sharding", self.sharding),
            ("ranks", f"{self.world_size} x {self.device}"),
            ("steps", f"{self.steps:,} ({self.samples:,} samples)"),
            ("QPS", f"{self.samples_per_second:,.0f} samples/s"),
            (
                "tokens",
                f"{self.tokens_per_second:,.0f} tokens/s, {self.candidates_per_second:,.0f} candidates/s",
            ),
            ("step", f"p50 {self.step_ms_p50:.1f} ms, p90 {self.step_ms_p90:.1f} ms"),
            ("memory", _memory(self.peak_device_mib_per_rank, self.peak_host_mib_per_rank)),
            ("input", f"{self.truncated_users:,} histories cut, {self.repaired_ids:,} ids repaired"),
        ]
        if self.mfu is not None:
            rows.append(("MFU", f"{100 * self.mfu:.1f}% of the bf16 peak"))
        if self.skipped_steps:
            rows.append(("skipped", f"{self.skipped_steps:,} steps with a loss that was not finite"))
        text = format_table(("run", self.name), rows)
        if self.eval:
            text += "\n\n" + quality_table(self.eval)
        return text


def quality_table(quality: dict[str, TaskQuality]) -> str:
    """Held-out quality per task beside the best reachable."""
    header = ("held-out", "NE", "best NE", "AUC", "best AUC", "AUC closed", "calibration")
    rows = [
        (
            task,
            f"{q.ne:.4f}",
            _known(q.best_ne, "{:.4f}"),
            f"{q.auc:.4f}",
            _known(q.best_auc, "{:.4f}"),
            _known(q.auc_closed, "{:.1%}"),
            f"{q.calibration:.3f}",
        )
        for task, q in quality.items()
    ]
    return format_table(header, rows)


def _known(value: float, pattern: str) -> str:
    return "-" if math.isnan(value) else pattern.format(value)


def _memory(device_mib: list[float], host_mib: list[float]) -> str:
    host = f"host {max(host_mib):,.0f} MiB"
    return f"device {max(device_mib):,.0f} MiB, {host} per rank" if max(device_mib) > 0 else f"{host} per rank"
