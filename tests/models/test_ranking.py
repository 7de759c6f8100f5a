"""The ranking model: who sees whom, what the loss is, and that every part takes part."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.attention import MaskSpec, backends
from recsys.layers.mixers import MeanPoolMixer, TargetMixer, mix_context
from recsys.layers.sequence import join_layout
from recsys.models.config import MixerKind, ModelConfig
from recsys.models.ranking import table_dims
from tests.samples import SCHEMA, batch_of, small_model, small_model_config

MIXERS = pytest.mark.parametrize("mixer", list(MixerKind), ids=lambda kind: kind.value)


@MIXERS
def test_a_candidates_score_depends_on_its_own_user_only(mixer: MixerKind) -> None:
    task = small_model(small_model_config(mixer=mixer)).eval()
    together = task.model(batch_of([5, 0, 3], [2, 1, 3]))
    changed = batch_of([5, 0, 3], [2, 1, 3])
    ids = changed.sequences.values()
    ids[:5] = (ids[:5] + 7) % 50  # items of the first user's history
    other = task.model(changed)
    assert not torch.allclose(together[:2], other[:2])
    torch.testing.assert_close(together[2:], other[2:])


@MIXERS
def test_a_candidate_never_sees_another_candidate(mixer: MixerKind) -> None:
    task = small_model(small_model_config(mixer=mixer)).eval()
    before = task.model(batch_of([4, 2], [3, 1]))
    changed = batch_of([4, 2], [3, 1])
    first_candidate = 2 * 6  # behind the values of the two history keys
    changed.sequences.values()[first_candidate] = (changed.sequences.values()[first_candidate] + 1) % 50
    after = task.model(changed)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:])


def test_mean_pool_is_the_mean_over_the_visible_tokens() -> None:
    batch = batch_of([3, 0, 2], [2, 1, 1])
    sequence = join_layout(batch)
    v = torch.randn(sequence.total, 2, 4, dtype=torch.float64)
    for causal in (True, False):
        got = MeanPoolMixer()(v, v, v, mix_context(batch, sequence, MaskSpec(causal=causal)))
        start = 0
        for history, candidates in zip([3, 0, 2], [2, 1, 1], strict=True):
            for i in range(history + candidates):
                seen = list(range(history))
                if i < history and causal:
                    seen = seen[: i + 1]
                if i >= history:
                    seen = [*seen, i]
                expected = v[[start + j for j in seen]].mean(0)
                torch.testing.assert_close(got[start + i], expected)
            start += history + candidates


def test_target_attention_is_softmax_over_the_history() -> None:
    batch = batch_of([3, 0, 2], [2, 1, 1])
    sequence = join_layout(batch)
    q, k, v = torch.randn(3, sequence.total, 2, 16)
    got = TargetMixer(backends()["dense"])(q, k, v, mix_context(batch, sequence, MaskSpec()))
    start = 0
    for history, candidates in zip([3, 0, 2], [2, 1, 1], strict=True):
        seen = slice(start, start + history)
        assert not got[seen].any()
        for i in range(start + history, start + history + candidates):
            weights = (torch.einsum("hd,lhd->hl", q[i], k[seen]) / 4.0).softmax(dim=1)
            torch.testing.assert_close(got[i], torch.einsum("hl,lhd->hd", weights, v[seen]))
        start += history + candidates


@pytest.mark.parametrize("lengths", [([3, 0], [1, 2]), ([0, 0], [1, 2]), ([3, 1], [0, 0]), ([0, 0], [0, 0])])
@pytest.mark.parametrize("name", ["dense", "sdpa", "jagged", "jagged_flash"])
def test_target_attention_without_history_or_candidates(name: str, lengths: tuple[list[int], list[int]]) -> None:
    """Zero where there is no history; and every projection gets a gradient, or DDP would wait for it."""
    backend = backends()[name]
    if (reason := backend.unavailable(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    batch = batch_of(*lengths)
    sequence = join_layout(batch)
    q, k, v = (torch.randn(sequence.total, 2, 16).requires_grad_() for _ in range(3))
    out = TargetMixer(backend)(q, k, v, mix_context(batch, sequence, MaskSpec()))
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert bool(out.any()) == (sum(h * c for h, c in zip(*lengths, strict=True)) > 0)


def test_loss_is_the_mean_over_candidates_and_tasks() -> None:
    task = small_model(small_model_config())
    batch = batch_of([4, 0, 7], [1, 3, 2])
    loss, predictions = task(batch)
    expected = F.binary_cross_entropy_with_logits(predictions.logits, batch.labels)
    torch.testing.assert_close(loss, expected)
    assert predictions.logits.shape == (6, 2)
    assert not predictions.logits.requires_grad


@pytest.mark.parametrize(
    ("history", "candidates"),
    [([0], [1]), ([0, 0], [2, 1]), ([2], [0])],
    ids=["one-empty", "all-empty", "no-candidates"],
)
def test_empty_batches_give_a_finite_loss_and_a_gradient_for_every_parameter(
    history: list[int], candidates: list[int]
) -> None:
    task = small_model(small_model_config())
    loss, _ = task(batch_of(history, candidates))
    loss.backward()
    assert torch.isfinite(loss)
    missing = [name for name, p in task.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []


def test_every_parameter_learns() -> None:
    task = small_model(small_model_config())
    loss, _ = task(batch_of([6, 3, 9], [2, 3, 2]))
    loss.backward()
    still = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_dropout_is_for_training_only() -> None:
    task = small_model(small_model_config(dropout=0.5))
    batch = batch_of([4, 5], [2, 2])

    def logits() -> Tensor:
        return task.model(batch).detach()

    task.train()
    assert not torch.equal(logits(), logits())
    task.eval()
    assert torch.equal(logits(), logits())


def test_embedding_dims_by_table() -> None:
    config = small_model_config(embedding_dims={"item": 16})
    assert table_dims(config, SCHEMA) == {"item": 16, "action": 8, "country": 8}
    loss, _ = small_model(config)(batch_of([3], [1]))
    assert torch.isfinite(loss)
    with pytest.raises(ValueError, match=r"unknown tables \['items'\]: allowed are \['action', 'country', 'item'\]"):
        table_dims(small_model_config(embedding_dims={"items": 16}), SCHEMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 8}, "model.head_dim is 8: allowed are values from 16 to 256"),
        ({"num_layers": 0}, "model.num_layers is 0: allowed are values >= 1"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"embedding_dim": 6}, "multiples of 4"),
        ({"embedding_dims": {"item": 2}}, "item has embedding dimension 2"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)  # type: ignore[arg-type]
