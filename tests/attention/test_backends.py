"""Every backend computes the same attention, forwards and backwards, without touching what it shouldn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.jagged import schedule
from kernels.jagged.tile_lists import make_tile_lists
from recsys.attention import AttentionBackend, JaggedLayout, MaskSpec, backends
from tests.attention.cases import (
    MASKS,
    USERS,
    Users,
    assert_as_exact_as_pytorch,
    make_cross_inputs,
    make_cross_layout,
    make_inputs,
    make_layout,
    make_mask,
    outputs_of,
)
from tests.conftest import INTERPRETED

ALL = sorted(backends())
CPU_DTYPES = [torch.float32, torch.bfloat16]
CUDA_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def usable(name: str, device: torch.device) -> AttentionBackend:
    backend = backends()[name]
    if (reason := backend.unavailable(device)) is not None:
        pytest.skip(f"{name}: {reason}")
    return backend


def dtypes_of(name: str, device: torch.device) -> list[torch.dtype]:
    if device.type == "cpu":
        return CPU_DTYPES
    return CUDA_DTYPES[:2] if name == "varlen" else CUDA_DTYPES


def test_the_backends_meant_for_this_device_are_usable(device: torch.device) -> None:
    """Otherwise the tests below would skip what they exist for."""
    meant = {"dense", "sdpa"} if device.type == "cpu" else set(ALL)
    if device.type == "cpu" and INTERPRETED:
        meant |= {"jagged", "jagged_flash"}
    reasons = {name: backends()[name].unavailable(device) for name in ALL}
    assert {name for name, reason in reasons.items() if reason is None} == meant, reasons


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mask_id", MASKS)
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_reference(name: str, mask_id: str, device: torch.device) -> None:
    backend = usable(name, device)
    interpreted = device.type == "cpu" and name.startswith("jagged")  # slow, and tests/kernels go through the rest
    for users_id in ["mixed"] if interpreted else USERS:
        users = USERS[users_id]
        layout, mask = make_layout(users, device), make_mask(users, mask_id, device)
        for dtype in dtypes_of(name, device):
            inputs = make_inputs(layout.total, device, dtype)
            assert_as_exact_as_pytorch(outputs_of(backend, inputs, layout, mask), inputs, layout, mask)


CROSS = {
    "mixed": ((2, 0, 3, 1, 0, 9), (7, 4, 0, 33, 0, 1)),
    "keys_all_equal": ((1, 4), (5, 5)),
    "nobody_has_keys": ((2, 1), (0, 0)),
    "nobody_asks": ((0, 0), (3, 1)),
    "nothing": ((0, 0), (0, 0)),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ALL)
def test_cross_attention_agrees_with_the_reference(name: str, device: torch.device) -> None:
    """Users without keys give zero, and gradients reach q, k and v even where nobody attends."""
    backend = usable(name, device)
    for queries, keys in CROSS.values():
        for offsets_dtype in (torch.int64, torch.int32):
            layout = make_cross_layout(queries, keys, device, offsets_dtype)
            for dtype in dtypes_of(name, device):
                inputs = make_cross_inputs(layout, device, dtype)
                actual = outputs_of(backend, inputs, layout, MaskSpec())
                assert_as_exact_as_pytorch(actual, inputs, layout, MaskSpec())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("name", ALL)
def test_cross_attention_agrees_with_the_reference_at_size(name: str, head_dim: int) -> None:
    device = torch.device("cuda")
    backend = usable(name, device)
    layout = make_cross_layout((130, 0, 64, 3, 20), (513, 30, 0, 700, 64), device, torch.int32)
    inputs = make_cross_inputs(layout, device, torch.bfloat16, head_dim)
    assert_as_exact_as_pytorch(outputs_of(backend, inputs, layout, MaskSpec()), inputs, layout, MaskSpec())


@pytest.mark.parametrize("name", ["dense", "sdpa", "jagged", "jagged_flash"])
def test_cross_attention_has_dropout(name: str, device: torch.device) -> None:
    backend = usable(name, device)
    layout = make_cross_layout((4, 3), (30, 20), device)
    inputs = make_cross_inputs(layout, device, torch.float32)
    ones = torch.ones_like(inputs.v)
    torch.manual_seed(0)
    out = backend.cross(inputs.q, inputs.k, ones, layout, dropout_p=0.25)
    assert not torch.allclose(out, torch.ones_like(out))
    torch.manual_seed(0)
    assert torch.equal(backend.cross(inputs.q, inputs.k, ones, layout, dropout_p=0.25), out)
    torch.testing.assert_close(backend.cross(inputs.q, inputs.k, ones, layout), torch.ones_like(out))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("mask_id", ["causal", "candidates", "causal_window"])
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_reference_at_size(name: str, mask_id: str, head_dim: int) -> None:
    """Users longer than a tile, so that every kernel goes round its loops."""
    device = torch.device("cuda")
    backend = usable(name, device)
    users = Users((513, 0, 130, 64, 1, 300), (20, 0, 2, 64, 1, 5))
    layout, mask = make_layout(users, device, torch.int32), make_mask(users, mask_id, device)
    inputs = make_inputs(layout.total, device, torch.bfloat16, num_heads=2, head_dim=head_dim)
    assert_as_exact_as_pytorch(outputs_of(backend, inputs, layout, mask), inputs, layout, mask)


@pytest.mark.parametrize("name", ALL)
def test_int32_offsets_and_another_scale(name: str, device: torch.device) -> None:
    backend = usable(name, device)
    users = USERS["mixed"]
    mask = make_mask(users, "candidates", device)
    inputs = make_inputs(sum(users.lengths), device, torch.bfloat16)
    out_64 = backend(inputs.q, inputs.k, inputs.v, make_layout(users, device, torch.int64), mask, scale=0.5)
    out_32 = backend(inputs.q, inputs.k, inputs.v, make_layout(users, device, torch.int32), mask, scale=0.5)
    torch.testing.assert_close(out_32, out_64, rtol=0, atol=0)
    # q twice as large under half the scale is the same attention, bit for bit.
    again = backend(inputs.q * 2, inputs.k, inputs.v, make_layout(users, device), mask, scale=0.25)
    torch.testing.assert_close(again, out_64, rtol=0, atol=0)
    assert not torch.equal(backend(inputs.q, inputs.k, inputs.v, make_layout(users, device), mask), out_64)


@pytest.mark.parametrize("lengths", [(0, 0, 0), (0,)])
@pytest.mark.parametrize("mask_id", ["causal", "candidates"])
@pytest.mark.parametrize("name", ALL)
def test_no_tokens_at_all(name: str, mask_id: str, lengths: tuple[int, ...], device: torch.device) -> None:
    """A rank may get a batch without a token; q, k, v must stay in the graph or DDP waits for gradients."""
    backend = usable(name, device)
    users = Users(lengths, lengths)
    inputs = make_inputs(0, device, torch.bfloat16)
    out, *gradients = outputs_of(backend, inputs, make_layout(users, device), make_mask(users, mask_id, device))
    assert out.shape == (0, 2, 16)
    assert all(gradient.shape == (0, 2, 16) for gradient in gradients)


@pytest.mark.parametrize("name", ALL)
def test_users_do_not_leak(name: str, device: torch.device) -> None:
    """Changing one user's tokens changes no other user's output, padding included."""
    backend = usable(name, device)
    users = USERS["mixed"]
    layout, mask = make_layout(users, device), make_mask(users, "full", device)
    inputs = make_inputs(layout.total, device, torch.bfloat16)
    before = backend(inputs.q, inputs.k, inputs.v, layout, mask)
    k, v = inputs.k.detach().clone(), inputs.v.detach().clone()
    k[:7] += 100.0
    v[:7] -= 100.0
    after = backend(inputs.q, k, v, layout, mask)
    assert not torch.equal(after[:7], before[:7])
    torch.testing.assert_close(after[7:], before[7:], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dense", "sdpa"])
def test_padding_behind_the_longest_user_changes_nothing(name: str, device: torch.device) -> None:
    """`max_seqlen` is a bound: it may be larger than the longest user."""
    backend = usable(name, device)
    users = USERS["mixed"]
    inputs = make_inputs(sum(users.lengths), device, torch.float32)
    for mask_id in MASKS:
        mask = make_mask(users, mask_id, device)
        tight = make_layout(users, device)
        loose = JaggedLayout(tight.offsets, tight.max_seqlen + 9, tight.total)
        for a, b in zip(
            outputs_of(backend, inputs, tight, mask), outputs_of(backend, inputs, loose, mask), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "sdpa", "jagged", "jagged_flash"])
def test_dropout_keeps_the_mean_and_only_acts_when_asked(name: str, device: torch.device) -> None:
    backend = usable(name, device)
    users = Users((30,) * 8, (4,) * 8)
    layout, mask = make_layout(users, device), make_mask(users, "candidates", device)
    inputs = make_inputs(layout.total, device, torch.float32)
    ones = torch.ones_like(inputs.v)
    torch.manual_seed(0)
    out = backend(inputs.q, inputs.k, ones, layout, mask, dropout_p=0.25)
    assert not torch.allclose(out, torch.ones_like(out))
    assert not torch.equal(backend(inputs.q, inputs.k, ones, layout, mask, dropout_p=0.25), out)
    torch.manual_seed(0)
    assert torch.equal(backend(inputs.q, inputs.k, ones, layout, mask, dropout_p=0.25), out)
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    torch.testing.assert_close(backend(inputs.q, inputs.k, ones, layout, mask), torch.ones_like(out))


@pytest.mark.parametrize("name", ["sdpa", "jagged", "jagged_flash"])
def test_large_scores_in_float16(name: str, device: torch.device) -> None:
    """q k^T passes what float16 can hold; times the scale it doesn't."""
    backend = usable(name, device)
    layout, mask = make_layout(USERS["one_user"], device), make_mask(USERS["one_user"], "causal", device)
    q = torch.full((layout.total, 1, 64), 40.0, device=device, dtype=torch.float16)
    v = torch.ones_like(q)
    torch.testing.assert_close(backend(q, q, v, layout, mask), v)


