"""From query, key and value to a `Plan`: importance, focal tokens, groups, handover times.

A token is seen raw until its handover; from then on its focal copy or its group stands for it.
What finds no slot stays raw to the end of its document, so nothing is ever lost.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.grouping import group_units, group_whole
from flexdga.importance import prompt_importance, unit_importance
from flexdga.indexing import compact, put, runs, take
from flexdga.plan import NEVER, Documents, Plan

T = TypeVar("T", int, Tensor)


def documents(
    ids: Tensor | None, lengths: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Documents:
    """Documents of a batch.

    Args:
        ids: (B, L), equal within a document, negative for padding; or None.
        lengths: (B,), real tokens of right-padded rows; or None.
        shape: (B, L); one document a row if neither is given.
        device: where to put them.
    """
    if ids is not None:
        first, after = runs(ids)
        real = ids >= 0
        return Documents(torch.where(real, first, NEVER), torch.where(real, after, 0), packed=True)
    first = torch.zeros(shape, dtype=torch.int32, device=device)
    if lengths is None:
        return Documents(first, torch.full_like(first, shape[1]), packed=False)
    after = lengths.to(device, torch.int32)[:, None].expand(shape)
    real = torch.arange(shape[1], dtype=torch.int32, device=device) < after
    return Documents(torch.where(real, first, NEVER), torch.where(real, after, 0), packed=False)


def plan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents,
    *,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
    room: tuple[int, Tensor] | None = None,
    copies: bool = False,
    focal_of_whole: tuple[Tensor, Tensor] | None = None,
) -> Plan:
    """Plan one attention call. One graph, static shapes for a given length and config.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, D).
        docs: from `documents`.
        config: the choices.
        is_causal: False lets queries see both ways (`prompt` scope only).
        scale: of the scores.
        room: of a part of a longer sequence, the focal slots that its plan has, and (B,) how many
            of the tokens that would be focal may be; None = what is right for a whole one.
        copies: whether sinks get slots where nothing else has any; others may need to see them.
        focal_of_whole: of a part of a longer prompt, its (B, Hkv, L) focal tokens, which the whole
            prompt decides, and everybody's importance.
    """
    if config.only_sinks and not copies:
        return _plan_without_slots(docs, key.shape[1], config, is_causal)
    if focal_of_whole is not None:
        chosen, score = focal_of_whole
    elif config.scope == "causal":
        chosen, score = _focal_by_unit(query, key, value, docs, config, scale)
    else:
        chosen, score = _focal_of_prompt(query, key, value, docs, config, is_causal, scale)
    steps = key.shape[2] // config.step
    if room is None:
        capacity = focal_capacity(steps, config)
        chosen = chosen & (chosen.cumsum(-1) <= capacity)
    else:
        capacity = room[0]
        chosen = chosen & (chosen.cumsum(-1) <= room[1][:, None, None])
    focal = compact(chosen, capacity)

    if config.groups and config.whole_sequence:
        members = group_whole(~chosen, steps, config)
    else:
        members = _group_by_unit(chosen, key, value, docs, config)
    # A group belongs to its last member's document; members of an earlier one have no query left.
    last = members.amax(-1)
    first, after = (t[:, None].expand(-1, key.shape[1], -1) for t in (docs.first, docs.after))
    same = take(first, members) == take(first, last)[..., None]
    members = torch.where((members >= 0) & same, members, -1)

    member_score = _member_score(score, members, config)
    return _intervals(focal, members, member_score, first, after, config, is_causal)


def _plan_without_slots(docs: Documents, kv_heads: int, config: DGAConfig, is_causal: bool) -> Plan:
    """Sinks stay raw, the rest is dropped: copies of sinks would fill no key block."""
    index = torch.arange(docs.first.shape[1], dtype=torch.int32, device=docs.first.device)
    leaves, sink = leaves_window(index, config), is_sink(docs, config)
    # Of minima and maxima Inductor (torch 2.13) would make parts of an index, and fail.
    end = torch.where((leaves < docs.after) & ~sink, leaves, docs.after)
    start = docs.first
    if is_causal:
        start = torch.where(index > start, index, start)
    else:
        enters = _takeover(index, config)
        start = torch.where((enters > start) & ~sink, enters, start)
    return _raw_plan(start, end, kv_heads, config.step)


def plan_units(
    query: Tensor, key: Tensor, value: Tensor, docs: Documents, *, config: DGAConfig, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `causal` scope decides for each unit, alone: the cache asks unit by unit.

    Args:
        query: (B, H, L, D), L in whole units.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, D).
        docs: a document's first token may lie before this stretch, at a negative index.
        config: the choices.
        scale: of the scores.

    Returns:
        For N units: (B, Hkv, N, `focal_slots_per_unit`) int32 focal tokens and (B, Hkv, N, G, m)
        int32 members of groups, -1 for none, and their importance if the weights need it. What a
        unit's row says holds if all tokens up to its handover are here.
    """
    chosen, score = _focal_by_unit(query, key, value, docs, config, scale)
    members = _group_by_unit(chosen, key, value, docs, config)
    focal = compact(_units(chosen, config), focal_slots_per_unit(config))
    base = torch.arange(focal.shape[2], dtype=torch.int32, device=focal.device) * config.unit_size
    focal = torch.where(focal >= 0, focal + base[:, None], -1)
    members = members.unflatten(2, (focal.shape[2], group_slots_per_unit(config)))
    return focal, members, _member_score(score, members, config)


