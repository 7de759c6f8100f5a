"""Choosing a backend, and what it says when it can't."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from recsys.attention import AttentionConfig, BackendName, CrossLayout, JaggedLayout, MaskSpec, backends, resolve
from recsys.attention.interface import Request

CPU = torch.device("cpu")
CONFIG_DIR = Path(__file__).parents[2] / "configs" / "attention"
OFFSETS = torch.tensor([0, 2, 5])
LAYOUT = JaggedLayout(OFFSETS, max_seqlen=3, total=5)


def request(device: torch.device = CPU, **changes: object) -> Request:
    values = {"dtype": torch.bfloat16, "head_dim": 64, "mask": MaskSpec(), "dropout_p": 0.0, **changes}
    return Request(device, **values)  # type: ignore[arg-type]


def test_every_name_but_auto_is_a_backend() -> None:
    assert {*backends(), "auto"} == {member.value for member in BackendName}
    assert all(name == backend.name for name, backend in backends().items())


def test_auto_says_what_it_chose(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        backend = resolve(BackendName.auto, device)
    assert backend.name == {"cpu": "sdpa", "cuda": "jagged_flash"}[device.type]
    assert backend.name in caplog.text


def test_a_name_is_taken_literally() -> None:
    assert resolve("dense", "cpu").name == "dense"
    assert resolve(BackendName.sdpa, "cpu").name == "sdpa"


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"no attention backend 'flash': allowed are auto, dense, sdpa, varlen"):
        resolve("flash", "cpu")


def test_unavailable_backend_names_the_usable_ones() -> None:
    with pytest.raises(ValueError, match=r"'varlen' can't run on cpu: .*CUDA.*Usable on this device: .*sdpa, dense"):
        resolve("varlen", "cpu")


def test_jagged_flash_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.jagged.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1.*Usable on this device: sdpa, dense"):
        resolve("jagged_flash", "cpu")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("dense", {"dtype": torch.float64}, "float64"),
        ("sdpa", {"dtype": torch.float64}, "float64"),
        ("varlen", {"dtype": torch.float32}, "takes float16 and bfloat16"),
        ("varlen", {"head_dim": 20}, "multiples of 8 up to 256"),
        ("varlen", {"head_dim": 264}, "multiples of 8 up to 256"),
        ("varlen", {"dropout_p": 0.1}, "no dropout"),
        ("varlen", {"mask": MaskSpec(num_targets=torch.zeros(2))}, "total_targets"),
        ("jagged_flash", {"head_dim": 8}, "16 to 256"),
        ("jagged_flash", {"dtype": torch.float64}, "float64"),
        ("jagged", {"head_dim": 257}, "up to 256"),
        ("jagged", {"dtype": torch.float64}, "float64"),
    ],
)
def test_what_a_backend_refuses(name: str, changes: dict[str, object], reason: str) -> None:
    refusal = backends()[name].refuses(request(**changes))
    assert refusal is not None
    assert reason in refusal


def test_all_but_varlen_have_dropout() -> None:
    refusing = [name for name, b in backends().items() if b.refuses(request(dropout_p=0.1)) is not None]
    assert refusing == ["varlen"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask": MaskSpec(causal=False, window=7)},
        {"mask": MaskSpec(window=7, num_targets=torch.zeros(2), total_targets=0)},
        {"head_dim": 256, "dtype": torch.float16},
    ],
)
def test_what_every_backend_accepts(changes: dict[str, object]) -> None:
    assert {name: b.refuses(request(**changes)) for name, b in backends().items()} == dict.fromkeys(backends())


def test_a_refused_call_names_the_backends_that_can(kernel_device: torch.device) -> None:
    layout = JaggedLayout(OFFSETS.to(kernel_device), 3, 5)
    q = torch.randn(5, 2, 8, device=kernel_device)
    with pytest.raises(ValueError, match=r"'jagged_flash' can't do this: the head dim is 8.*can .*: sdpa, dense$"):
        backends()["jagged_flash"](q, q, q, layout, MaskSpec())


def test_jagged_wants_the_number_of_scores(kernel_device: torch.device) -> None:
    q = torch.randn(5, 2, 16, device=kernel_device)
    with pytest.raises(
        ValueError, match=r"'jagged' can't do this: the layout has no total_scores.*: jagged_flash, sdpa, dense$"
    ):
        backends()["jagged"](q, q, q, JaggedLayout(OFFSETS.to(kernel_device), 3, 5), MaskSpec())
    with pytest.raises(ValueError, match="total_scores is 34: .* at most 3 each, is a multiple of 8 from 40 to 40"):
        JaggedLayout(OFFSETS, 3, 5, total_scores=34)


def test_cross_attention_refuses_what_does_not_fit(kernel_device: torch.device) -> None:
    layout = JaggedLayout(OFFSETS.to(kernel_device), 3, 5)
    with pytest.raises(ValueError, match="queries are of 2 users, the keys of 1: they must be the same users"):
        CrossLayout(layout, JaggedLayout(OFFSETS[[0, 2]], 5, 5))
    for wrong in (48, 34):
        with pytest.raises(
            ValueError, match=f"total_scores is {wrong}: .* at most 3 and 3, is a multiple of 8 from 0 to 40"
        ):
            CrossLayout(layout, layout, total_scores=wrong)
    across = CrossLayout(layout, layout)
    q = torch.randn(5, 2, 16, device=kernel_device)
    for name, arguments, message in (
        ("sdpa", (q, q[:4], q[:4]), "k has 4 tokens, its layout 5"),
        ("sdpa", (q, q, q[..., :8]), r"they must be \(N, H, D\) and twice \(L, H, D\)"),
        ("dense", (q, q.half(), q), "they must be the same"),
        ("jagged", (q, q, q), "'jagged' can't do this: the layout has no total_scores"),
    ):
        with pytest.raises(ValueError, match=message):
            backends()[name].cross(*arguments, across)


def test_a_call_that_nobody_can_serve_says_so() -> None:
    q = torch.randn(5, 2, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64.*No backend can on this device"):
        backends()["dense"](q, q, q, LAYOUT, MaskSpec())


Q = torch.randn(5, 2, 16)


@pytest.mark.parametrize(
    ("q", "k", "mask", "dropout_p", "message"),
    [
        (Q, Q[:, :1], MaskSpec(), 0.0, r"shapes \(5, 2, 16\), \(5, 1, 16\)"),
        (Q[0], Q[0], MaskSpec(), 0.0, r"\(L, H, D\)"),
        (Q[:4], Q[:4], MaskSpec(), 0.0, r"q has 4 tokens, the layout 5"),
        (Q, Q.half(), MaskSpec(), 0.0, r"dtypes torch.float32, torch.float16"),
        (Q.int(), Q.int(), MaskSpec(), 0.0, r"allowed are floating-point dtypes"),
        (Q, Q, MaskSpec(num_targets=torch.zeros(3)), 0.0, r"num_targets has shape \(3,\): it must be \(2,\)"),
        (Q, Q, MaskSpec(num_targets=torch.zeros(2, device="meta")), 0.0, r"lie on cpu, meta"),
        (Q, Q, MaskSpec(), 1.0, r"dropout_p is 1.0"),
    ],
)
def test_bad_calls(q: torch.Tensor, k: torch.Tensor, mask: MaskSpec, dropout_p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backends()["dense"](q, k, q, LAYOUT, mask, dropout_p=dropout_p)


@pytest.mark.parametrize(
    ("offsets", "max_seqlen", "total", "message"),
    [
        (torch.tensor([0.0, 1.0]), 1, 1, r"allowed are int32 and int64"),
        (torch.zeros(0, dtype=torch.int64), 0, 0, r"shape \(B \+ 1,\)"),
        (OFFSETS, 2, 5, r"2 users of at most max_seqlen=2 tokens can't have total=5"),
        (OFFSETS, 3, -1, r"total=-1"),
    ],
)
def test_bad_layouts(offsets: torch.Tensor, max_seqlen: int, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JaggedLayout(offsets, max_seqlen, total)


def test_bad_windows_and_dropout() -> None:
    with pytest.raises(ValueError, match=r"window is 0: allowed are None and integers >= 1"):
        MaskSpec(window=0)
    with pytest.raises(ValueError, match=r"attention.window is -3: allowed are null and integers >= 1"):
        AttentionConfig(window=-3)
    with pytest.raises(ValueError, match=r"attention.dropout is 1.0"):
        AttentionConfig(dropout=1.0)


@pytest.mark.parametrize("name", [member.value for member in BackendName])
def test_config_files_fit_the_schema(name: str) -> None:
    values = OmegaConf.load(CONFIG_DIR / f"{name}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AttentionConfig), values))
    assert isinstance(config, AttentionConfig)
    assert config == AttentionConfig(backend=BackendName(name))
    assert set(values) == set(AttentionConfig.__dataclass_fields__)
