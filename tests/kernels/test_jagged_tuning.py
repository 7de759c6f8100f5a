"""The tile tables serve every head dim, dtype and architecture, and a file comes before them if it fits."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.attention.candidates import HOPPER_CONFIGS
from kernels.jagged_flash_attention import tuning
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.hopper.two_groups.config import TwoGroupBackwardConfig, TwoGroupForwardConfig
from kernels.jagged_flash_attention.tuning import Machine, Tile, Tiles, TunedRow, read_tuning, write_tuning

CUDA = torch.device("cuda", 0)
H200 = Machine("NVIDIA H200", (9, 0), "3.6.0")
TILES = Tiles(
    forward=Tile(32, 64, 8, 4, tma=True, max_registers=96),
    dkv=Tile(16, 32, 1, 1),
    dq=Tile(32, 16, 2, 1),
    short=Tile(64, 64, 4, 1),
    hopper_forward=TwoGroupForwardConfig(block_n=64, num_stages=4),
    hopper_dq=TwoGroupBackwardConfig(3),
    hopper_dkv=TwoGroupBackwardConfig(3),
)
OTHERS = Tiles(forward=Tile(16, 16, 1, 1), dkv=Tile(16, 16, 1, 1), dq=Tile(16, 16, 1, 1))
ONE_GROUP = replace(OTHERS, hopper_forward=OneGroupConfig(3, 2, block_n=128), hopper_dkv=OneGroupConfig(4, 2))
ROWS = (
    TunedRow(torch.bfloat16, 64, 512, True, TILES),
    TunedRow(torch.bfloat16, 64, 2048, True, ONE_GROUP),
    TunedRow(torch.float32, 16, 512, False, OTHERS),
)


@pytest.fixture(autouse=True)
def forget_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file but a test's own, and nothing remembered of it afterwards."""
    monkeypatch.setenv(tuning.FILE_VARIABLE, "")
    tuning._rows_of_files.clear()
    tuning._choose_once.cache_clear()
    yield
    tuning._rows_of_files.clear()
    tuning._choose_once.cache_clear()


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_compute_capability", lambda device: H200.compute_capability)
    monkeypatch.setattr(tuning, "find_machine", lambda device: H200)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three rows, which `choose_tiles` will read."""
    path = tmp_path / "tiles.json"
    write_tuning(path, H200, ROWS, "tune")
    monkeypatch.setenv(tuning.FILE_VARIABLE, str(path))
    return path


def choose(
    head_dim: int = 64, max_seqlen: int = 512, causal: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Tiles:
    return tuning.choose_tiles(head_dim, dtype, CUDA, max_seqlen, causal)


def from_table(head_dim: int = 64, max_seqlen: int = 512, causal: bool = True) -> Tiles:
    return tuning.table_tiles(head_dim, torch.bfloat16, H200.compute_capability, max_seqlen, causal)


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


def test_every_choice_for_hopper_is_one_that_is_tested() -> None:
    for row in tuning.HOPPER_16BIT:
        for kernel, configs in HOPPER_CONFIGS.items():
            choice = getattr(row.tiles, kernel)
            assert choice is None or choice in configs[row.head_dim], (row.head_dim, kernel)


# Files


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "tiles.json"
    write_tuning(path, H200, ROWS[::-1], "tune --fast")
    assert set(read_tuning(path, H200)) == set(ROWS)
    assert json.loads(path.read_text())["command"] == "tune --fast"
    write_tuning(path, H200, ROWS[:1], "again")
    assert read_tuning(path, H200) == ROWS[:1]
    assert [other.name for other in path.parent.iterdir()] == ["tiles.json"], "nothing temporary is left"


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    write_tuning(path, H200, ROWS, "tune")
    with pytest.raises(TypeError):
        write_tuning(path, H200, ROWS, command=object())  # type: ignore[arg-type]
    assert len(read_tuning(path, H200)) == 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("on_h200", "file")
def test_a_row_of_the_file_comes_before_the_table() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == choose(max_seqlen=1) == choose(head_dim=40) == TILES
        assert choose(max_seqlen=513) == choose(max_seqlen=2048) == ROWS[1].tiles
        assert choose(head_dim=16, causal=False, dtype=torch.float32) == OTHERS
        # No row: too long, another mask, another head dim, another dtype.
        assert choose(max_seqlen=2049) == from_table(max_seqlen=2049)
        assert choose(causal=False) == from_table(causal=False)
        assert choose(head_dim=32) == from_table(head_dim=32)
        assert choose(head_dim=65) == from_table(head_dim=65)
        assert choose(dtype=torch.float16) == from_table()


@pytest.mark.usefixtures("on_h200")
def test_the_file_is_read_once(file: Path) -> None:
    assert choose() == TILES
    file.unlink()
    assert choose(max_seqlen=7) == TILES


@pytest.mark.usefixtures("on_h200", "file")
def test_an_empty_variable_means_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.FILE_VARIABLE, "")
    assert tuning.tuning_path(H200) is None
    assert choose() == from_table()


def test_the_file_is_in_the_cache_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.FILE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "recsys" / "jagged_flash_attention" / "nvidia-h200-triton3.6.0.json"
    assert tuning.tuning_path(H200) == path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.tuning_path(H200) == tmp_path / ".cache" / path.relative_to(tmp_path)


@pytest.mark.usefixtures("on_h200")
def test_no_file_in_the_cache_is_nothing_to_warn_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.FILE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == from_table()


def changed(**changes: Any) -> str:
    """The content of a file of one row, with other values; "row", "tiles" and "forward" change those parts."""
    row = {
        "dtype": "bfloat16",
        "head_dim": 64,
        "max_seqlen": 512,
        "causal": True,
        "tiles": {
            "forward": {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2, **changes.pop("forward", {})},
            "dkv": {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2},
            "dq": {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2},
            **changes.pop("tiles", {}),
        },
        **changes.pop("row", {}),
    }
    machine = {"gpu": "NVIDIA H200", "compute_capability": [9, 0], "triton": "3.6.0"}
    return json.dumps({"format": 3, **machine, "command": "", "rows": [row], **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(gpu="NVIDIA A100"), "expected gpu NVIDIA H200; found NVIDIA A100"),
        (changed(compute_capability=[8, 0]), r"expected compute_capability \[9, 0\]; found \[8, 0\]"),
        (changed(triton="3.7.1"), "expected triton 3.6.0; found 3.7.1"),
        (changed(format=2), "expected format 3; found 2"),
        (changed(colour="red"), "expected the fields format, gpu, .* command, rows; found format, .*, colour"),
        (changed(rows={}), "expected a list of rows"),
        (changed(rows=[3]), r"rows\[0\] is 3; expected fields and values"),
        (changed(row={"dtype": "int8"}), r"rows\[0\].dtype is 'int8'; allowed are float32, float16, bfloat16"),
        (changed(row={"head_dim": 48}), "head_dim is 48; allowed are 16, 32, 64, 128, 256"),
        (changed(row={"max_seqlen": 0}), "max_seqlen is 0"),
        (changed(row={"causal": 1}), r"rows\[0\].causal is 1; expected bool"),
        (changed(row={"speed": 9}), r"rows\[0\] has other fields .* unknown are speed, missing are none"),
        (changed(row={"tiles": {"dq": {}}}), "unknown are none, missing are forward, dkv"),
        (changed(forward={"colour": 1}), r"rows\[0\].tiles.forward has other fields .* unknown are colour"),
        (changed(forward={"num_warps": 3}), r"rows\[0\].tiles.forward: .* num_warps=3; allowed are 1, 2, 4, 8, 16"),
        (changed(forward={"block_m": 8}), "block_m=8"),
        (changed(forward={"block_n": "64"}), "block_n is '64'; expected int"),
        (changed(forward={"tma": None}), "tma is None; expected bool"),
        (changed(forward={"max_registers": 7}), "max_registers=7"),
        (
            changed(tiles={"hopper_forward": {"num_stages": 1, "programs_per_sm": 2}}),
            "of one group with num_stages=1; allowed",
        ),
        (changed(tiles={"hopper_forward": {"num_stages": 2, "block_n": 32}}), "block_n=32; allowed are 64, 128"),
        (changed(tiles={"hopper_dq": {"num_stages": 1}}), "a backward of two groups with num_stages=1"),
        (changed(tiles={"hopper_dkv": {"num_stages": 4}}), "a backward of two groups with num_stages=4"),
        (changed(tiles={"hopper_dkv": {"num_stages": 2}}), "hopper_dkv with num_stages=2; allowed are 3"),
        (changed(tiles={"hopper_forward": {"num_stages": 3, "block_n": 128}}), "block_n=128, with num_stages=3"),
        (
            changed(tiles={"hopper_dq": {"num_stages": 2, "programs_per_sm": 2, "in_pairs": True}}),
            "hopper_dq with in_pairs=True",
        ),
        (
            changed(tiles={"hopper_dkv": {"num_stages": 2, "programs_per_sm": 2, "block_n": 128}}),
            "hopper_dkv with block_n=128; allowed are 64",
        ),
        (changed(rows=json.loads(changed())["rows"] * 2), "expected one row per .*; found two"),
        ("[]", "expected the fields .* found list"),
        ("{", "Expecting"),
        (b"\xff\xfe", "decode"),
        (None, "No such file"),
    ],
)
@pytest.mark.usefixtures("on_h200")
def test_a_file_that_does_not_fit_is_warned_of_once_and_ignored(
    content: str | bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.setenv(tuning.FILE_VARIABLE, str(path))
    with pytest.warns(RuntimeWarning, match=message) as caught:
        chosen = [choose(), choose(max_seqlen=9)]
    assert chosen == [from_table(), from_table(max_seqlen=9)]
    assert len(caught) == 1
    text = str(caught[0].message)
    assert str(path) in text
    assert "benchmarks.attention.tune` on NVIDIA H200 of compute capability 9.0 with triton 3.6.0" in text


def test_a_file_with_the_least_a_row_can_have_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(changed())
    tile = Tile(64, 32, 4, 2)
    assert read_tuning(path, H200) == (TunedRow(torch.bfloat16, 64, 512, True, Tiles(tile, tile, tile)),)


@pytest.mark.usefixtures("on_h200", "file")
@pytest.mark.parametrize("is_read_before", [False, True])
def test_compiled_code_sees_the_file(is_read_before: bool) -> None:
    """Reading it is no graph break, a length may be a symbol, and its rows make guards like the table's."""

    def add_block(x: Tensor, max_seqlen: int) -> Tensor:
        return x + tuning.choose_tiles(x.shape[-1], torch.bfloat16, CUDA, max_seqlen, True).forward.block_m

    if is_read_before:
        choose()
    torch._dynamo.reset()
    compiled = torch.compile(add_block, fullgraph=True, backend="eager", dynamic=True)
    for head_dim, max_seqlen in [(40, 100), (40, 300), (64, 512), (64, 2048), (64, 2049), (128, 512)]:
        expected = choose(head_dim, max_seqlen).forward.block_m
        assert compiled(torch.zeros(3, head_dim), max_seqlen)[0, 0] == expected