def focal_slots_per_unit(config: DGAConfig) -> int:
    """Focal slots that hold whatever `causal` scope chooses from a unit."""
    return max(config.focal_per_unit, min(config.sinks, config.unit_size))


def group_slots_per_unit(config: DGAConfig) -> int:
    """Groups of a unit, where they stay inside units."""
    return -(-config.unit_size // config.group_size) if config.groups else 0


def dense_plan(docs: Documents, kv_heads: int, *, is_causal: bool) -> Plan:
    """Everything raw, nothing grouped: exact dense attention as a plan."""
    index = torch.arange(docs.first.shape[1], dtype=torch.int32, device=docs.first.device)
    start = torch.where(index > docs.first, index, docs.first) if is_causal else docs.first
    return _raw_plan(start, docs.after, kv_heads)


def _raw_plan(start: Tensor, end: Tensor, kv_heads: int, step: int = 1) -> Plan:
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
    Elsewhere it stores what is read with other strides.
    """
    x = torch.cat([x[..., :step], x[..., step:]], -1)
    return x if x.device.type == "cpu" else x.as_strided(x.shape, x.stride())


def _focal_of_prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Focal tokens by rank within their document: (B, Hkv, L) bool, and everybody's score."""
    score = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    if config.needs_importance:
        score = prompt_importance(
            query, key, value, docs.first, docs.after,
            config=config, is_causal=is_causal, scale=scale,
        )  # fmt: skip
    return focal_of_prompt(score, docs, config, is_causal), score


def focal_of_prompt(score: Tensor, docs: Documents, config: DGAConfig, is_causal: bool) -> Tensor:
    """(B, Hkv, L) bool: the focal tokens of a whole prompt, from their importance."""
    length = score.shape[-1]
    index = torch.arange(length, dtype=torch.int32, device=score.device)
    # A token that no query sees past its handover would waste a focal slot.
    lives = handover(index, config) < docs.after
    if not is_causal:
        lives = lives | ((_takeover(index, config) > docs.first) & (docs.after > 0))
    lives, sink = lives[:, None], is_sink(docs, config)[:, None]
    ranked = score.masked_fill(sink, torch.inf).masked_fill(~lives, -1.0)
    quota = _focal_quota(docs, config)
    if docs.packed:
        chosen = _top_of_each_document(ranked, docs.first, quota)
    else:
        most = length // config.step * config.focal_per_step
        chosen = _top(ranked, most, quota.amax(-1)[:, None, None])
    return (chosen | sink) & lives


def _focal_by_unit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents,
    config: DGAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same by rank within each unit, from what is known at the unit's handover."""
    units = (*key.shape[:2], key.shape[2] // config.unit_size, config.unit_size)
    score = torch.zeros(units, dtype=torch.float32, device=key.device)
    if config.needs_importance:
        score = unit_importance(
            query, key, value, docs.first,
            config=config, lookahead=lookahead(config), scale=scale,
        )  # fmt: skip
    lives = _in_last_document(docs, config)[:, None]
    sink = _units(is_sink(docs, config), config)[:, None]
    ranked = score.masked_fill(sink, torch.inf).masked_fill(~lives, -1.0)
    chosen = (_top(ranked, config.focal_per_unit) | sink) & lives
    return chosen.flatten(2), score.flatten(2)


def _group_by_unit(
    chosen: Tensor, key: Tensor, value: Tensor, docs: Documents, config: DGAConfig
) -> Tensor:
    if not config.groups:
        none = (*key.shape[:2], 0, config.group_size)
        return torch.full(none, -1, dtype=torch.int32, device=key.device)
    free = _units(~chosen, config) & _in_last_document(docs, config)[:, None]
    return group_units(free, key, value, config)


def _member_score(score: Tensor, members: Tensor, config: DGAConfig) -> Tensor | None:
    """Importance of the members of groups, where the weights need it."""
    if config.group_weights != "importance":
        return None
    return torch.where(members >= 0, take(score, members), 0.0)


def focal_capacity(steps: int, config: DGAConfig) -> int:
    """Focal slots of a plan over so many steps, with room for the sinks."""
    room = steps * config.focal_per_step
    if config.focal_budget is not None:
        room = torch.sym_min(room, max(config.focal_budget, config.sinks))
    each = config.focal_per_unit if config.scope == "causal" else config.focal_per_step
    return room + max(config.sinks - each, 0)


def focal_counts(docs: Documents, config: DGAConfig) -> Tensor:
    """(B, N) int64: how many tokens of each unit are focal, where only documents decide that.

    So it is in `causal` scope, and where sinks alone are focal.
    """
    sink = _units(is_sink(docs, config), config)
    if config.scope == "causal":
        lives = _in_last_document(docs, config)
        most = (sink & lives).sum(-1).clamp(min=config.focal_per_unit)
        return torch.minimum(most, lives.sum(-1))
    index = torch.arange(docs.first.shape[-1], dtype=torch.int32, device=docs.first.device)
    return (sink & _units(handover(index, config) < docs.after, config)).sum(-1)


def _focal_quota(docs: Documents, config: DGAConfig) -> Tensor:
    """(B, L) int64: focal tokens that each token's document earns, rounded down."""
    size = (docs.after - docs.first).clamp(min=0).long()
    if config.focal_budget is not None:
        total = (docs.after > 0).sum(-1, keepdim=True)
        return torch.minimum(size, config.focal_budget * size // total.clamp(min=1))
    top, bottom = config.focal_share
    return size * top // bottom


def _top(score: Tensor, most: int, quota: Tensor | None = None) -> Tensor:
    """Mask of the `most` highest entries of the last dimension, or the first `quota` of them."""
    best = score.topk(most, dim=-1).indices
    among = torch.ones_like(best, dtype=torch.bool)
    if quota is not None:
        among = torch.arange(most, device=score.device) < quota
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, among.expand_as(best))


def _top_of_each_document(score: Tensor, first: Tensor, quota: Tensor) -> Tensor:
    """Mask of the highest entries of each document, as many as its (B, L) quota says."""
    first, quota = (t[:, None].expand_as(score) for t in (first, quota))
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, first.gather(-1, order).argsort(dim=-1, stable=True))
    rank = torch.arange(score.shape[-1], device=score.device) - runs(first.gather(-1, order))[0]
    among = rank < quota.gather(-1, order)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, among)


def is_sink(docs: Documents, config: DGAConfig) -> Tensor:
    """(B, L) bool: the first tokens of each document."""
    index = torch.arange(docs.first.shape[-1], dtype=torch.int32, device=docs.first.device)
    return (docs.after > 0) & (index - docs.first < config.sinks)


def _units(x: Tensor, config: DGAConfig) -> Tensor:
    """(..., L) to (..., N, U)."""
    return x.unflatten(-1, (-1, config.unit_size))


def _in_last_document(docs: Documents, config: DGAConfig) -> Tensor:
    """(B, N, U) bool: tokens in the document of their unit's last real token.

    The unit's other documents end inside it, so no query is left to see their slots.
    """
    first = _units(docs.first, config)
    real = first != NEVER
    return real & (first == torch.where(real, first, -NEVER).amax(-1, keepdim=True))


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


def _takeover(first: Tensor, config: DGAConfig) -> Tensor:
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


def _intervals(
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
        focal_to, group_to = _takeover(focal, config), _takeover(earliest, config)
        start = first
        if not config.groups:
            enters = _takeover(index, config)
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
