"""The kernels written for Hopper compute what the portable ones compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton import knobs

from benchmarks.attention.candidates import HOPPER_CONFIGS
from kernels.jagged.schedule import Schedule
from kernels.jagged_flash_attention import jagged_flash_attention, op
from kernels.jagged_flash_attention.hopper.one_group.config import OneGroupConfig
from kernels.jagged_flash_attention.tuning import choose_tiles
from tests.kernels.jagged_cases import LAYOUTS, Case, assert_kernel_matches_reference, with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

# Around the rows of a group (64) and of a tile (128). Where there are candidates, two of these users have nothing else.
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 300, 0, 20]

HEAD_DIMS = [32, 64, 128]
EVERY_CONFIG = [
    pytest.param(dim, {kernel: config}, id=f"{kernel}-{dim}-{i}")
    for kernel, table in HOPPER_CONFIGS.items()
    for dim, configs in table.items()
    for i, config in enumerate(configs)
]

EVERY_FORWARD = [param for param in EVERY_CONFIG if "hopper_forward" in param.values[1]]


def first_configs(head_dim: int) -> dict[str, Any]:
    """All kernels that there are."""
    return {kernel: table[head_dim][0] for kernel, table in HOPPER_CONFIGS.items() if head_dim in table}


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    return torch.device("cuda")


def use(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Any]) -> None:
    """Have these kernels compute, and portable ones the rest, whatever the table says."""
    chosen = {"hopper_forward": None, "hopper_dq": None, "hopper_dkv": None, **kernels}
    monkeypatch.setattr(op, "choose_tiles", lambda *args: replace(choose_tiles(*args), **chosen))


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """The names of the kernels that Triton launches meanwhile."""
    names: list[str] = []

    def enter(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(enter)
    try:
        yield names
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)


@pytest.mark.parametrize("has_candidates", [False, True], ids=["history", "candidates"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("head_dim", "kernels"), EVERY_CONFIG)
def test_masks(
    head_dim: int,
    kernels: dict[str, Any],
    causal: bool,
    has_candidates: bool,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    use(monkeypatch, kernels)
    case = Case(
        LENGTHS, head_dim=head_dim, dtype=torch.bfloat16, causal=causal, has_candidates=has_candidates, slack=1000
    )
    with launched() as names:
        assert_kernel_matches_reference(case, device)
    for kernel, config in kernels.items():
        kind = "one_group" if isinstance(config, OneGroupConfig) else "two_group"
        assert f"hopper_{kind}_{kernel.removeprefix('hopper_')}_kernel" in names


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_layouts_and_grouped_queries(
    head_dim: int, group: int, layout: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """What the copy engine reads in place, and what it has to be given a copy of."""
    use(monkeypatch, first_configs(head_dim))
    case = Case(LENGTHS, num_heads=4, group=group, head_dim=head_dim, dtype=torch.float16, layout=layout, slack=1000)
    assert_kernel_matches_reference(case, device)


@pytest.mark.parametrize(
    ("causal", "has_candidates", "group"), [(True, True, 1), (True, False, 2), (False, True, 2), (False, False, 1)]
)
@pytest.mark.parametrize(("head_dim", "kernels"), EVERY_CONFIG)
def test_a_user_of_nan_stays_alone(
    head_dim: int,
    kernels: dict[str, Any],
    causal: bool,
    has_candidates: bool,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """The copy engine reads past a user's end, into the next one."""
    use(monkeypatch, kernels)
    case = Case(
        [70, 50, 200, 30],
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        causal=causal,
        has_candidates=has_candidates,
        slack=1000,
    )
    *qkv, dout = case.make_qkvg(device)
    args, options = (case.make_offsets(device), case.max_seqlen), case.options(device)
    expected = with_gradients(jagged_flash_attention, qkv, dout, *args, **options)
    for x in (*qkv, dout):
        x[70:120] = float("nan")
    actual = with_gradients(jagged_flash_attention, qkv, dout, *args, **options)
    for name in expected:
        assert torch.equal(actual[name][:70], expected[name][:70]), name
        assert torch.equal(actual[name][120:], expected[name][120:]), name


