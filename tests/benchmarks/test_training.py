"""The comparison of training runs: every case is a real `train.py`."""

import csv
from pathlib import Path

import pytest

from benchmarks.training import BenchmarkConfig, Case, _reason, cases, run_benchmark, table

SMALL = [
    "experiment=throughput",
    "model=tiny",
    "data.batch_size=4",
    "data.cycle_batches=2",
    "data.num_eval_users=16",
    "trainer.max_steps=4",
    "trainer.warmup_steps=1",
    "trainer.final_eval=true",
    "trainer.tensorboard=false",
    "trainer.device=cpu",
]


def test_cases_are_every_combination() -> None:
    config = BenchmarkConfig(attention=["a", "b"], sharding=["x"], num_processes=[1, 2])
    assert list(cases(config)) == [Case(1, "x", "a"), Case(1, "x", "b"), Case(2, "x", "a"), Case(2, "x", "b")]
    with pytest.raises(ValueError, match="benchmark.sharding is empty"):
        BenchmarkConfig(sharding=[])
    with pytest.raises(ValueError, match="benchmark.num_processes is 0"):
        BenchmarkConfig(num_processes=[0])


@pytest.mark.slow
def test_a_run_gives_a_row_and_a_failing_one_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.csv"
    config = BenchmarkConfig(attention=["sdpa", "no_such"], num_processes=[2], output=str(output))
    good, bad = run_benchmark(config, SMALL)
    assert good["failure"] == ""
    assert good["samples_per_second"] > 0
    assert good["peak_host_mib"] > 100
    assert 0 < good["auc"] < 1
    assert good["command"].startswith("torchrun --standalone --nproc-per-node=2 train.py experiment=throughput")
    assert "no_such" in bad["failure"]
    assert "samples_per_second" not in bad
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["attention"] for row in rows] == ["sdpa", "no_such"]
    assert float(rows[0]["samples_per_second"]) == good["samples_per_second"]
    assert rows[1]["samples_per_second"] == ""
    assert "QPS" in capsys.readouterr().out


def test_table_shows_a_failure() -> None:
    row = {"num_processes": 1, "sharding": "auto", "attention": "varlen", "failure": "needs CUDA"}
    assert "needs CUDA" in table([row])


def test_the_reason_is_the_most_telling_line() -> None:
    ours = "ValueError: no such plan"
    of_a_library = "  what():  [enforce fail at pair.cc] connection closed"
    of_the_launcher = "traceback : Signal 6 (SIGABRT) received by PID 7"
    assert _reason(f"sharding plan\n{of_a_library}\n{of_the_launcher}\n{ours}\n") == ours
    assert _reason(f"sharding plan\n{of_the_launcher}\n{of_a_library}\n") == of_a_library.strip()
    assert _reason(f"sharding plan\n{of_the_launcher}\nRoot Cause\n") == of_the_launcher
    assert _reason("sharding plan\nthe last word\n\n") == "the last word"
    assert _reason("") == "no output"
