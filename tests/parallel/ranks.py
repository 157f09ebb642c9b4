"""Processes that live as long as a test module, and run what its tests hand them, all at once."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 600.0
"""Seconds after which a test fails instead of waiting for its ranks."""


class Ranks:
    """`world` processes with a gloo group over localhost, one thread each."""

    def __init__(self, world: int, timeout: float = 300.0) -> None:
        context = mp.get_context("spawn")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pairs = [context.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(
                target=_serve, args=(rank, world, self.store.port, timeout, theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def run(self, function, *args, lost=()):
        """function(*args) on every rank: what each returned, or the exception it raised.

        A rank in `lost` is expected to die.
        """
        for pipe in self.pipes:
            pipe.send((function, args))
        found = [None] * len(self.pipes)
        open_pipes: dict[Connection, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while open_pipes:
            ready = wait(list(open_pipes), LIMIT)
            assert ready, f"ranks {sorted(open_pipes.values())} hang"
            for pipe in ready:
                rank = open_pipes.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except EOFError:
                    assert rank in lost, f"rank {rank} died"
        return found

    def results(self, function, *args):
        """As `run`, where nobody is expected to raise."""
        found = self.run(function, *args)
        for rank, (_, error) in enumerate(found):
            assert error is None, f"rank {rank}: {error}"
        return [result for result, _ in found]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def _serve(rank: int, world: int, port: int, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((function(*args), None))
        except Exception as error:
            pipe.send((error, traceback.format_exc()))
