"""Compare training runs: `python benchmark.py model=base benchmark.attention=[jagged_flash,sdpa]`.

Takes every override of `train.py` too; those go to each run.
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from benchmarks.training import BenchmarkRun, register_benchmark, run_benchmark
from recsys.config import ConfigMistake, explain_config_errors, load

FORWARDED_GROUPS = ("model", "data", "optimizer", "trainer", "experiment", "debug")
"""`attention` and `sharding` are each run's own."""

register_benchmark()


@hydra.main(version_base="1.3", config_path="configs", config_name="benchmark")
def main(config: DictConfig) -> None:
    """Compose, check, run."""
    loaded = load(config)
    assert isinstance(loaded, BenchmarkRun)
    chosen = HydraConfig.get()
    misplaced = [o for o in chosen.overrides.task if o.split("=")[0] in ("attention", "sharding")]
    if misplaced:
        raise ConfigMistake(
            f"{misplaced}: each run has its own; say benchmark.attention=[...] and benchmark.sharding=[...]"
        )
    groups = [group for group in FORWARDED_GROUPS if chosen.runtime.choices[group] is not None]
    choices = [f"{group}={chosen.runtime.choices[group]}" for group in groups]
    values = [o for o in chosen.overrides.task if o.split("=")[0] not in FORWARDED_GROUPS]
    rows = run_benchmark(loaded.benchmark, choices + [o for o in values if not o.startswith("benchmark.")])
    sys.exit(1 if any(row["failure"] for row in rows) else 0)


if __name__ == "__main__":
    explain_config_errors(main)
