"""Openings: each rank decides for its own queries, and asks the owners for the units they need.

What estimates need of a unit, its features, is gathered: 6·D numbers for 32 tokens. Then every rank
says which units it needs, a bit for each unit and KV head, and the raw keys and values come by
all-to-all, so many at a time that what is in flight stays small.

Shapes: N units of U tokens in the whole sequence, T query blocks of this rank.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from flexdga.attention import _run
from flexdga.config import DGAConfig
from flexdga.estimates import Units, unit_documents, unit_features
from flexdga.indexing import compact
from flexdga.opening import surroundings
from flexdga.parallel.collectives import all_gather, all_to_all
from flexdga.parallel.shards import Shards
from flexdga.parallel.surroundings import Around
from flexdga.plan import NEVER, Documents
from flexdga.stretches import in_stretches

IN_FLIGHT = 1 << 24
"""Numbers of keys and values that a rank sends to another at a time."""


class Fetched(NamedTuple):
    """Units of other ranks: (B, Hkv, M) int32 which, -1 for none, and (B, Hkv, M·U, ·) tokens."""

    unit: Tensor
    key: Tensor
    value: Tensor


def start_features(key: Tensor, shards: Shards, config: DGAConfig) -> Tensor:
    """What `features_of` takes when it is there, from this rank's (B, Hkv, C·n, D) keys."""
    features = unit_features(key.detach(), config)
    features = features.unflatten(2, (shards.count, -1)).movedim(2, 0)
    return all_gather(features, shards.group, "features of units")


def features_of(started: Tensor, shards: Shards) -> Tensor:
    """`Units.key` of the whole sequence."""
    every = shards.ordered(funcol.wait_tensor(started))
    return every.permute(1, 2, 0, 3, 4).flatten(2, 3)


def open_units(
    query: Tensor,
    chunks: Around,
    features: Tensor,
    docs: Documents,
    shards: Shards,
    config: DGAConfig,
    scale: float,
) -> Tensor:
    """From which of this rank's queries on its blocks see each unit of the sequence raw.

    Args:
        query: (B, H, C·n, D).
        chunks: with their surroundings.
        features: of all units.
        docs: of the whole sequence.
        shards: how it is cut.
        config: the choices.
        scale: of the scores.

    Returns:
        (B, H, T, N) int32, numbers of this rank's queries; NEVER where the unit stays closed.
    """
    batch = query.shape[0]
    unit_first = unit_documents(docs.first, config)
    table = []
    with torch.no_grad():
        for c, number in enumerate(shards.numbers):
            of_chunk = slice(c * batch, (c + 1) * batch)
            begin = number * shards.size - chunks.head
            key, first = chunks.key[of_chunk].detach(), chunks.docs.first[of_chunk]
            mine = query[:, :, c * shards.size : (c + 1) * shards.size].detach()
            # The document at the edge goes by the name 0, and those that ended before by none.
            edge = docs.first[:, max(begin, 0)][:, None]
            names = torch.where(unit_first == edge, 0, NEVER)
            names = torch.where(unit_first >= max(begin, 0), unit_first - begin, names)
            names = torch.where(unit_first == NEVER, NEVER, names)
            own = surroundings(
                key, first.clamp(min=0), config=config, is_causal=True, ahead=chunks.head
            ).of(slice(shards.size // config.block_size[0]))
            older = begin // config.block_size[1]  # units before the chunk's first key
            own = own._replace(before=own.before + older, after=own.after + older)
            since = in_stretches(
                mine, own, Units(features, names), past=number * shards.size, packed=True,
                config=config, is_causal=True, scale=scale, run=_run,
            )  # fmt: skip
            closed = since == NEVER
            since += c * shards.size - chunks.head
            table.append(since.masked_fill_(closed, NEVER))
    return torch.cat(table, 2)


def start_requests(need: Tensor, shards: Shards) -> Tensor:
    """What `requests` takes when it is there, from the (B, Hkv, N) bool units that are needed."""
    return all_gather(need[None].to(torch.uint8), shards.group, "requests")


def requests(started: Tensor) -> Tensor:
    """(W, B, Hkv, N) bool: the units that each rank needs of others."""
    return funcol.wait_tensor(started).bool()


def fetch(
    key: Tensor, value: Tensor, asked: Tensor, shards: Shards, config: DGAConfig, what: str
) -> Fetched:
    """Raw keys and values of units from the ranks that hold them.

    Args:
        key: (B, Hkv, C·n, D), this rank's.
        value: (B, Hkv, C·n, Dv).
        asked: (W, B, Hkv, N) bool, the units that each rank needs of others.
        shards: how the sequence is cut.
        config: `block_size`.
        what: they are.
    """
    size, group, me = config.block_size[1], shards.group, shards.rank
    need = asked[me]
    per_chunk = shards.size // size
    holder = torch.tensor(
        [shards.owner(n) for n in range(shards.world * shards.count)], device=key.device
    ).repeat_interleave(per_chunk)
    counts = torch.stack(
        [(asked & (holder == rank)).flatten(1).sum(-1) for rank in range(shards.world)], 1
    ).tolist()  # by who asks, and of whom
    wanted_of_me = [(asked[rank] & (holder == me)).nonzero() for rank in range(shards.world)]
    mine_asked = [(asked[me] & (holder == rank)).nonzero() for rank in range(shards.world)]

    units = [x.unflatten(2, (-1, size)) for x in (key, value)]
    width = size * (key.shape[-1] + value.shape[-1])
    start = torch.zeros(shards.world * shards.count, dtype=torch.long, device=key.device)
    for i, number in enumerate(shards.numbers):
        start[number] = i * per_chunk
    most = max(IN_FLIGHT // width, 1)
    turns = -(-max(map(max, counts)) // most)
    got: list[list[Tensor]] = [[] for _ in range(shards.world)]
    for turn in range(turns):
        part = slice(turn * most, (turn + 1) * most)
        b, h, unit = torch.cat([w[part] for w in wanted_of_me]).unbind(-1)
        send = [len(w[part]) for w in wanted_of_me]
        receive = [len(w[part]) for w in mine_asked]
        here = start[unit // per_chunk] + unit % per_chunk
        rows = torch.cat([x[b, h, here] for x in units], -1).flatten(1)
        some = all_to_all(rows, send, receive, group, what)
        for rank, piece in enumerate(funcol.wait_tensor(some).split(receive)):
            got[rank].append(piece)
    count = int(need.sum(-1).amax())
    room = key.new_zeros(*need.shape[:2], count, width)
    if turns:  # whoever got nothing takes part in the gradient's exchange too
        b, h, unit = torch.cat(mine_asked).unbind(-1)
        place = (need.cumsum(-1) - 1)[b, h, unit]
        room = room.index_put((b, h, place), torch.cat(list(itertools.chain(*got))))
    tokens = room.unflatten(-1, (size, -1)).flatten(2, 3)
    return Fetched(compact(need, count), *tokens.split([key.shape[-1], value.shape[-1]], -1))


def needed(since: Tensor, kv_heads: int) -> Tensor:
    """(B, Hkv, N) bool: the units that any query of a KV head opens."""
    first = since.amin(2).unflatten(1, (kv_heads, -1)).amin(2)  # much faster than `any`
    return first < NEVER
