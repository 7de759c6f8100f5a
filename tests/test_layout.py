"""Who may import whom, what gets installed, and that versions are written the same everywhere."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

from recsys.doctor import ROWS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("recsys", "kernels", "data")
ALLOWED = {
    "kernels": {"kernels", "torch", "triton"},
    "data": {"data", "torch", "torchrec", "numpy"},
}


def imported_modules(source: str, package: str) -> set[str]:
    """Top-level names of the modules that `source`, a module of `package`, imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else (node.module or "").split(".")[0])
    return names


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_imported_modules_sees_every_kind_of_import() -> None:
    source = "import os.path, torch\nfrom recsys.a import x\nfrom . import y\ndef f():\n    import kernels.a as z\n"
    assert imported_modules(source, "data") == {"os", "torch", "recsys", "data", "kernels"}


@pytest.mark.parametrize("package", ALLOWED)
def test_import_rules(package: str) -> None:
    allowed = ALLOWED[package] | set(sys.stdlib_module_names)
    modules = modules_of(package)
    assert modules, f"{package} has no modules"
    wrong = {
        str(path.relative_to(ROOT)): sorted(extra)
        for path in modules
        if (extra := imported_modules(path.read_text(), package) - allowed)
    }
    assert not wrong, f"{package} may import the standard library and {sorted(ALLOWED[package])} only"


def test_the_product_does_not_import_tests_or_benchmarks() -> None:
    for path in modules_of("recsys"):
        assert not imported_modules(path.read_text(), "recsys") & {"tests", "benchmarks", "train"}, path


def test_setup_cfg_installs_exactly_the_three_packages() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    include = config["options.packages.find"]["include"].split()
    found = set(find_packages(str(ROOT), include=include))
    assert {name.split(".")[0] for name in found} == set(PACKAGES)
    # A folder with modules but without __init__.py works from the checkout and is missing from an installation.
    with_modules = {".".join(path.parent.relative_to(ROOT).parts) for name in PACKAGES for path in modules_of(name)}
    assert found == with_modules


def pins(name: str) -> dict[str, str]:
    """Package to version in `requirements/<name>.txt`; for several lines of one package, the first."""
    result: dict[str, str] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        requirement = line.split("#")[0].split(";")[0].strip()
        if not requirement or requirement.startswith("-"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", requirement)
        assert match, f"{name}.txt: {requirement!r} is not an exact pin"
        result.setdefault(match[1], match[2])
    return result


@pytest.mark.parametrize("name", ["base", "dev", "constraints", "nodeps-cpu", "nodeps-cuda"])
def test_requirements_are_exact(name: str) -> None:
    assert pins(name)


def test_pins_are_the_versions_that_the_doctor_wants() -> None:
    base, cpu, cuda = pins("base"), pins("nodeps-cpu"), pins("nodeps-cuda")
    row = ROWS[0]
    assert (base["torch"], base["triton"]) == (row.torch, row.triton)
    assert base["torchmetrics"] in row.torchmetrics
    assert cpu["torchrec"] == cuda["torchrec"] == row.torchrec
    assert cpu["fbgemm-gpu-cpu"] == cuda["fbgemm-gpu"] == row.fbgemm


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=path[0], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["kernels", "data"])
@pytest.mark.parametrize("as_module", [False, True])
def test_a_foreign_package_that_shadows_ours_is_named(name: str, as_module: bool, tmp_path: Path) -> None:
    foreign = tmp_path / f"{name}.py" if as_module else tmp_path / name / "__init__.py"
    foreign.parent.mkdir(exist_ok=True)
    foreign.touch()
    result = run_python("import recsys", tmp_path, ROOT)
    assert result.returncode != 0
    assert f"recsys needs its own package '{name}' in {ROOT}" in result.stderr
    assert str(tmp_path / name) in result.stderr
    assert f"PYTHONPATH={ROOT}" in result.stderr


def test_import_recsys_is_light() -> None:
    result = run_python("import sys, recsys; assert not {'torch', 'hydra', 'kernels', 'data'} & set(sys.modules)", ROOT)
    assert result.returncode == 0, result.stderr
