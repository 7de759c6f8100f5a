"""Tile lists against a model in plain Python: every tile once, the most work first, zeros after the last."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.jagged import schedule, tile_lists
from kernels.jagged.schedule import Schedule
from kernels.jagged.tile_lists import make_tile_lists, tile_capacity
from tests.kernels.jagged_cases import LENGTHS

RNG = random.Random(0)
BATCHES: dict[str, list[int]] = {
    **LENGTHS,
    "all_equal": [48] * 9,
    "group_not_full": [RNG.randrange(70) for _ in range(131)],
    "very_long_among_short": [5, 1, 1700, 30, 0, 16],
    "lognormal": [min(300, int(RNG.lognormvariate(3, 1))) for _ in range(40)],
    **{f"random_{i}": [RNG.choice([0, RNG.randrange(200)]) for _ in range(RNG.randrange(1, 20))] for i in range(5)},
}


@pytest.fixture
def poisoned_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with -1, so that a row that nobody writes can't pass for zero."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: new_empty(*args, **options).fill_(-1))


def to_offsets(lengths: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def model_list(
    block: int,
    lengths: list[int],
    *,
    others: list[int] | None = None,
    targets: list[int] | None = None,
    history: list[int] | None = None,
    from_end: bool,
    more_than: int = 0,
    at_most: int = 2**31 - 1,
) -> Tensor:
    """The list as the format has it."""
    others = lengths if others is None else others
    targets = [0] * len(lengths) if targets is None else targets
    history = [n - t for n, t in zip(lengths, targets, strict=True)] if history is None else history
    rows = []
    for user, n in enumerate(lengths):
        num_tiles = -(-n // block) if more_than < n <= at_most else 0
        for tile in range(num_tiles):
            order = (-num_tiles, user, -tile if from_end else tile)
            row = [sum(lengths[:user]), n, sum(others[:user]), others[user], tile, history[user], user, 0]
            rows.append((order, row))
    capacity = len(lengths) + (0 if at_most <= block else sum(lengths) // block)
    sorted_rows = [row for _, row in sorted(rows)]
    assert len(sorted_rows) <= capacity
    return torch.tensor(sorted_rows + [[0] * 8] * (capacity - len(rows)), dtype=torch.int32).reshape(capacity, 8)


def make_schedule(
    lengths: list[int], device: torch.device, *, targets: list[int] | None = None, slack: int = 0
) -> Schedule:
    num_targets = None if targets is None else torch.tensor(targets, dtype=torch.int64, device=device)
    max_seqlen = max(lengths, default=0) + slack
    return Schedule(to_offsets(lengths, device), sum(lengths), max_seqlen, num_targets=num_targets)


def assert_lists_follow_model(made: Schedule, blocks: list[int], lengths: list[int], **options: Any) -> None:
    """All lists of self attention."""
    for actual, block in zip(made.query_tiles(blocks, True), blocks, strict=True):
        assert torch.equal(actual.cpu(), model_list(block, lengths, from_end=True, **options))
    for actual, block in zip(made.key_tiles(blocks, True), blocks, strict=True):
        assert torch.equal(actual.cpu(), model_list(block, lengths, from_end=False, **options))
    for make in (made.query_tiles, made.key_tiles):
        for actual, block in zip(make(blocks, False), blocks, strict=True):
            assert torch.equal(actual.cpu(), model_list(block, lengths, from_end=False, **options))


@pytest.mark.usefixtures("poisoned_lists")
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_lists_follow_the_model(lengths: list[int], kernel_device: torch.device) -> None:
    """Self attention, with candidates and without, three blocks with one launch."""
    targets = [RNG.randint(0, n) for n in lengths]
    assert_lists_follow_model(make_schedule(lengths, kernel_device), [16, 64, 32], lengths)
    made = make_schedule(lengths, kernel_device, targets=targets, slack=37)
    assert_lists_follow_model(made, [16], lengths, targets=targets)


@pytest.mark.usefixtures("poisoned_lists")
@pytest.mark.parametrize(
    "limits",
    [
        {"MAX_TILES_PER_STEP": 64, "MAX_USERS_PER_GROUP": 16},
        {"MAX_CHUNK": 128},
        {"MAX_TILES_PER_STEP": 16, "MAX_USERS_PER_GROUP": 4, "MAX_CHUNK": 128},
        {"MAX_INT32_SUM": 0},
    ],
    ids=["several_steps", "several_chunks", "both", "int64_sums"],
)
@pytest.mark.parametrize("name", ["group_not_full", "very_long_among_short", "lognormal"])
def test_large_batches_in_small(
    name: str, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """What longer users and more of them need, with the limits moved down instead."""
    lengths = [min(n, 250) for n in BATCHES[name]]
    made = make_schedule(lengths, kernel_device, slack=200)
    for limit, value in limits.items():
        monkeypatch.setattr(tile_lists, limit, value)
    monkeypatch.setattr(tile_lists, "_program_shape", tile_lists._program_shape.__wrapped__)  # nothing remembered
    assert_lists_follow_model(made, [16], lengths)


@pytest.mark.usefixtures("poisoned_lists")
@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention(causal: bool, kernel_device: torch.device) -> None:
    queries, keys = [5, 0, 40, 17, 3, 0], [0, 7, 100, 16, 130, 0]
    made = Schedule(
        to_offsets(queries, kernel_device),
        sum(queries),
        max(queries),
        key_offsets=to_offsets(keys, kernel_device, torch.int32),
        total_keys=sum(keys),
        max_key_seqlen=max(keys),
    )
    for block, actual in zip((16, 32), made.query_tiles([16, 32], causal), strict=True):
        assert torch.equal(actual.cpu(), model_list(block, queries, others=keys, history=keys, from_end=causal))
    (actual,) = made.key_tiles([32], causal)
    assert torch.equal(actual.cpu(), model_list(32, keys, others=queries, from_end=False))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_index_vectors(dtype: torch.dtype, contiguous: bool, kernel_device: torch.device) -> None:
    lengths, targets = [40, 3, 16], [2, 3, 0]
    offsets = to_offsets(lengths, kernel_device, dtype)
    num_targets = torch.tensor(targets, dtype=dtype, device=kernel_device)
    if not contiguous:
        offsets = offsets.repeat_interleave(2)[::2]
        num_targets = num_targets.repeat_interleave(2)[::2]
    (actual,) = Schedule(offsets, 59, 40, num_targets=num_targets).query_tiles([16], True)
    assert torch.equal(actual.cpu(), model_list(16, lengths, targets=targets, from_end=True))


@pytest.mark.usefixtures("poisoned_lists")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("causal", [True, False])
def test_wrong_values_stay_inside(seed: int, causal: bool, kernel_device: torch.device) -> None:
    """Whatever offsets and num_targets hold, rows point inside the tensors and no list reaches into the next."""
    rng = random.Random(seed)
    total, max_seqlen, num_users = 300, 90, 20
    reach = [2**62, 1000, 310][seed % 3]
    offsets = torch.tensor([rng.randint(-reach // 2, reach) for _ in range(num_users + 1)], device=kernel_device)
    targets = torch.tensor([rng.randint(-reach, reach) for _ in range(num_users)], device=kernel_device)
    if seed == 5:  # the most tiles there can be: far more than the list takes
        offsets = torch.tensor([0, total] * (num_users // 2) + [0], device=kernel_device)
    made = Schedule(offsets, total, max_seqlen, num_targets=targets)
    blocks = [16, 32, 64]
    for block, tiles in zip(blocks, made.query_tiles(blocks, causal), strict=True):
        (alone,) = Schedule(offsets, total, max_seqlen, num_targets=targets).query_tiles([block], causal)
        assert torch.equal(tiles, alone)
        start, length, other_start, other_length, tile, history, user, zero = tiles.cpu().unbind(1)
        assert (start >= 0).all()
        assert (start + length <= total).all()
        assert ((length >= 0) & (length <= max_seqlen)).all()
        assert torch.equal(start, other_start)
        assert torch.equal(length, other_length)
        assert ((tile >= 0) & (tile * block < length.clamp(min=1))).all()
        assert ((history >= 0) & (history <= length)).all()
        assert ((user >= 0) & (user < num_users)).all()
        assert (zero == 0).all()


def test_no_users_but_rows(kernel_device: torch.device) -> None:
    """Wrong as well: nobody owns the rows. The list has room for their tiles, and no work."""
    (tiles,) = Schedule(torch.zeros(1, dtype=torch.int64, device=kernel_device), 100, 9).query_tiles([16], True)
    assert torch.equal(tiles.cpu(), torch.zeros(6, 8, dtype=torch.int32))


def test_lists_are_made_once(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    launches: list[list[int]] = []

    def counted(*args: Any) -> Tensor:
        launches.append(args[7])
        return make_tile_lists(*args)

    monkeypatch.setattr(schedule, "make_tile_lists", counted)
    made = make_schedule([40, 3, 16], kernel_device)
    first, _, again = made.query_tiles([16, 32, 16], True)
    assert launches == [[16, 32]], "equal blocks once, all with one launch"
    assert again is first
    assert made.query_tiles([16], True)[0] is first
    made.query_tiles([16, 64], True)
    assert launches == [[16, 32], [64]]
    made.key_tiles([16, 64], True)
    assert launches[2:] == [[16, 64]], "causal, keys are in another order than queries"
    assert made.key_tiles([16], False)[0] is made.query_tiles([16], False)[0]
    assert launches[3:] == [[16]]

    made.for_training(16, 32, 64, 16, True)
    assert launches[4:] == [[32, 64, 16]], "one launch for what is missing"


def test_every_stream_and_graph_has_lists_of_its_own(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Kernels count in them: two that run at the same time must not have the same."""
    made = make_schedule([40, 3, 16], kernel_device)
    owner: tuple[int, int] | None = (7, 0)
    monkeypatch.setattr(schedule, "_owner_of_lists", lambda x: owner)

    def get() -> Tensor:
        return made.query_tiles([16], True)[0]

    of_stream = get()
    owner = (7, 1)
    of_graph = get()
    owner = (7, 2)
    of_next_graph = get()
    assert len({of_stream.data_ptr(), of_graph.data_ptr(), of_next_graph.data_ptr()}) == 3
    assert torch.equal(of_stream, of_graph)
    assert get() is of_next_graph
    owner = (7, 0)
    assert get() is of_stream
    owner = None  # it can't be told: nothing is kept
    assert get() is not get()