@pytest.mark.parametrize("name", ALL)
def test_autocast_decides_the_dtype(name: str, device: torch.device) -> None:
    """fp32 q, k, v (after a norm, say) compute in autocast's dtype under every backend: losses agree."""
    backend = usable(name, device)
    users = USERS["one_user"]
    layout, mask = make_layout(users, device), make_mask(users, "candidates", device)
    inputs = make_inputs(layout.total, device, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = backend(inputs.q, inputs.k, inputs.v, layout, mask)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), (inputs.q, inputs.k, inputs.v))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    rounded = [x.detach().bfloat16() for x in (inputs.q, inputs.k, inputs.v)]
    torch.testing.assert_close(out, backend(*rounded, layout, mask), rtol=0, atol=0)


def test_layers_of_a_step_share_the_mask() -> None:
    """`visible_pairs` is the largest thing sdpa makes: one per step, not per layer; one per mask."""
    users, device = USERS["mixed"], torch.device("cpu")
    layout, mask = make_layout(users, device), make_mask(users, "candidates", device)
    inputs = make_inputs(layout.total, device, torch.float32)
    for name in ("sdpa", "dense", "sdpa"):
        backends()[name](inputs.q, inputs.k, inputs.v, layout, mask)
    assert len(layout._cache) == 1
    wider = make_mask(Users(users.lengths, (0, 1, 1, 0, 1)), "candidates", device)
    a = backends()["sdpa"](inputs.q, inputs.k, inputs.v, layout, mask)
    b = backends()["sdpa"](inputs.q, inputs.k, inputs.v, layout, wider)
    assert len(layout._cache) == 2
    assert not torch.equal(a, b)


