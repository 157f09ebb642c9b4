"""Processes that measure sharded attention together, one thread each, gloo over localhost."""

from __future__ import annotations

import dataclasses
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_group

from flexdga import DGAConfig, dga_attention, make_plan
from flexdga.parallel import Shards, parallel_attention, traffic

from . import measure
from .errors import UsageError

PROBE_BYTES = 1 << 24
"""What is gathered to see how fast bytes travel."""


@dataclasses.dataclass(frozen=True)
class RankResult:
    """What one rank saw: of each layer the bytes it sent and the seconds of each round.

    Attributes:
        sent: bytes by what they are, for each layer.
        seconds: of each timed call, for each layer.
        peak: bytes held at once, beyond the inputs, at most.
        bandwidth: bytes per second that a rank sends while all gather; 0 alone.
        entries: share of dense score entries that open units take; alone only.
    """

    sent: list[dict[str, int]]
    seconds: list[list[float]]
    peak: int
    bandwidth: float
    entries: float


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure: a file of (query, key, value, scale) for each layer, and how often."""

    path: str
    config: DGAConfig
    rounds: int


def run_ranks(world: int, job: Job) -> list[RankResult]:
    """Measure with so many processes at once.

    Raises:
        UsageError: one of them failed, and how.
    """
    context = mp.get_context("spawn")
    store = _store(0, is_master=True)
    pipes: list[Connection] = []
    processes = []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(rank, world, store.port, job, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            try:
                results.append(pipe.recv())
            except EOFError:
                raise UsageError(f"rank {rank} of {world} failed; its error is above") from None
        return results
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _rank(rank: int, world: int, port: int, job: Job, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = _store(port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    layers = torch.load(job.path, mmap=True, weights_only=True)
    with torch.no_grad():
        results = [_layer(q, k, v, scale, job) for q, k, v, scale in layers]
        entries = 0.0
        if world == 1 and job.config.opens:
            entries = statistics.mean(
                _open_entries(q, k, v, scale, job.config) for q, k, v, scale in layers
            )
        bandwidth = _bandwidth() if world > 1 else 0.0
    sent, seconds, peaks = zip(*results)
    pipe.send(RankResult(list(sent), list(seconds), max(peaks), bandwidth, entries))
    pipe.poll(None)  # until it is ended: the others are not to miss it


def _store(port: int, *, is_master: bool) -> Any:
    make: Any = dist
    return make.TCPStore("127.0.0.1", port, is_master=is_master, wait_for_workers=False)


def _layer(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, job: Job
) -> tuple[dict[str, int], list[float], int]:
    config = job.config
    shards = Shards(query.shape[2], _get_default_group(), config)
    if shards.world == 1:
        q, k, v = (t.clone() for t in (query, key, value))

        def call() -> Tensor:
            return dga_attention(q, k, v, config=config, scale=scale)
    else:
        q, k, v = (shards.shard(t, 2) for t in (query, key, value))

        def call() -> Tensor:
            return parallel_attention(q, k, v, shards, config=config, scale=scale)

    # Compiled before it is measured: `first_call` would call again, and not on every rank.
    call()
    call()
    first = measure.first_call(call, query.device)
    with traffic() as sent:
        call()
    seconds = []
    for _ in range(job.rounds):
        dist.barrier()
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return dict(sent), seconds, first.peak_bytes


def _open_entries(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, config: DGAConfig
) -> float:
    plan = make_plan(query, key, value, config=config, scale=scale)
    length = query.shape[2]
    return plan.opened().double().mean().item() / (length * (length + 1) / 2)


def _bandwidth() -> float:
    world = dist.get_world_size()
    x = torch.zeros(PROBE_BYTES // 4)
    parts = [torch.empty_like(x) for _ in range(world)]
    seconds = []
    for _ in range(4):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_gather(parts, x)
        seconds.append(time.perf_counter() - begin)
    return (world - 1) * PROBE_BYTES / statistics.median(seconds[1:])