@pytest.mark.usefixtures("poisoned_lists")
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("causal", [True, False])
def test_lists_of_a_training_step(lengths: list[int], causal: bool, kernel_device: torch.device) -> None:
    """Short users are on a list of their own instead of those of dq, dk and dv."""
    targets = [RNG.randint(0, n) for n in lengths]
    made = make_schedule(lengths, kernel_device, targets=targets)
    forward, dq, dkv, short = (tiles.cpu() for tiles in made.for_training(64, 32, 16, 32, causal))
    assert torch.equal(forward, model_list(64, lengths, targets=targets, from_end=causal))
    assert torch.equal(dq, model_list(32, lengths, targets=targets, from_end=causal, more_than=32))
    assert torch.equal(dkv, model_list(16, lengths, targets=targets, from_end=False, more_than=32))
    assert torch.equal(short, model_list(32, lengths, targets=targets, from_end=causal, at_most=32))

    *others, nobody = make_schedule(lengths, kernel_device, targets=targets).for_training(64, 32, 16, 0, causal)
    assert len(nobody) == 0
    assert torch.equal(others[1].cpu(), model_list(32, lengths, targets=targets, from_end=causal))


def arguments(**changes: Any) -> dict[str, Any]:
    return {"offsets": torch.tensor([0, 5, 8]), "total": 8, "max_seqlen": 5, **changes}


