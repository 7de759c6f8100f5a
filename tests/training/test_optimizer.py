"""AdamW of the dense part: the same steps in one kernel as in many."""

import pytest
import torch
from torch import Tensor, nn

from recsys.training.optimizer import DenseOptimizer, DenseOptimizerConfig


def steps(device: str, clip_norm: float | None) -> tuple[DenseOptimizer, list[Tensor]]:
    """The optimizer, and the parameters of a small layer after three steps."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    gradients = [[torch.randn_like(p) for p in layer.parameters()] for _ in range(3)]
    layer.to(device)
    optimizer = DenseOptimizer(layer.named_parameters(), DenseOptimizerConfig(lr=0.1, clip_norm=clip_norm), max_steps=3)
    for of_step in gradients:
        for parameter, gradient in zip(layer.parameters(), of_step, strict=True):
            parameter.grad = gradient.to(device)
        optimizer.step()
    return optimizer, [p.detach().cpu() for p in layer.parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_one_kernel_on_a_gpu_does_what_many_do_on_a_cpu(clip_norm: float | None) -> None:
    fused, actual = steps("cuda", clip_norm)
    assert all(group["fused"] for group in fused.param_groups)
    plain, expected = steps("cpu", clip_norm)
    assert not any(group["fused"] for group in plain.param_groups)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_clipped_over_all_parameters_and_vectors_do_not_decay() -> None:
    _, clipped = steps("cpu", 1e-9)
    _, free = steps("cpu", None)
    assert not torch.equal(clipped[0], free[0])
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    optimizer = DenseOptimizer(layer.named_parameters(), DenseOptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight, bias = (p.detach().clone() for p in layer.parameters())
    optimizer.step()
    torch.testing.assert_close(layer.weight, weight * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, bias)
