"""The jagged block: what is compiled."""

from typing import Any

import pytest
import torch

from recsys.layers.block import JaggedBlock
from recsys.layers.mixers import MeanPoolMixer


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_done_token_by_token_is_compiled_if_asked_for(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def compile_(function: Any, *, dynamic: bool) -> Any:
        assert dynamic, "every batch has another number of tokens"
        given.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    sizes = {"width": 8, "num_heads": 2, "head_dim": 4, "ffn_width": 8, "dropout": 0.0}
    block = JaggedBlock(MeanPoolMixer(), **sizes, compiled=compiled)
    assert given == (["_before_mixing", "_after_mixing"] if compiled else [])
    assert not any("mixing" in name for name in block.state_dict())
