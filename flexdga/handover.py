"""When a slot stands in for raw tokens: the interval of queries that sees each.

A token is seen raw until its handover; from then on its focal copy or its group stands for it.
What finds no slot stays raw to the end of its document, so nothing is ever lost.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.indexing import put, stored, take
from flexdga.plan import NEVER, Plan

T = TypeVar("T", int, Tensor)


def handover(last: T, config: DGAConfig) -> T:
    """First query that sees the slot in place of raw tokens, of which `last` is the last."""
    time = last + config.window
    block = config.block_size[0]
    return (time + block - 1) // block * block if config.align else time


def leaves_window(last: Tensor, config: DGAConfig) -> Tensor:
    """First query that sees what ends with `last` through its slot: with its whole unit, or alone.

    All of a unit waits for its last token, where the unit decides or opens as a whole.
    """
    if config.scope == "causal" or config.opens:
        last = last // config.unit_size * config.unit_size + config.unit_size - 1
    return handover(last, config)


def takeover(first: Tensor, config: DGAConfig) -> Tensor:
    """Looking back from later tokens: first query that sees `first` raw in place of its slot."""
    time = (first - max(config.window - 1, 0)).clamp(min=0)
    block = config.block_size[0]
    return time // block * block if config.align else time


def lookahead(config: DGAConfig) -> int:
    """Tokens after a unit that are known at its handover, whichever unit it is."""
    block, unit = config.block_size[0], config.unit_size
    if config.align and unit % block == 0:
        return -(-(unit - 1 + config.window) // block) * block - unit
    return max(config.window - 1, 0)


def plan_of(
    focal: Tensor,
    members: Tensor,
    member_score: Tensor | None,
    first: Tensor,
    after: Tensor,
    config: DGAConfig,
    is_causal: bool,
) -> Plan:
    """Who sees which slot, clipped to documents; sections filled up to the kernel's key block."""
    length = first.shape[-1]
    group_last = members.amax(-1)
    focal_from, group_from = leaves_window(focal, config), leaves_window(group_last, config)
    index = torch.arange(length, dtype=torch.int32, device=first.device).expand_as(first)
    # What no slot stands for is raw to the end of its document, or dropped.
    raw_end = after
    if not config.groups:
        leaves = leaves_window(index, config)
        # As a minimum, or below a maximum, Inductor (torch 2.13) would make it part of an index,
        # and fail.
        raw_end = torch.where(leaves < after, leaves, after)
    raw_end = put(
        put(raw_end, focal, focal_from), members.flatten(2), _per_member(group_from, members)
    )
    focal_first, focal_after = take(first, focal), take(after, focal)
    group_first, group_after = take(first, group_last), take(after, group_last)
    size = (members >= 0).sum(-1, dtype=torch.int32)
    middle = members.clamp(min=0).sum(-1, dtype=torch.int64) // size.clamp(min=1)

    raw = _Section(index, index, torch.minimum(raw_end, after))
    foc = _Section(focal, focal_from, torch.where(focal >= 0, focal_after, 0))
    grp = _Section(middle.int(), group_from, torch.where(size > 0, group_after, 0))
    if not is_causal:
        earliest = torch.where(members >= 0, members, NEVER).amin(-1)
        focal_to, group_to = takeover(focal, config), takeover(earliest, config)
        start = first
        if not config.groups:
            enters = takeover(index, config)
            start = torch.where(enters > first, enters, first)
        start = put(put(start, focal, focal_to), members.flatten(2), _per_member(group_to, members))
        raw = raw._replace(start=torch.maximum(start, first))
        # Slots are seen from both sides of their tokens: once before, once after.
        early = _Section(focal, focal_first, torch.where(focal >= 0, focal_to, 0))
        foc = _Section(*(torch.cat(pair, -1) for pair in zip(early, foc)))
        early = _Section(middle.int(), group_first, torch.where(size > 0, group_to, 0))
        grp = _Section(*(torch.cat(pair, -1) for pair in zip(early, grp)))
        focal = torch.cat([focal, focal], -1)
        members = torch.cat([members, members], -2)
        if member_score is not None:
            member_score = torch.cat([member_score, member_score], -2)

    # The kernel's masks capture these three. Inductor takes the result of a `cat` as it is, but
    # nothing computed on top of it: dead slots are marked before.
    position, start, end = (
        torch.cat(t, -1) for t in zip(*(_mark_dead(s) for s in (raw, foc, grp)))
    )
    return Plan(start, end, position, focal, members, member_score)


def _mark_dead(section: _Section) -> _Section:
    position, start, end = section
    alive = start < end
    return _Section(position, torch.where(alive, start, NEVER), torch.where(alive, end, 0))


class _Section(NamedTuple):
    position: Tensor
    start: Tensor
    end: Tensor


def _per_member(group: Tensor, members: Tensor) -> Tensor:
    return group[..., None].expand_as(members).flatten(2)


def raw_plan(start: Tensor, end: Tensor, kv_heads: int, step: int = 1) -> Plan:
    """Raw tokens alone, seen from (B, L) `start` to `end`, alike in all KV heads.

    `step` is the plan's, where the tokens are in whole ones.
    """
    index = torch.arange(start.shape[1], dtype=torch.int32, device=start.device).expand_as(start)
    none = start.new_full((start.shape[0], kv_heads, 0, 1), -1)
    section = _mark_dead(_Section(index, start, end))
    start, end, position = (
        _stored(part[:, None].expand(-1, kv_heads, -1), step)
        for part in (section.start, section.end, section.position)
    )
    return Plan(start, end, position, none[..., 0], none, none.float())


def _stored(x: Tensor, step: int) -> Tensor:
    """A copy of (..., L) in memory, as the kernel's masks need what they capture.

    Inductor (torch 2.13) would compute it anew inside the mask, or fail to. On CPU it stores the
    result of a `cat`, but not of one with nothing, which it drops; cut at a whole step, because it
    splits loops in which positions are divided into units, and leaves the rest of a length out.
    """
    return stored(torch.cat([x[..., :step], x[..., step:]], -1))
