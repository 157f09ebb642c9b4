"""What a chunk needs of its neighbours, and the plan of each chunk with these around it.

A chunk stands between the raw tokens before it that its queries see (keys and values) and, where
importance is asked, the tokens after it that its last units are judged by (queries and keys). This
is a short sequence of its own, all of a rank's chunks are a batch of them, and `plan_attention`
plans it: by whole units its decisions are those of the whole sequence.

Shapes: C chunks of n tokens with h before and a after them, E = h + n + a; C stands in front of B.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from flexdga.attention import _run
from flexdga.config import DGAConfig
from flexdga.focal import focal_capacity, focal_counts
from flexdga.parallel.collectives import all_to_all
from flexdga.parallel.focal import SOME, WholeFocal
from flexdga.parallel.shards import Shards, before, beyond, padded_to
from flexdga.plan import NEVER, Documents, Plan
from flexdga.planner import documents, plan_attention


class Ends(NamedTuple):
    """What neighbours send of their chunks' ends, for this rank's chunks; 0 where there is none.

    Attributes:
        head: (C, B, Hkv, h, D + Dv) keys and values before each chunk.
        tail: (C, B, H + Hkv, a, D) queries and keys after it.
    """

    head: Tensor
    tail: Tensor

    def of(self, rows: slice) -> Ends:
        """Those of some rows of the batch."""
        return Ends(self.head[:, rows], self.tail[:, rows])


class Around(NamedTuple):
    """Chunks with what stands around them.

    Attributes:
        query: (C·B, H, E, D), 0 before the chunk; (C·B, H, 0, D) where nothing but sinks is kept,
            for which nobody reads it.
        key: (C·B, Hkv, E, D).
        value: (C·B, Hkv, E, Dv); (C·B, Hkv, 0, Dv) where no slots are made, as for the query.
        docs: (C·B, E), indices from each chunk's own beginning on: negative for documents that
            begin before it.
        head: h.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    docs: Documents
    head: int


def whole_documents(ids: Tensor | None, batch: int, shards: Shards, device: Any) -> Documents:
    """Documents of the whole sequence with its padding, (B, total)."""
    docs = documents(ids, None, (batch, shards.length), device)
    first, after = (
        padded_to(docs.first, shards.total, NEVER),
        padded_to(docs.after, shards.total, 0),
    )
    return Documents(first, after, docs.packed)


def start_ends(
    query: Tensor, key: Tensor, value: Tensor, shards: Shards, config: DGAConfig
) -> tuple[_Sent, _Sent]:
    """What `ends_of` takes when it is there, from this rank's (B, ·, C·n, ·) tensors."""
    q, k, v = (by_chunk(x, shards) for x in (query, key, value))
    last, first = slice(shards.size - before(config), None), slice(beyond(config))
    keys_and_values = torch.cat([k[..., last, :], v[..., last, :]], -1)
    queries_and_keys = torch.cat([q[..., first, :], k[..., first, :]], 2).detach()
    return (
        _to_neighbours(keys_and_values, 1, shards, "raw window"),
        _to_neighbours(queries_and_keys, -1, shards, "lookahead"),
    )


def ends_of(started: tuple[_Sent, _Sent], shards: Shards) -> Ends:
    """What the neighbours sent."""
    return Ends(*(_from_neighbours(sent, shards) for sent in started))


def around(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Ends,
    docs: Documents,
    shards: Shards,
    config: DGAConfig,
    *,
    slots: bool,
) -> Around:
    """Chunks and their surroundings.

    Args:
        query: (B, H, C·n, D).
        key: (B, Hkv, C·n, D).
        value: (B, Hkv, C·n, Dv).
        ends: of the neighbours.
        docs: of the whole sequence.
        shards: how it is cut.
        config: the choices.
        slots: whether there will be any.
    """
    head, tail = ends.head.shape[3], ends.tail.shape[3]
    q, k, v = (by_chunk(x, shards) for x in (query, key, value))
    k_head, v_head = ends.head.split([k.shape[-1], v.shape[-1]], -1)
    q_tail, k_tail = ends.tail.split([q.shape[2], k.shape[2]], 2)
    if head or tail:
        k = torch.cat([k_head, k, k_tail], 3)
    if config.only_sinks:
        q = q[..., :0, :]
    elif head or tail:
        q = torch.cat([q.new_zeros(*q.shape[:3], head, q.shape[4]), q, q_tail], 3)
    if not slots:
        v = v[..., :0, :]
    elif head or tail:
        v = torch.cat([v_head, v, v.new_zeros(*v.shape[:3], tail, v.shape[4])], 3)
    parts = [
        _docs_around(docs, number * shards.size - head, k.shape[3]) for number in shards.numbers
    ]
    first, after = (torch.cat(part) for part in zip(*parts))
    return Around(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        Documents(first, after, docs.packed),
        head,
    )


def plan_around(
    chunks: Around,
    docs: Documents,
    shards: Shards,
    config: DGAConfig,
    scale: float,
    whole: WholeFocal | None = None,
    *,
    slots: bool,
) -> Plan:
    """The plan of every chunk with its surroundings: intervals of indices into these.

    Without `slots` sinks are raw, and nothing else is ever seen again.
    """
    room = focal = None
    if whole is not None:
        focal = whole.around(shards, chunks.head)
        left = torch.full_like(chunks.docs.first[:, 0], NEVER)
        room = (whole.slots(shards, chunks.head), left)
    elif _share_room(docs, config):
        room = _focal_room(docs, shards, config, chunks)
    # Sinks are a dozen small tensors: not worth the seconds of a compilation.
    make = plan_attention if config.only_sinks else functools.partial(_run, plan_attention)
    with torch.no_grad():
        plan: Plan = make(
            chunks.query.detach(), chunks.key.detach(), chunks.value.detach(),
            chunks.docs, config=config, is_causal=True, scale=scale, room=room, copies=slots,
            focal_of_whole=focal,
        )  # fmt: skip
    return plan