def test_layers_of_a_step_share_the_schedule(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """One launch makes the tile lists of all layers, forward and backward; another mask has its own."""
    num_launches = 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal num_launches
        num_launches += 1
        return make_tile_lists(*args)

    monkeypatch.setattr(schedule, "make_tile_lists", counted)
    backend, users = backends()["jagged_flash"], USERS["mixed"]
    layout, mask = make_layout(users, kernel_device), make_mask(users, "candidates", kernel_device)
    inputs = make_inputs(layout.total, kernel_device, torch.float32)
    for _ in range(3):
        outputs_of(backend, inputs, layout, mask)
    assert num_launches == 1
    outputs_of(backend, inputs, layout, make_mask(users, "causal", kernel_device))
    assert num_launches == 2


def test_a_mask_that_hides_nothing_more_is_dropped() -> None:
    layout = make_layout(USERS["mixed"], torch.device("cpu"))
    no_targets = torch.zeros(5, dtype=torch.int64)
    assert MaskSpec(window=33).simplified(layout).window is None
    assert MaskSpec(window=32).simplified(layout).window == 32
    assert MaskSpec(num_targets=no_targets, total_targets=0).simplified(layout).num_targets is None
    assert MaskSpec(num_targets=no_targets).simplified(layout).num_targets is no_targets  # unknown on the host


@pytest.mark.gpu
@pytest.mark.parametrize("mask_id", MASKS)
@pytest.mark.parametrize("name", ALL)
def test_nothing_waits_for_the_device(name: str, mask_id: str) -> None:
    device = torch.device("cuda")
    backend = usable(name, device)
    users = USERS["mixed"]
    inputs = make_inputs(sum(users.lengths), device, torch.bfloat16)
    across = make_cross_layout(*CROSS["mixed"], device)
    cross_inputs = make_cross_inputs(across, device, torch.bfloat16)
    outputs_of(backend, inputs, make_layout(users, device), make_mask(users, mask_id, device))  # compile first
    outputs_of(backend, cross_inputs, make_cross_layout(*CROSS["mixed"], device), MaskSpec())
    layout, mask = make_layout(users, device), make_mask(users, mask_id, device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_of(backend, inputs, layout, mask)
        outputs_of(backend, cross_inputs, across, MaskSpec())
    finally:
        torch.cuda.set_sync_debug_mode("default")
