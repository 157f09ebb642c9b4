"""The plan of a rank's one call: who of its queries sees what it holds and what it was sent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.indexing import put, take
from flexdga.parallel.opened import Fetched
from flexdga.parallel.shards import Shards
from flexdga.parallel.slots import Gathered, queries_before
from flexdga.plan import NEVER, Plan


def local_plan(
    plan: Plan,
    slots: Gathered,
    held: Tensor,
    since: Tensor | None,
    fetched: Fetched | None,
    shards: Shards,
    head: int,
    size: int,
) -> Plan:
    """Who of this rank's queries sees what it holds and what it was sent.

    Args:
        plan: of the chunks with their surroundings.
        slots: of all chunks.
        held: (B, Hkv, R / U) the unit of the sequence at each raw key block, -1 for none and for
            a second copy.
        since: (B, H, T, N) from `open_units`, or None.
        fetched: units of other ranks, or None.
        shards: how the sequence is cut.
        head: raw tokens before each chunk.
        size: U, tokens of a key block.
    """
    start, end = _raw_intervals(plan, shards, head)
    if fetched is not None:  # seen where they are open
        more = fetched.key.shape[2]
        start, end = F.pad(start, (0, more), value=NEVER), F.pad(end, (0, more))
    raw = start.shape[-1]
    index = torch.arange(raw, dtype=torch.int32, device=start.device).expand_as(start)

    seen_from, seen_to = (queries_before(t, shards) for t in (slots.start, slots.end))
    alive = (seen_from < seen_to) & (slots.start < slots.end)
    place, table = torch.full_like(slots.position, -1), None
    if since is not None:
        # Where the raw tokens of each unit are, if they are here: the kernel hides its slots by it.
        block = torch.arange(held.shape[-1], dtype=torch.int32, device=held.device)
        nowhere = torch.full((*held.shape[:2], since.shape[-1]), -1, dtype=torch.int32)
        here = put(nowhere.to(held.device), held, block.expand_as(held))
        place = take(here, slots.position // size)
        place = torch.where(alive & (place >= 0), place * size, -1)
        rep = since.shape[1] // held.shape[1]
        unit = held.repeat_interleave(rep, 1)[:, :, None].expand(-1, -1, since.shape[2], -1)
        table = since.gather(-1, unit.clamp(min=0).long()).masked_fill(unit < 0, NEVER)
    none = torch.empty((*start.shape[:2], 0, 1), dtype=torch.int32, device=start.device)
    return Plan(
        torch.cat([start, torch.where(alive, seen_from, NEVER)], -1),
        torch.cat([end, torch.where(alive, seen_to, 0)], -1),
        torch.cat([index, place], -1),
        torch.full_like(slots.position, -1),
        none,
        open=table,
    )


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


def held_units(shards: Shards, head: int, size: int, device: torch.device) -> Tensor:
    """(R / U,) int32: the unit at each key block of this rank's tokens and those before them."""
    own: list[int] = []
    for number in shards.numbers:
        own += range(number * shards.size // size, (number + 1) * shards.size // size)
    before: list[int] = []
    for number in shards.numbers:
        first = number * shards.size // size
        before += range(first - head // size, first)
    mine = set(own)
    units = own + [unit if unit >= 0 and unit not in mine else -1 for unit in before]
    return torch.tensor(units, dtype=torch.int32, device=device)