KEYS = {"key_offsets": torch.tensor([0, 1, 2]), "total_keys": 2, "max_key_seqlen": 1}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float_offsets": ({"offsets": torch.zeros(3)}, "offsets must be int32 or int64, got torch.float32"),
    "no_offsets": ({"offsets": torch.zeros(0, dtype=torch.long)}, r"offsets must have shape \(users \+ 1,\)"),
    "negative_total": ({"total": -1}, "total must be at least 0, got -1"),
    "total_past_int32": ({"total": 2**31}, "at most 2147483647 rows; got 2147483648"),
    "negative_max_seqlen": ({"max_seqlen": -1}, "max_seqlen must be at least 0, got -1"),
    "targets_per_user": ({"num_targets": torch.zeros(3, dtype=torch.long)}, r"num_targets must have shape \(2,\)"),
    "float_targets": ({"num_targets": torch.zeros(2)}, "num_targets must be int32 or int64"),
    "mixed_devices": ({"num_targets": torch.zeros(2, dtype=torch.long, device="meta")}, "num_targets on meta"),
    "keys_without_total": ({"key_offsets": torch.tensor([0, 1, 2])}, "go together"),
    "keys_of_other_users": ({**KEYS, "key_offsets": torch.tensor([0, 1])}, r"key_offsets must have shape \(3,\)"),
    "targets_in_cross": ({**KEYS, "num_targets": torch.zeros(2, dtype=torch.long)}, "cross attention has none"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments(**changes)).query_tiles([16], True)