@pytest.mark.parametrize(
    ("score_slope", "dtype"),
    [(-400.0, torch.bfloat16), (-30.0, torch.bfloat16), (-30.0, torch.float16), (30.0, torch.float16)],
    ids=["far", "a little", "a little, float16", "never"],
)
@pytest.mark.parametrize(("causal", "has_candidates"), [(True, True), (False, False)])
@pytest.mark.parametrize(("head_dim", "kernels"), EVERY_FORWARD)
def test_scores_that_rise_and_fall(
    head_dim: int,
    kernels: dict[str, Any],
    causal: bool,
    has_candidates: bool,
    score_slope: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """From tile to tile, the last keys first, the maximum rises past what the forward leaves room for, or not."""
    use(monkeypatch, kernels)
    case = Case(
        [700, 63, 300, 129],
        head_dim=head_dim,
        dtype=dtype,
        causal=causal,
        has_candidates=has_candidates,
        score_slope=score_slope,
        slack=1000,
    )
    assert_kernel_matches_reference(case, device)


@pytest.mark.parametrize(("head_dim", "kernels"), EVERY_FORWARD)
def test_rows_of_a_warp_do_not_meddle(
    head_dim: int, kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Neither maxima that rise, of the next user, whose rows share warps with the last of one, nor NaN and inf."""
    use(monkeypatch, kernels)
    case = Case([135, 50, 200, 30], head_dim=head_dim, dtype=torch.bfloat16, score_slope=20.0, slack=1000)
    q, k, v, _ = case.make_qkvg(device)
    args = (case.make_offsets(device), case.max_seqlen)
    expected = jagged_flash_attention(q, k, v, *args)
    changed = torch.zeros(len(q), dtype=torch.bool, device=device)
    changed[135:185] = True
    q[135:185] *= -30.0
    q[200], q[310] = float("nan"), float("inf")
    changed[[200, 310]] = True
    actual = jagged_flash_attention(q, k, v, *args)
    assert not torch.equal(actual[135:185], expected[135:185])
    assert actual[[200, 310]].isnan().all()
    assert torch.equal(actual[~changed], expected[~changed])


ONE_GROUP = {
    programs: dict.fromkeys(("hopper_forward", "hopper_dq", "hopper_dkv"), OneGroupConfig(3, programs))
    for programs in (1, 2)
}


@pytest.mark.parametrize(
    ("head_dim", "kernels"),
    [
        pytest.param(64, ONE_GROUP[1], id="one group"),
        pytest.param(64, ONE_GROUP[2], id="one group, two programs an SM"),
        pytest.param(128, first_configs(128), id="two groups"),
    ],
)
@pytest.mark.parametrize("num_users", [1, 900], ids=["fewer items than programs", "more items than programs"])
def test_programs_leave_the_lists_as_they_were(
    num_users: int, head_dim: int, kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """They count in a spare field what they have done: a list has to serve again, also in a graph."""
    use(monkeypatch, kernels)
    block = kernels["hopper_forward"].block
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 300, (num_users,), generator=generator).tolist()
    case = Case(lengths, head_dim=head_dim, dtype=torch.bfloat16)
    *qkv, dout = case.make_qkvg(device)
    offsets = case.make_offsets(device)
    schedule = Schedule(offsets, qkv[0].shape[0], case.max_seqlen)
    lists = schedule.for_training(block, block, block, 0, True)
    before = [tiles.clone() for tiles in lists]

    def attend(schedule: Schedule | None = schedule) -> dict[str, torch.Tensor]:
        return with_gradients(jagged_flash_attention, qkv, dout, offsets, case.max_seqlen, schedule=schedule)

    expected = attend()
    for _ in range(20):
        assert all(torch.equal(x, expected[name]) for name, x in attend().items())
    assert all(torch.equal(*pair) for pair in zip(lists, before, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = attend(Schedule(offsets, qkv[0].shape[0], case.max_seqlen))
    for _ in range(3):
        for x in actual.values():
            x.zero_()
        graph.replay()
        assert all(torch.equal(x, expected[name]) for name, x in actual.items())


@pytest.mark.parametrize("with_gradient", [False, True], ids=["one list", "all lists"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_forward_waits_for_its_lists(
    head_dim: int, with_gradient: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """It is launched while they are still being made, where those of another batch of as many rows were before."""
    monkeypatch.undo()  # poisoning memory would be a kernel between the two
    kernels = first_configs(head_dim)
    use(monkeypatch, kernels)
    lengths = torch.randint(0, 60, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    case = Case(lengths, head_dim=head_dim, dtype=torch.bfloat16)
    q, k, v, _ = case.make_qkvg(device)
    batches = [case.make_offsets(device), case.make_offsets(device, lengths[::-1])]
    expected = []
    for sign, offsets in zip((-1, 1), batches, strict=True):
        schedule = Schedule(offsets, q.shape[0], case.max_seqlen)
        schedule.query_tiles([kernels["hopper_forward"].block], causal=True)
        torch.cuda.synchronize()
        expected.append(jagged_flash_attention(sign * q, k, v, offsets, case.max_seqlen, schedule=schedule))
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    k.requires_grad_(with_gradient)

    def attend() -> None:
        for offsets, rows in zip(batches, expected, strict=True):
            q.neg_()
            out = jagged_flash_attention(q, k, v, offsets, case.max_seqlen).detach()
            wrong.add_((out != rows).sum())

    attend()
    for _ in range(50):
        attend()
    assert wrong.item() == 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            attend()
    for _ in range(10):
        graph.replay()
    assert wrong.item() == 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_schedule_on_two_streams_at_once(
    head_dim: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    use(monkeypatch, first_configs(head_dim))
    case = Case([250] * 400, head_dim=head_dim, dtype=torch.bfloat16)
    *qkv, dout = case.make_qkvg(device)
    offsets = case.make_offsets(device)
    schedule = Schedule(offsets, qkv[0].shape[0], case.max_seqlen)

    def attend() -> dict[str, torch.Tensor]:
        return with_gradients(jagged_flash_attention, qkv, dout, offsets, case.max_seqlen, schedule=schedule)

    expected = attend()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # so that the calls pile up, and then run at the same time
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(attend())
    torch.cuda.synchronize()
    for actual in results:
        assert all(torch.equal(x, expected[name]) for name, x in actual.items())
