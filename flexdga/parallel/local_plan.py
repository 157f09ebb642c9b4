"""The plan of a rank's one call: who of its queries sees what it holds and what it was sent."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.indexing import put, take
from flexdga.parallel.opened import Fetched
from flexdga.parallel.shards import Shards
from flexdga.parallel.sinks import with_sinks
from flexdga.parallel.slots import Gathered, queries_before
from flexdga.plan import NEVER, Documents, Plan


class Held(NamedTuple):
    """The raw key blocks of a rank: its chunks', those before each of them, and what was sent.

    Attributes:
        unit: (B, Hkv, R / U) int32, the unit of the sequence that each is, -1 for none.
        alone: (B, Hkv, R / U) bool, whether it is no second copy.
        mine: how many are of its own chunks.
    """

    unit: Tensor
    alone: Tensor
    mine: int

    def find(self) -> Tensor:
        """(B, Hkv, R / U) int32, `unit` without second copies."""
        return torch.where(self.alone, self.unit, -1)

    def and_fetched(self, fetched: Fetched | None) -> Held:
        """These, and what was sent."""
        if fetched is None:
            return self
        unit = torch.cat([self.unit, fetched.unit], -1)
        return Held(unit, torch.cat([self.alone, fetched.unit >= 0], -1), self.mine)


def local_plan(
    plan: Plan,
    slots: Gathered | None,
    held: Held,
    since: Tensor | None,
    docs: Documents,
    shards: Shards,
    config: DGAConfig,
    head: int,
) -> Plan:
    """Who of this rank's queries sees what it holds and what it was sent.

    Args:
        plan: of the chunks with their surroundings.
        slots: of all chunks; None where sinks are raw and there are no others.
        held: the raw key blocks.
        since: (B, H, T, N) from `open_units`, or None.
        docs: of the whole sequence.
        shards: how it is cut.
        config: the choices.
        head: raw tokens before each chunk.
    """
    size = config.block_size[1]
    start, end = _raw_intervals(plan, shards, head)
    more = held.unit.shape[-1] * size - start.shape[-1]  # fetched: seen where they are open
    start, end = F.pad(start, (0, more), value=NEVER), F.pad(end, (0, more))
    raw = start.shape[-1]
    index = torch.arange(raw, dtype=torch.int32, device=start.device).expand_as(start)
    table = None if since is None else _of_blocks(since, held, shards, size)
    none = torch.empty((*start.shape[:2], 0, 1), dtype=torch.int32, device=start.device)
    if slots is None:
        inside = torch.arange(size, dtype=torch.int32, device=start.device)
        at = (held.unit[..., None] * size + inside).flatten(2)
        alone = held.alone.repeat_interleave(size, -1)
        start, end = with_sinks(start, end, at, alone, docs, shards, config)
        return Plan(start, end, index, none[..., 0], none, open=table)

    seen_from, seen_to = (queries_before(t, shards) for t in (slots.start, slots.end))
    alive = (seen_from < seen_to) & (slots.start < slots.end)
    place = torch.full_like(slots.position, -1)
    if since is not None:
        # Where the raw tokens of each unit are, if they are here: the kernel hides its slots by it.
        block = torch.arange(held.unit.shape[-1], dtype=torch.int32, device=start.device)
        nowhere = torch.full((*start.shape[:2], since.shape[-1]), -1, dtype=torch.int32)
        here = put(nowhere.to(start.device), held.find(), block.expand_as(held.unit))
        place = take(here, slots.position // size)
        place = torch.where(alive & (place >= 0), place * size, -1)
    return Plan(
        torch.cat([start, torch.where(alive, seen_from, NEVER)], -1),
        torch.cat([end, torch.where(alive, seen_to, 0)], -1),
        torch.cat([index, place], -1),
        torch.full_like(slots.position, -1),
        none,
        open=table,
    )


def _of_blocks(since: Tensor, held: Held, shards: Shards, size: int) -> Tensor:
    """(B, H, T, R / U): from which query on the raw key blocks are open."""
    per_chunk = shards.size // size
    own = [since[..., n * per_chunk : (n + 1) * per_chunk] for n in shards.numbers]
    unit = held.find()[..., held.mine :]
    rep = since.shape[1] // unit.shape[1]
    unit = unit.repeat_interleave(rep, 1)[:, :, None].expand(-1, -1, since.shape[2], -1)
    others = since.gather(-1, unit.clamp(min=0).long()).masked_fill_(unit < 0, NEVER)
    return torch.cat([*own, others], -1)


def _raw_intervals(plan: Plan, shards: Shards, head: int) -> tuple[Tensor, Tensor]:
    """Start and end of this rank's tokens, then of those before its chunks: (B, Hkv, R) each.

    Nobody but a chunk's own queries sees them: what a later chunk sees raw stands before it.
    """
    parts: list[list[tuple[Tensor, Tensor]]] = [[], []]
    batch = plan.start.shape[0] // shards.count
    for c in range(shards.count):
        own = slice(c * batch, (c + 1) * batch)
        for i, tokens in enumerate((slice(head, head + shards.size), slice(0, head))):
            start, end = plan.start[own, :, tokens], plan.end[own, :, tokens]
            start = start.clamp(min=head)
            end = end.clamp(max=head + shards.size)
            alive = start < end
            shift = c * shards.size - head
            parts[i].append(
                (torch.where(alive, start + shift, NEVER), torch.where(alive, end + shift, 0))
            )
    every = [pair for part in parts for pair in part]
    return torch.cat([s for s, _ in every], -1), torch.cat([e for _, e in every], -1)


def held_units(shards: Shards, head: int, size: int, like: Tensor) -> Held:
    """The key blocks of this rank's chunks and those before them, for rows like (B, Hkv, ...)."""
    per_chunk, ahead = shards.size // size, head // size
    firsts = [number * per_chunk for number in shards.numbers]
    own = [unit for first in firsts for unit in range(first, first + per_chunk)]
    before = [unit for first in firsts for unit in range(first - ahead, first)]
    mine = set(own)
    alone = [True] * len(own) + [unit >= 0 and unit not in mine for unit in before]
    units = torch.tensor(own + before, dtype=torch.int32, device=like.device).clamp(min=-1)
    each = (*like.shape[:2], -1)
    return Held(units.expand(each), torch.tensor(alone, device=like.device).expand(each), len(own))
