"""Which rank does not answer: its name in the error, and never a hang.

Before it asks anything of the others, every call counts itself in the store of its process group.
When a collective fails, the ranks that could not have failed by themselves are found there: those
that never came to this call, or that came and did not report the failure as everybody else does.
The collective fails by the group's own timeout, the one given to `init_process_group`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store, _get_process_group_store

GRACE = 3.0
"""Seconds in which the ranks that are alive report a failure, after the timeout or the failure."""
_calls: dict[str, int] = {}


class RankError(RuntimeError):
    """A rank did not take part in a collective of flexdga. `ranks` are its global ranks."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


@contextlib.contextmanager
def watched(group: ProcessGroup, what: str) -> Iterator[None]:
    """Name the ranks that are missing if a collective inside fails.

    Args:
        group: of the collectives.
        what: the call, for the message.

    Raises:
        RankError: a collective failed.
    """
    store = _get_process_group_store(group)
    number = _calls[group.group_name] = _calls.get(group.group_name, 0) + 1
    me, begin = dist.get_rank(group), time.monotonic()
    try:
        store.set(f"flexdga/call/{me}", str(number))
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, RankError) or not _is_of_a_collective(error):
            raise
        patience = max(begin + _timeout(group).total_seconds() - time.monotonic(), 0) + GRACE
        ranks, why = _missing(store, group, number, patience)
        raise RankError(
            f"{what}: {why}; the collective failed after {time.monotonic() - begin:.1f} s: "
            f"{str(error).splitlines()[0][:300]}",
            ranks,
        ) from error


def _missing(
    store: Store, group: ProcessGroup, number: int, patience: float
) -> tuple[list[int], str]:
    """The global ranks that neither failed as this one did, and what to say of them."""
    me = dist.get_rank(group)
    others = [rank for rank in range(dist.get_world_size(group)) if rank != me]
    until = time.monotonic() + patience
    try:
        store.set(f"flexdga/failed/{number}/{me}", "1")
        silent = others
        # One silent rank is the one looked for; more may be waiting for their own timeout.
        while len(silent) > 1 and time.monotonic() < until:
            time.sleep(0.05)
            silent = [r for r in silent if not store.check([f"flexdga/failed/{number}/{r}"])]
        silent = [r for r in silent if not store.check([f"flexdga/failed/{number}/{r}"])]
        reached = {r: _read(store, f"flexdga/call/{r}") for r in others}
    except (RuntimeError, dist.DistError):
        return [], "the store of the process group does not answer either, so its host is gone"
    if not silent:
        return [], "every other rank gave up on this call before this one"
    names = []
    for rank in silent:
        where = dist.get_global_rank(group, rank)
        how = "never came to it" if reached[rank] < number else "came and then fell silent"
        names.append(f"rank {where} {how}")
    return [dist.get_global_rank(group, rank) for rank in silent], ", ".join(names)


def _read(store: Store, key: str) -> int:
    return int(store.get(key)) if store.check([key]) else 0


def _timeout(group: ProcessGroup) -> timedelta:
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return dist.default_pg_timeout


def _is_of_a_collective(error: Exception) -> bool:
    """Whether the backend says so: what it raises has no class of its own on every backend."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _WORDS)


_WORDS = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "aborted")
