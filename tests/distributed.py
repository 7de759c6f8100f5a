"""Run a function on N processes that share a process group, from inside a test.

    def worker(rank: int, world_size: int, scale: float) -> float:      # at module level, so that it pickles
        total = torch.tensor(scale * rank)
        dist.all_reduce(total)
        return total.item()

    assert run_distributed(worker, 2.0, world_size=2) == [2.0, 2.0]

`run_distributed` raises when a rank fails; `outcomes_of` tells what happened on every rank instead, for
tests of errors that every rank must see. Whatever happens, no process outlives `timeout` seconds: a hang ends
there and the report says which ranks were still busy.

gloo workers are forked from a server that imported torch and torchrec once per test run (4 s; a group of
two then starts in 0.1 s). NCCL workers are spawned afresh, because a CUDA driver doesn't survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

DEFAULT_TIMEOUT = 120.0
GRACE_AFTER_FAILURE = 10.0
"""Seconds the other ranks get to report after one failed: enough for an error of their own."""

PRELOADED = ["torch", "torchrec", "torchrec.distributed", "torch.distributed.checkpoint", "tests.distributed"]


@dataclass
class Outcome:
    """What became of one rank: a value, an error with its traceback, or neither (it was killed)."""

    rank: int
    value: Any = None
    error_type: str | None = None
    error_message: str | None = None
    error_traceback: str | None = None

    @property
    def ok(self) -> bool:
        return self.error_type is None

    def describe(self) -> str:
        if self.ok:
            return f"rank {self.rank}: ok"
        return f"rank {self.rank}: {self.error_type}: {self.error_message}\n{self.error_traceback or ''}"


class WorkerFailure(RuntimeError):
    """At least one rank failed; the message holds every rank's traceback."""


def run_distributed(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    backend: str = "gloo",
    timeout: float = DEFAULT_TIMEOUT,
    init: bool = True,
) -> list[Any]:
    """`fn(rank, world_size, *args)` on every rank; the return values by rank.

    fn, args, values: anything that pickles (tensors go by value). With `init=False` the process group is left
    to `fn`; torchrun's environment variables are set either way. Raises `WorkerFailure` if a rank fails.
    """
    outcomes = outcomes_of(fn, *args, world_size=world_size, backend=backend, timeout=timeout, init=init)
    if not all(outcome.ok for outcome in outcomes):
        raise WorkerFailure("\n".join(outcome.describe() for outcome in outcomes))
    return [outcome.value for outcome in outcomes]


def outcomes_of(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    backend: str = "gloo",
    timeout: float = DEFAULT_TIMEOUT,
    init: bool = True,
) -> list[Outcome]:
    """Like `run_distributed`, but never raises for a rank's error: one `Outcome` per rank, in order."""
    context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
    if backend == "gloo":
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="process_group_") as rendezvous:
        port = _free_port()
        readers: list[Connection] = []
        processes = []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            spec = _WorkerSpec(rank, world_size, backend, init, f"{rendezvous}/store", port, timeout)
            process = context.Process(target=_work, args=(writer, spec, fn, args))
            process.start()
            writer.close()  # the child holds the only writing end, so that its death reads as end-of-file
            readers.append(reader)
            processes.append(process)
        try:
            return _after_tear_down(_collect(readers, processes, timeout), processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join(10)
            for reader in readers:
                reader.close()


@dataclass
class _WorkerSpec:
    rank: int
    world_size: int
    backend: str
    init: bool
    store: str
    port: int
    timeout: float


def _collect(readers: list[Connection], processes: list[Any], timeout: float) -> list[Outcome]:
    """Wait for each rank's outcome until the deadline, which the first failure brings forward."""
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + timeout
    pending: dict[Connection, int] = {reader: rank for rank, reader in enumerate(readers)}
    while pending and (left := deadline - time.monotonic()) > 0:
        for reader in wait(list(pending), timeout=left):
            assert isinstance(reader, Connection)
            rank = pending.pop(reader)
            try:
                outcomes[rank] = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                message = f"exit code {processes[rank].exitcode}, no result"
                outcomes[rank] = Outcome(rank, error_type="Died", error_message=message)
            if not outcomes[rank].ok:
                deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
    failed_first = any(not outcome.ok for outcome in outcomes.values())
    why = "killed after another rank failed" if failed_first else f"still busy after {timeout:.0f} s, killed"
    for rank in pending.values():
        outcomes[rank] = Outcome(rank, error_type="Hung", error_message=why)
    return [outcomes[rank] for rank in range(len(readers))]


def _after_tear_down(outcomes: list[Outcome], processes: list[Any]) -> list[Outcome]:
    """A rank that reported well must leave well too: an abort while the group is torn down is a failure."""
    if not all(outcome.ok for outcome in outcomes):
        return outcomes
    for outcome, process in zip(outcomes, processes, strict=True):
        process.join(30)
        if process.exitcode != 0:
            outcome.error_type = "DiedLeaving"
            outcome.error_message = f"exit code {process.exitcode} after a good result"
    return outcomes


def _work(writer: Connection, spec: _WorkerSpec, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The body of a worker: join the group, run, report, leave."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(spec.rank),
        LOCAL_RANK=str(spec.rank),
        WORLD_SIZE=str(spec.world_size),
        LOCAL_WORLD_SIZE=str(spec.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(spec.port),
    )
    try:
        if spec.backend == "nccl":
            torch.cuda.set_device(spec.rank)
        if spec.init:
            dist.init_process_group(
                spec.backend,
                init_method=f"file://{spec.store}",
                rank=spec.rank,
                world_size=spec.world_size,
                timeout=timedelta(seconds=spec.timeout),
            )
        outcome = Outcome(spec.rank, value=fn(spec.rank, spec.world_size, *args))
        report = pickle.dumps(outcome)
    except BaseException as error:
        report = pickle.dumps(
            Outcome(
                spec.rank,
                error_type=type(error).__name__,
                error_message=str(error),
                error_traceback=traceback.format_exc(),
            )
        )
    # Reported before the group is torn down: after a failure on another rank the tear-down may never return.
    writer.send_bytes(report)
    writer.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
