"""The tile tables serve every head dim, dtype and architecture."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton

from kernels.jagged_flash_attention import tuning


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_head_dim_has_tiles(
    dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_compute_capability", lambda device: capability)
    shared_memory = (227 if capability[0] == 9 else 99) * 1024
    calls = itertools.product(range(16, 257), [1, 512, 513, 1024, 1025, 65_536], [True, False])
    for head_dim, max_seqlen, causal in calls:
        tiles = tuning.choose_tiles(head_dim, dtype, torch.device("cuda"), max_seqlen, causal)
        assert tiles.hopper_forward is None or capability[0] == 9
        row = triton.next_power_of_2(head_dim) * dtype.itemsize
        for tile in (tiles.forward, tiles.dkv, tiles.dq):
            assert min(tile.block_m, tile.block_n) >= 16, "less than tl.dot takes"
            # Both operands that stay and both that are streamed: the least a backward kernel needs.
            streamed = 2 * min(tile.block_m, tile.block_n) * tile.num_stages
            assert (2 * max(tile.block_m, tile.block_n) + streamed) * row <= shared_memory


def test_only_16_bit_types_use_tensor_core_tiles() -> None:
    assert tuning.select_table(torch.bfloat16, (9, 0)) is tuning.HOPPER_16BIT
    assert tuning.select_table(torch.bfloat16, (8, 6)) is tuning.PORTABLE_16BIT
    assert tuning.select_table(torch.float32, (9, 0)) is tuning.PORTABLE_32BIT
