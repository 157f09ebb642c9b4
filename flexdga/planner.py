"""From query, key and value to a `Plan`: importance, focal tokens, groups, handover times."""

from __future__ import annotations

import torch
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.focal import (
    focal_capacity,
    focal_of_prompt,
    in_last_document,
    is_sink,
    top,
    units_of,
)
from flexdga.grouping import group_units, group_whole
from flexdga.handover import leaves_window, lookahead, plan_of, raw_plan, takeover
from flexdga.importance import prompt_importance, unit_importance
from flexdga.indexing import compact, runs, take
from flexdga.plan import NEVER, Documents, Plan


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
    return plan_of(focal, members, member_score, first, after, config, is_causal)


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
        enters = takeover(index, config)
        start = torch.where((enters > start) & ~sink, enters, start)
    return raw_plan(start, end, kv_heads, config.step)


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
    focal = compact(units_of(chosen, config), focal_slots_per_unit(config))
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
    return raw_plan(start, docs.after, kv_heads)


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
    lives = in_last_document(docs, config)[:, None]
    sink = units_of(is_sink(docs, config), config)[:, None]
    ranked = score.masked_fill(sink, torch.inf).masked_fill(~lives, -1.0)
    chosen = (top(ranked, config.focal_per_unit) | sink) & lives
    return chosen.flatten(2), score.flatten(2)


def _group_by_unit(
    chosen: Tensor, key: Tensor, value: Tensor, docs: Documents, config: DGAConfig
) -> Tensor:
    if not config.groups:
        none = (*key.shape[:2], 0, config.group_size)
        return torch.full(none, -1, dtype=torch.int32, device=key.device)
    free = units_of(~chosen, config) & in_last_document(docs, config)[:, None]
    return group_units(free, key, value, config)


def _member_score(score: Tensor, members: Tensor, config: DGAConfig) -> Tensor | None:
    """Importance of the members of groups, where the weights need it."""
    if config.group_weights != "importance":
        return None
    return torch.where(members >= 0, take(score, members), 0.0)
