"""The doctor tells what fits, what doesn't, and what is broken."""

from __future__ import annotations

import pytest

from recsys import doctor
from recsys.attention import backends

PINNED = {
    "torch": "2.13.0+cpu",
    "fbgemm": "1.8.0",
    "torchrec": "1.8.0",
    "triton": "3.7.1",
    "torchmetrics": "1.0.3",
}
GPU_HOST = {
    "torch": "2.11.0+cu130",
    "fbgemm": "1.6.0",
    "torchrec": "1.6.1",
    "triton": "3.6.0",
    "torchmetrics": "1.9.0",
}


@pytest.mark.parametrize(("installed", "row"), [(PINNED, 0), (GPU_HOST, 1)])
def test_tested_combinations_fit(installed: dict[str, str], row: int) -> None:
    assert doctor.nearest_row(installed) == (doctor.ROWS[row], [])


@pytest.mark.parametrize(
    ("installed", "row", "mismatches"),
    [
        ({**PINNED, "fbgemm": "1.9.0"}, 0, ["fbgemm 1.9.0 (wanted 1.8.0)"]),
        ({**GPU_HOST, "triton": None}, 1, ["triton missing (wanted 3.6.0)"]),
        ({**GPU_HOST, "torchmetrics": "1.4.0"}, 1, ["torchmetrics 1.4.0 (wanted 1.0.3 or 1.9.0)"]),
        ({**PINNED, "torchmetrics": "1.9.0"}, 0, ["torchmetrics 1.9.0 (wanted 1.0.3)"]),
    ],
)
def test_other_combinations_name_the_nearest(installed: dict[str, str | None], row: int, mismatches: list[str]) -> None:
    assert doctor.nearest_row(installed) == (doctor.ROWS[row], mismatches)


def test_report_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    report = capsys.readouterr().out
    for line in ("torch ", "torchrec ", "fbgemm ", "triton ", "cpu ", "gloo ", "Attention backends on cpu"):
        assert line in report
    for name, backend in backends().items():
        assert f"\n  {name} " in report, f"{backend} is not reported"
    assert "varlen        no: torch's FlashAttention runs on CUDA, not on cpu" in report
    assert report.endswith("Usable.\n")


def test_an_untested_combination_is_a_warning_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.versions.package_versions", lambda: {**PINNED, "torch": "2.12.0"})
    assert doctor.main() == 0
    report = capsys.readouterr().out
    assert "WARNING" in report
    assert "torch 2.12.0 (wanted 2.13.0)" in report


def test_a_broken_installation_fails_and_says_what_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no_such_module"))
    assert doctor.main() == 1
    report = capsys.readouterr().out
    assert "no_such_module ModuleNotFoundError: No module named 'no_such_module'" in report
    assert "make setup" in report


def test_no_backend_for_a_device_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in backends().values():
        monkeypatch.setattr(type(backend), "unavailable", lambda self, device: "switched off")
    assert doctor.main() == 1