@pytest.mark.parametrize("block", [0, 8, 48])
def test_blocks_are_powers_of_two(block: int) -> None:
    with pytest.raises(ValueError, match=f"power of two of rows, at least 16; got {block}"):
        Schedule(**arguments()).query_tiles([block], True)


def lists_inside(offsets: Tensor, total: int, max_seqlen: int) -> list[Tensor]:
    made = Schedule(offsets, total, max_seqlen)
    lists = made.query_tiles([16, 32], True) + made.query_tiles([32], True) + made.key_tiles([16], False)
    return [tiles + 1 for tiles in lists]


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_without_graph_breaks(dynamic: bool | None, kernel_device: torch.device) -> None:
    """Made inside the compiled function, with any total and number of users."""
    torch._dynamo.reset()
    compiled = torch.compile(lists_inside, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ([40, 0, 3], [1, 11, 2, 60], [2]):
        args = (to_offsets(lengths, kernel_device), sum(lengths), max(lengths))
        for actual, expected in zip(compiled(*args), lists_inside(*args), strict=True):
            assert torch.equal(actual, expected)


def test_compiled_layers_share_a_schedule(kernel_device: torch.device) -> None:
    """Given to the compiled function, which keeps in it what it makes."""

    def layer(made: Schedule) -> Tensor:
        return made.query_tiles([16], True)[0] * 2

    torch._dynamo.reset()
    compiled: Callable[[Schedule], Tensor] = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([40, 0, 3], [1, 60, 2]):
        made = make_schedule(lengths, kernel_device)
        expected = model_list(16, lengths, from_end=True) * 2
        for _ in range(2):
            assert torch.equal(compiled(made).cpu(), expected)
        (kept,) = made.query_tiles([16], True)
        assert made.query_tiles([16], True)[0] is kept


class Lists(torch.nn.Module):
    def forward(self, x: Tensor, offsets: Tensor, num_targets: Tensor) -> list[Tensor]:
        return Schedule(offsets, x.shape[0], 40, num_targets=num_targets).query_tiles([16, 32], True)


def test_exports_with_a_dynamic_total(kernel_device: torch.device) -> None:
    examples = []
    for lengths in ([40, 0, 3], [1, 11]):
        offsets = to_offsets(lengths, kernel_device)
        examples.append((torch.zeros(sum(lengths), device=kernel_device), offsets, torch.ones_like(offsets[1:])))
    tokens, users = torch.export.Dim("tokens", min=2), torch.export.Dim("users", min=2)
    program = torch.export.export(Lists(), examples[0], dynamic_shapes=({0: tokens}, {0: users + 1}, {0: users}))
    for example in examples:
        for actual, expected in zip(program.module()(*example), Lists()(*example), strict=True):
            assert torch.equal(actual, expected)


def test_custom_op_is_registered_properly(kernel_device: torch.device) -> None:
    """Schema, fake tensors and tracing, by PyTorch's own checker."""
    offsets = to_offsets([6, 0, 30], kernel_device)
    args = (offsets, None, torch.ones_like(offsets[1:]), 36, 30, 36, 30)
    args += ([16, 32], [False, True], [0, 0], [99, 16], False, False)
    torch.library.opcheck(torch.ops.recsys_kernels.jagged_tile_lists.default, args)


@pytest.mark.gpu
def test_cuda_graph_follows_new_offsets() -> None:
    """Nothing waits for the GPU, and a captured launch reads the offsets of each replay."""
    device = torch.device("cuda")
    lengths = [RNG.randrange(100) for _ in range(700)]
    offsets = to_offsets(lengths, device)
    total = sum(lengths)
    Schedule(offsets, total, 100).query_tiles([32, 64], True)  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        Schedule(offsets, total, 100).query_tiles([32, 64], True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = Schedule(offsets, total, 100).query_tiles([32, 64], True)
    for _ in range(2):
        RNG.shuffle(lengths)
        offsets.copy_(to_offsets(lengths, device))
        graph.replay()
        for block, tiles in zip((32, 64), lists, strict=True):
            assert torch.equal(tiles.cpu(), model_list(block, lengths, from_end=True))


@pytest.mark.gpu
def test_graphs_that_share_a_schedule_do_not_share_its_lists() -> None:
    """Neither with each other, whichever stream they were captured on, nor with calls outside."""
    device = torch.device("cuda")
    lengths = [RNG.randrange(100) for _ in range(700)]
    offsets = to_offsets(lengths, device)
    shared = Schedule(offsets, sum(lengths), 100)
    (outside,) = shared.query_tiles([32], True)
    captured = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (first,) = shared.query_tiles([32], True)
            (again,) = shared.query_tiles([32], True)
        assert again is first, "the layers of a graph share them"
        captured.append((graph, first))
    RNG.shuffle(lengths)
    offsets.copy_(to_offsets(lengths, device))
    graph, tiles = captured[1]
    graph.replay()
    assert torch.equal(tiles.cpu(), model_list(32, lengths, from_end=True))
    assert len({x.data_ptr() for x in (outside, captured[0][1], tiles)}) == 3
    assert shared.query_tiles([32], True)[0] is outside
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert shared.query_tiles([32], True)[0] is not outside
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("num_users", [512, 1024, 4096, 5000, 100_000])
@pytest.mark.parametrize("causal", [True, False])
def test_many_users(num_users: int, causal: bool) -> None:
    """Every size of group and chunk; the order by sorting, because the model is slow here."""
    device, block = torch.device("cuda"), 64
    lengths = torch.randn(num_users, generator=torch.Generator().manual_seed(0)).add(4).exp().clamp(max=512).long()
    lengths[num_users // 3] = 20_000
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    (tiles,) = Schedule(offsets.to(device), total, 20_000).query_tiles([block], causal)
    num_tiles = (lengths + block - 1) // block
    user = torch.arange(num_users).repeat_interleave(num_tiles)
    tile = torch.arange(int(num_tiles.sum())) - (num_tiles.cumsum(0) - num_tiles)[user]
    sign = -1 if causal else 1
    order = sorted(range(len(user)), key=lambda i: (-int(num_tiles[user[i]]), int(user[i]), sign * int(tile[i])))
    user, tile = user[order], tile[order]
    start, length = offsets[user], lengths[user]
    rows = torch.stack([start, length, start, length, tile, length, user, torch.zeros_like(user)], 1)
    expected = torch.zeros(tile_capacity(total, num_users, block), 8, dtype=torch.int64)
    expected[: len(rows)] = rows
    assert torch.equal(tiles.cpu().long(), expected)