def by_chunk(x: Tensor, shards: Shards) -> Tensor:
    """(B, H, C·n, D) to (C, B, H, n, D)."""
    return x.unflatten(2, (shards.count, shards.size)).movedim(2, 0)


def focal_slots(tokens: int, docs: Documents, shards: Shards, config: DGAConfig) -> int:
    """Focal slots that hold whatever a plan of the whole sequence chooses from some tokens.

    Args:
        tokens: how many, in whole units.
        docs: of the whole sequence.
        shards: how it is cut.
        config: the choices.
    """
    if not _share_room(docs, config):
        return focal_capacity(tokens // config.step, config)
    each = max(config.focal_per_unit, min(config.sinks, config.unit_size))
    units = tokens // config.unit_size
    if config.only_sinks:  # no limit to them: as many as the stretch that has most of them
        sinks = focal_counts(docs, config).cumsum(-1)
        sinks = torch.cat([torch.zeros_like(sinks[:, :1]), sinks], 1)
        span = min(units, sinks.shape[1] - 1)
        busiest = int((sinks[:, span:] - sinks[:, : sinks.shape[1] - span]).amax())
        return min(units * each, -(-max(busiest, 1) // SOME) * SOME)
    return min(units * each, focal_capacity(shards.total // config.step, config))


def _share_room(docs: Documents, config: DGAConfig) -> bool:
    """Whether the sinks of several documents may be more than a plan has slots for."""
    each = config.focal_per_unit if config.scope == "causal" else config.focal_per_step
    return docs.packed and config.sinks > each


def _focal_room(
    docs: Documents, shards: Shards, config: DGAConfig, chunks: Around
) -> tuple[int, Tensor]:
    """What `plan_attention` takes as `room`: documents alone say how much others used up."""
    whole = focal_capacity(shards.total // config.step, config)
    used = focal_counts(docs, config).cumsum(-1)
    used = torch.cat([torch.zeros_like(used[:, :1]), used], 1)
    units = [number * shards.size - chunks.head for number in shards.numbers]
    left = [whole - used[:, max(first, 0) // config.unit_size] for first in units]
    if config.only_sinks:
        left = [torch.full_like(some, NEVER) for some in left]
    return focal_slots(chunks.key.shape[2], docs, shards, config), torch.cat(left)


class _Sent(NamedTuple):
    """Rows that are on their way from the chunk `step` before each chunk, (C, ...) in `shape`."""

    rows: Tensor
    step: int
    shape: torch.Size


def _to_neighbours(x: Tensor, step: int, shards: Shards, what: str) -> _Sent:
    """Send `x` (C, ...) of each chunk to the one `step` after it; nothing is no collective."""
    mine = _jobs(shards.rank, step, shards)
    rows = x[[shards.numbers.index(n - step) for _, n in mine]].flatten(1)
    if x.numel():
        ranks = range(shards.world)
        send = [sum(to == rank for to, _ in mine) for rank in ranks]
        receive = [sum(to == shards.rank for to, _ in _jobs(rank, step, shards)) for rank in ranks]
        rows = all_to_all(rows, send, receive, shards.group, what)
    return _Sent(rows, step, x.shape)


def _from_neighbours(sent: _Sent, shards: Shards) -> Tensor:
    """What came, in the order of this rank's chunks; 0 for a chunk that gets nothing."""
    rows, step, shape = sent
    if not shape.numel():
        return rows.new_zeros(shape)
    got = funcol.wait_tensor(rows).unflatten(1, shape[1:])
    every = [_jobs(rank, step, shards) for rank in range(shards.world)]
    coming = [n for jobs in every for to, n in jobs if to == shards.rank]
    none = got.new_zeros(1, *shape[1:])
    parts = [got[coming.index(n)][None] if n in coming else none for n in shards.numbers]
    # Whoever got nothing takes part in the gradient's exchange too.
    return torch.cat([*parts, got[:0]])


def _jobs(rank: int, step: int, shards: Shards) -> list[tuple[int, int]]:
    """Who gets what from a rank's chunks: (rank, number of the chunk that gets it), in order."""
    got = [number + step for number in shards.numbers_of(rank)]
    chunks = shards.world * shards.count
    return sorted((shards.owner(n), n) for n in got if 0 <= n < chunks)


def _docs_around(docs: Documents, begin: int, size: int) -> tuple[Tensor, Tensor]:
    """First and after of `size` tokens from `begin` on, as indices from there; padding outside."""
    length = docs.first.shape[1]
    low, high = max(begin, 0), min(begin + size, length)
    first, after = docs.first[:, low:high], docs.after[:, low:high]
    real = first != NEVER
    first = torch.where(real, first - begin, NEVER)
    after = torch.where(real, after - begin, 0)
    pad = (low - begin, begin + size - high)
    return (
        torch.nn.functional.pad(first, pad, value=NEVER),
        torch.nn.functional.pad(after, pad, value=0),
    )
