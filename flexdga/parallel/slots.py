"""The slots of all chunks, gathered, and the queries of this rank that see them.

Intervals are of positions in the sequence. A rank holds its queries in ascending order, so the
number of its queries before a position turns an interval of positions into one of its queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from flexdga.compress import Pooled, pool
from flexdga.config import DGAConfig
from flexdga.indexing import compact, take
from flexdga.parallel.focal import WholeFocal
from flexdga.parallel.shards import Shards
from flexdga.parallel.surroundings import Around, focal_slots
from flexdga.plan import NEVER, Documents, Plan
from flexdga.planner import group_slots_per_unit


class Gathered(NamedTuple):
    """Slots of the whole sequence: S of them, chunk after chunk.

    Attributes:
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        bias: (B, Hkv, S, 1) float32, or None.
        start, end, position: (B, Hkv, S) int32, in the sequence.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None
    start: Tensor
    end: Tensor
    position: Tensor


def gather_slots(
    chunks: Around,
    plan: Plan,
    docs: Documents,
    shards: Shards,
    config: DGAConfig,
    scale: float,
    whole: WholeFocal | None = None,
) -> Gathered:
    """Make the slots of this rank's chunks, and get everybody else's.

    Args:
        chunks: with their surroundings.
        plan: of them.
        docs: of the whole sequence.
        shards: how the sequence is cut.
        config: the choices.
        scale: of the scores.
        whole: focal tokens, where the whole prompt decides on them.
    """
    # Slots of the surroundings are their own ranks' to make.
    where = plan.position[..., plan.length :]
    alive = (where >= chunks.head) & (where < chunks.head + shards.size)
    stands = torch.cat([plan.focal >= 0, (plan.members >= 0).any(-1)], -1)
    alive = alive & stands & (plan.start < plan.end)[..., plan.length :]
    focal = plan.focal.shape[-1]
    if whole is None:
        capacity = focal_slots(shards.size, docs, shards, config)
    else:
        capacity = whole.slots(shards, 0)
    kept = compact(alive[..., :focal], capacity)
    units = slice(chunks.head // config.unit_size, (chunks.head + shards.size) // config.unit_size)
    each = group_slots_per_unit(config)
    groups = slice(units.start * each, units.stop * each)
    group = torch.arange(groups.start, groups.stop, dtype=torch.int32, device=where.device) + focal
    group = torch.where(alive[..., group.long()], group, -1)
    index = torch.cat([kept, group], -1)
    score = plan.member_score
    pooled = pool(
        chunks.query, chunks.key, chunks.value,
        torch.where(kept >= 0, take(plan.focal, kept), -1),
        torch.where(group[..., None] >= 0, plan.members[:, :, groups], -1),
        None if score is None else score[:, :, groups],
        weights=config.group_weights, mass=config.group_bias == "mass", scale=scale,
    )  # fmt: skip
    return _gathered(pooled, _intervals(plan, index, chunks, shards), shards)


def _intervals(plan: Plan, index: Tensor, chunks: Around, shards: Shards) -> Tensor:
    """(C·B, Hkv, S, 3) int32 start, end and position in the sequence; those of -1 are dead."""
    begin = torch.tensor(shards.numbers, dtype=torch.int32, device=index.device)
    begin = begin * shards.size - chunks.head
    begin = begin.repeat_interleave(index.shape[0] // shards.count)[:, None, None]
    dead = index < 0
    start, end, position = (
        take(t[..., plan.length :], index) + begin for t in (plan.start, plan.end, plan.position)
    )
    return torch.stack(
        [
            torch.where(dead, NEVER, start),
            torch.where(dead, 0, end),
            torch.where(dead, -1, position),
        ],
        -1,
    )


def _gathered(pooled: Pooled, interval: Tensor, shards: Shards) -> Gathered:
    key = torch.cat([pooled.focal_key, pooled.group_key], 2)
    value = torch.cat([pooled.focal_value, pooled.group_value], 2)
    times = _all(interval, shards, "intervals")
    both = _all(torch.cat([key, value], -1), shards, "slots")
    bias = None
    if pooled.entropy is not None:
        none = pooled.entropy.new_zeros(*pooled.focal_key.shape[:3])
        bias = _all(torch.cat([none, pooled.entropy], -1)[..., None], shards, "bias")
    keys, values = both.split([key.shape[-1], value.shape[-1]], -1)
    start, end, position = times.unbind(-1)
    return Gathered(keys, values, bias, start, end, position)


def _all(x: Tensor, shards: Shards, what: str) -> Tensor:
    """(C·B, Hkv, S, D) of every rank to (B, Hkv, chunks·S, D)."""
    if not x.numel():
        return x.new_zeros(x.shape[0] // shards.count, *x.shape[1:])
    every = shards.gathered(x.unflatten(0, (shards.count, -1)), what)
    return funcol.wait_tensor(every).permute(1, 2, 0, 3, 4).flatten(2, 3)


def queries_before(position: Tensor, shards: Shards, rank: int | None = None) -> Tensor:
    """How many of a rank's queries (None: of this one's) stand before each position."""
    numbers = shards.numbers if rank is None else shards.numbers_of(rank)
    counts = [(position - number * shards.size).clamp(min=0, max=shards.size) for number in numbers]
    return torch.stack(counts).sum(0, dtype=torch.int32)
