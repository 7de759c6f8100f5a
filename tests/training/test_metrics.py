"""Quality metrics against their definitions, alone and over two ranks."""

import math

import pytest
import torch
import torch.distributed as dist

from recsys.training.distributed import Ranks
from recsys.training.metrics import Calibration, NormalizedEntropy, QualityMeter, TaskQuality, measure
from tests.distributed import run_distributed

TASKS = ("click", "like")


def predictions(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 2, generator=generator)
    true_probs = torch.rand(count, 2, generator=generator)
    labels = (torch.rand(count, 2, generator=generator) < true_probs).float()
    return logits, labels, true_probs


def auc_by_pairs(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of (positive, negative) pairs in the right order, ties half."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    difference = positive[:, None] - negative[None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def expected_quality(parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], task: int) -> TaskQuality:
    logits, labels, true_probs = (torch.cat(tensors)[:, task].double() for tensors in zip(*parts, strict=True))

    def entropy_ratio(p: torch.Tensor) -> float:
        rate = float(labels.mean())
        base = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        return float(-(labels * p.log() + (1 - labels) * (1 - p).log()).mean()) / base

    p = logits.sigmoid()
    return TaskQuality(
        ne=entropy_ratio(p),
        auc=auc_by_pairs(p, labels),
        calibration=float(p.sum() / labels.sum()),
        best_ne=entropy_ratio(true_probs),
        best_auc=auc_by_pairs(true_probs, labels),
    )


def assert_same(got: TaskQuality, expected: TaskQuality) -> None:
    for name in ("ne", "auc", "calibration", "best_ne", "best_auc"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


def test_meter_gives_the_quality_of_everything_added_since_the_reset() -> None:
    meter = QualityMeter(TASKS, torch.device("cpu"))
    meter.add(*predictions(50, seed=9))
    meter.reset()
    parts = [predictions(40, seed=1), predictions(0, seed=2), predictions(70, seed=3)]
    for part in parts:
        meter.add(*part)
    quality = meter.compute()
    for i, task in enumerate(TASKS):
        assert_same(quality[task], expected_quality(parts, i))
    assert quality["click"].auc_closed == pytest.approx(
        (quality["click"].auc - 0.5) / (quality["click"].best_auc - 0.5)
    )


def test_meter_without_true_probabilities_has_no_best() -> None:
    meter = QualityMeter(TASKS, torch.device("cpu"))
    logits, labels, _ = predictions(30, seed=1)
    meter.add(logits, labels, None)
    quality = meter.compute()["click"]
    assert math.isnan(quality.best_auc)
    assert math.isnan(quality.auc_closed)
    assert 0 < quality.auc < 1


def test_meter_state_goes_through_a_checkpoint() -> None:
    meter, other = QualityMeter(TASKS, torch.device("cpu")), QualityMeter(TASKS, torch.device("cpu"))
    meter.add(*predictions(30, seed=4))
    other.load_state_dict(meter.state_dict())
    assert other.compute() == meter.compute()


def test_predicting_the_base_rate_gives_an_ne_of_one_and_a_calibration_of_one() -> None:
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    ne, calibration = NormalizedEntropy(), Calibration()
    ne.update(torch.full((5,), 0.4), labels)
    calibration.update(torch.full((5,), 0.4), labels)
    assert float(ne.compute()) == pytest.approx(1.0)
    assert float(calibration.compute()) == pytest.approx(1.0)


def test_labels_of_one_class_give_nan_not_a_crash() -> None:
    ne, calibration = NormalizedEntropy(), Calibration()
    ne.update(torch.tensor([0.2, 0.3]), torch.zeros(2))
    assert all(math.isnan(value) for value in measure(torch.tensor([0.2, math.nan]), torch.tensor([0.0, 1.0])))
    calibration.update(torch.tensor([0.2, 0.3]), torch.zeros(2))
    assert math.isnan(float(ne.compute()))
    assert math.isnan(float(calibration.compute()))


def _meter_on_a_rank(rank: int, world_size: int) -> dict[str, TaskQuality]:
    assert dist.group.WORLD is not None
    ranks = Ranks(rank, world_size, torch.device("cpu"), dist.group.WORLD)
    meter = QualityMeter(TASKS, torch.device("cpu"), ranks)
    if rank == 0:  # the other rank has nothing to add, and must not be waited for
        meter.add(*predictions(60, seed=5))
    first = meter.compute()
    if rank == 1:
        meter.add(*predictions(25, seed=6))
    return {**{f"first_{k}": v for k, v in first.items()}, **meter.compute()}


def test_meter_is_global_over_ranks_even_if_one_has_nothing() -> None:
    by_rank = run_distributed(_meter_on_a_rank, world_size=2)
    both = [predictions(60, seed=5), predictions(25, seed=6)]
    for quality in by_rank:
        for i, task in enumerate(TASKS):
            assert_same(quality[f"first_{task}"], expected_quality(both[:1], i))
            assert_same(quality[task], expected_quality(both, i))
