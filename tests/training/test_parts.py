"""The small parts of training: learning rate, FLOPs, step times, run directories, the guard."""

import json
import math
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from recsys.attention import MaskSpec
from recsys.models.config import MixerKind
from recsys.tables import format_table
from recsys.training.checkpoint import Checkpointer, TrainState
from recsys.training.distributed import DeviceKind, Ranks, choose_device
from recsys.training.flops import FlopCounter, bf16_peak_flops, count_visible_pairs
from recsys.training.guard import FiniteGuard, NonFiniteLossError
from recsys.training.metrics import TaskQuality
from recsys.training.optimizer import Decay, DenseOptimizer, DenseOptimizerConfig, learning_rate_factor
from recsys.training.run_dir import RunDir
from recsys.training.throughput import Counts, StepTimer, percentile
from tests.samples import batch_of, small_model, small_model_config


class OneRank:
    """`Ranks` of a run of one, without a process group."""

    is_main, rank, world_size, device = True, 0, 1, torch.device("cpu")

    def agree(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


ONE = cast(Ranks, OneRank())


def test_learning_rate_warms_up_then_decays() -> None:
    cosine = DenseOptimizerConfig(warmup_steps=10, decay=Decay.cosine, final_lr_ratio=0.1)
    factors = [learning_rate_factor(step, cosine, 110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    linear = DenseOptimizerConfig(warmup_steps=0, decay=Decay.linear, final_lr_ratio=0.0)
    assert learning_rate_factor(25, linear, 100) == pytest.approx(0.75)
    constant = DenseOptimizerConfig(warmup_steps=0, decay=Decay.constant)
    assert learning_rate_factor(99, constant, 100) == 1.0


def test_dense_optimizer_clips_and_decays_matrices_only() -> None:
    model = nn.Linear(3, 2)
    config = DenseOptimizerConfig(lr=0.1, weight_decay=0.5, clip_norm=1.0, warmup_steps=4)
    optimizer = DenseOptimizer(model.named_parameters(), config, max_steps=8)
    assert optimizer.set_learning_rate(1) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.05)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.step()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(torch.cat([g.flatten() for g in grads]).norm()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("clip_norm", [0.5, None])
def test_dense_optimizer_of_one_kernel_does_what_many_do_on_a_cpu(clip_norm: float | None) -> None:
    stepped = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Linear(16, 8)
        gradients = [torch.randn_like(p) for p in model.parameters()]
        model.to(device)
        config = DenseOptimizerConfig(lr=0.1, clip_norm=clip_norm, warmup_steps=0)
        optimizer = DenseOptimizer(model.named_parameters(), config)
        assert all(bool(group["fused"]) == (device == "cuda") for group in optimizer.param_groups)
        for _ in range(3):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.to(device)
            optimizer.step()
        stepped[device] = [p.detach().cpu() for p in model.parameters()]
    for a, b in zip(stepped["cuda"], stepped["cpu"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_dense_optimizer_leaves_out_a_gradient_that_is_not_finite(clip_norm: float | None) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    config = DenseOptimizerConfig(clip_norm=clip_norm)
    optimizer = DenseOptimizer(model.named_parameters(), config, skip_non_finite=True)
    for value, moves in ((math.nan, False), (0.1, True)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
        assert torch.equal(model.weight, before) is not moves
        assert torch.isfinite(model.weight).all()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("window", [None, 1, 3, 50], ids=lambda w: f"window-{w}")
def test_visible_pairs_counts_the_mask(causal: bool, window: int | None) -> None:
    history, candidates = torch.tensor([0, 1, 5, 8]), torch.tensor([2, 0, 3, 1])
    expected = 0
    for h, c in zip(history.tolist(), candidates.tolist(), strict=True):
        for i in range(h):
            for j in range(h):
                expected += (not causal or j <= i) and (window is None or abs(i - j) < window)
        expected += c * (h + 1)
    assert count_visible_pairs(history, candidates, MaskSpec(causal=causal, window=window)) == expected


def test_flops_match_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # Attention is left out: torch counts the padded products of the dense backend. Mean pooling has none.
    config = small_model_config(mixer=MixerKind.mean_pool)
    task = small_model(config)
    batch = batch_of([5, 0, 9], [2, 1, 3])
    with FlopCounterMode(display=False) as counter:
        loss, _ = task(batch)
        loss.backward()
    # The gradient with respect to dense features is not needed: torch leaves that product out, and the counter
    # here has it. The tolerance is its size.
    mine = FlopCounter(config, task.model.interaction, MaskSpec()).step(batch)
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.02)
    attends = FlopCounter(small_model_config(), task.model.interaction, MaskSpec()).step(batch)
    pairs = count_visible_pairs(batch.history_lengths, batch.candidate_lengths, MaskSpec())
    assert attends - mine == 3 * 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    target = small_model_config(mixer=MixerKind.target)
    across = FlopCounter(target, task.model.interaction, MaskSpec()).step(batch)
    assert across - mine == 3 * 4 * (5 * 2 + 9 * 3) * config.num_heads * config.head_dim * config.num_layers


def test_peak_by_device_name() -> None:
    assert bf16_peak_flops("NVIDIA H200") == pytest.approx(989.4e12)
    assert bf16_peak_flops("Tesla V100") is None


def test_step_timer_leaves_interruptions_out() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.interrupt()
    for _ in range(3):
        time.sleep(0.01)
        timer.step_done()
    time.sleep(0.2)  # an evaluation
    timer.interrupt()
    time.sleep(0.01)
    timer.step_done()
    seconds = timer.collect()
    assert len(timer.step_seconds) == 4
    assert 0.04 <= seconds < 0.2
    assert timer.collect() == 0.0
    timer.step_done()
    assert timer.collect() > 0.0
    assert len(timer.step_seconds) == 5


def test_counts_and_percentiles() -> None:
    counts = Counts()
    counts.add(batch_of([3, 0], [2, 1]), flops=10.0)
    before = Counts(**vars(counts))
    counts.add(batch_of([4], [1]), flops=5.0)
    assert counts == Counts(steps=2, samples=3, tokens=11, candidates=4, flops=15.0)
    assert counts.minus(before).per_second(0.5) == Counts(steps=2, samples=2, tokens=10, candidates=2, flops=10.0)
    assert Counts.sum([counts, before]).samples == 5
    assert math.isnan(counts.per_second(0.0).samples)
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 50) == 3.0
    assert percentile([7.0], 90) == 7.0
    assert math.isnan(percentile([], 50))


def test_guard_names_the_first_bad_step_task_and_parameter() -> None:
    model = nn.Linear(2, 2)
    guard = FiniteGuard(ONE, ("click", "like"))
    logits = torch.zeros(3, 2)
    guard.watch(1, torch.tensor(0.5), logits)
    guard.check(model)
    bad = logits.clone()
    bad[0, 1] = float("nan")
    guard.watch(2, torch.tensor(float("nan")), bad)
    guard.watch(3, torch.tensor(float("inf")), torch.full((3, 2), float("nan")))
    with torch.no_grad():
        model.bias[0] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"step 2 on rank 0: 1 logits of task 'like'.*by now: bias\."):
        guard.check(model)


def test_guard_refuses_parameters_that_are_not_finite() -> None:
    model = nn.Linear(2, 2)
    guard = FiniteGuard(ONE, ("click",))
    guard.check_parameters(model.named_parameters())
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="parameters of rank 0 are not finite: weight. No checkpoint"):
        guard.check_parameters(model.named_parameters())


def test_run_dir_is_new_for_every_run_and_found_again_to_resume(tmp_path: Path) -> None:
    def open_run(resume: bool, run_dir: str | None = None) -> RunDir:
        return RunDir.open(ONE, run_dir=run_dir, runs_root=str(tmp_path), name="x", resume=resume)

    first, second = open_run(resume=False), open_run(resume=False)
    assert first.path != second.path
    assert open_run(resume=True).path not in (first.path, second.path)  # nothing to resume yet
    (second.checkpoints / "step_00000005.tmp").mkdir(parents=True)  # a crash left this: nothing to resume either
    Checkpointer(first.checkpoints).save(5, TrainState(nn.Linear(2, 2)))
    assert open_run(resume=True).path == first.path

    (first.path / "summary.json").touch()  # finished: an unfinished run comes before it, but nothing else does
    assert open_run(resume=True).path == first.path
    Checkpointer(second.checkpoints).save(5, TrainState(nn.Linear(2, 2)))
    assert open_run(resume=True).path == second.path

    for step in (1, 2, 3):
        first.append_metrics({"step": step, "loss": math.nan if step == 1 else 0.5})
    first.forget_metrics_after(2)
    lines = (first.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": 0.5},
    ]
    with pytest.raises(ValueError, match="already holds a run: go on with it"):
        open_run(resume=False, run_dir=str(first.path))
    assert open_run(resume=True, run_dir=str(first.path)).path == first.path


def test_choose_device_says_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device(DeviceKind.cpu) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(DeviceKind.auto) == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no CUDA device: allowed here is trainer.device=cpu"):
        choose_device(DeviceKind.cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2 has no GPU: this host has 2"):
        choose_device(DeviceKind.auto)


def test_tables_align_numbers_right_and_text_left() -> None:
    assert format_table(("name", "n"), [("a", "5"), ("longer", "1,234")]).splitlines() == [
        "name        n",
        "------  -----",
        "a           5",
        "longer  1,234",
    ]


def test_task_quality_closed_share() -> None:
    assert TaskQuality(1.0, 0.7, 1.0, 0.9, 0.9).auc_closed == pytest.approx(0.5)
