"""The jagged block: what is compiled, and that a copy is a block of its own."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recsys.layers import block as block_module
from recsys.layers.block import JaggedBlock
from recsys.layers.mixers import Mixer

SIZES = {"width": 8, "num_heads": 2, "head_dim": 4, "ffn_width": 8, "dropout": 0.0}


class Values(Mixer):
    """In the place of attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: object) -> Tensor:
        return v * q.sigmoid() + k


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_done_token_by_token_is_compiled_if_asked_for(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def compile_(function: Callable[..., Tensor], *, dynamic: bool) -> Callable[..., Tensor]:
        assert dynamic, "every batch has another number of tokens"

        def recorded(*args: Tensor) -> Tensor:
            calls.append(function.__name__)
            return function(*args)

        return recorded

    monkeypatch.setattr(torch, "compile", compile_)
    block_module._compiled_halves.cache_clear()
    try:
        blocks = [JaggedBlock(Values(), **SIZES, compiled=compiled) for _ in range(2)]
        x = torch.randn(5, 8)
        for block in blocks:
            x = block(x, None)
    finally:
        block_module._compiled_halves.cache_clear()
    assert calls == (["_before_mixing", "_after_mixing"] * 2 if compiled else [])


def test_a_copy_of_a_compiled_block_has_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        block_module, "_compiled_halves", lambda: (block_module._before_mixing, block_module._after_mixing)
    )
    block = JaggedBlock(Values(), **SIZES, compiled=True)
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = torch.randn(5, 8)
    assert torch.equal(twin(x, None), x)
    assert not torch.equal(block(x, None), x)
