"""Attention of a prompt, and of one token more, over a decode cache of tensors of fixed size.

It is what an exported program does in place of a `DGACache`: the same numbers, without a branch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexdga.attention import dga_attention
from flexdga.config import DGAConfig
from flexdga.estimates import (
    Units,
    far_log_mass,
    unit_documents,
    unit_features,
    units_beyond,
)
from flexdga.exact import attend_all
from flexdga.far_units import asked, raw_scores
from flexdga.handoff import all_slots_of_units
from flexdga.indexing import compact, filled, take_rows
from flexdga.int8 import pack, unpack
from flexdga.open_columns import Opened, bias_with_opened, opened_units, positions
from flexdga.opening import openings, served, surroundings
from flexdga.plan import NEVER
from flexdga.planner import group_slots_per_unit
from flexdga.static_layout import Layout, State
from flexdga.storage import Columns, Origins


def remember(
    query: Tensor, key: Tensor, value: Tensor, filled_length: int, layout: Layout, scale: float
) -> tuple[Tensor, State]:
    """Attention of a prompt, and what is left of it for the next token.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        filled_length: L up to whole steps of the plan, `layout.step`.
        layout: of the layer.
        scale: of the scores.

    Returns:
        (B, H, L, Dv), and the state.
    """
    out = dga_attention(query, key, value, config=layout.prompt, scale=scale)
    assert isinstance(out, Tensor)
    length = key.shape[2]
    if layout.dense:
        return out, {"key": _whole(key, layout), "value": _whole(value, layout)}
    config = layout.config
    query, key, value = (filled(x, 2, filled_length - length, 0) for x in (query, key, value))
    time = _as_data(torch.full((), length - 1, device=key.device), key)
    done, place = layout.done(time), layout.positions(time)
    index = place.clamp(min=0)
    parts: dict[str, list[Tensor]] = {
        "key": [key.index_select(2, index)], "value": [value.index_select(2, index)], "bias": [],
    }  # fmt: skip

    def add(key: Tensor, value: Tensor, bias: Tensor) -> None:
        for name, x in (("key", key), ("value", value), ("bias", bias)):
            parts[name].append(x)

    if layout.extra:
        sink = slice(config.focal_per_unit, config.sinks)
        add(key[:, :, sink], value[:, :, sink], torch.zeros_like(key[:, :, sink, 0]))
    if layout.per_unit:
        first = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
        first = torch.where(first < length, 0, NEVER).expand(key.shape[:3])
        slots = _slots(query, key, value, first, torch.zeros_like(done), layout, scale)
        number = torch.arange(slots[0].shape[2], device=key.device)
        slots[2] = torch.where((number < done)[:, None], slots[2], -math.inf)
        add(*(x.flatten(2, 3) for x in slots))
    for name, blank in (("key", 0.0), ("value", 0.0), ("bias", -math.inf)):
        like = key[..., 0] if name == "bias" else {"key": key, "value": value}[name]
        size = layout.slots + layout.scrap + (0 if name == "bias" else layout.ring)
        used = sum(x.shape[2] for x in parts[name])
        shape = (*like.shape[:2], size - used, *like.shape[3:])
        parts[name].append(like.new_full(shape, blank))
    state = {name: torch.cat(x, 2) for name, x in parts.items()}
    if layout.keeps_queries:
        state["query"] = query.index_select(2, index)
    if layout.opens:
        state |= _far(query, key, value, length, time, layout, scale)
    return out, {name: state[name] for name in layout.names}


def step(
    query: Tensor, key: Tensor, value: Tensor, state: State, time: Tensor, layout: Layout,
    scale: float, past: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the next token to all so far, itself included; `state` is changed in place.

    Args:
        query: (B, H, 1, D).
        key: (B, Hkv, 1, D).
        value: (B, Hkv, 1, Dv).
        state: from `remember`, and the steps since.
        time: () int64, tokens before this one.
        layout: of the layer.
        scale: of the scores.
        past: `time` as a number, where the caller has it: a compiler takes each reading of a
            tensor for another number, and layers are many.

    Returns:
        (B, H, 1, Dv).
    """
    at = (time % layout.ring).view(1)
    _write(state["key"], at, key)
    _write(state["value"], at, value)
    if layout.dense:
        count: Any = (time.item() if past is None else past) + 1
        torch._check(count >= 2)
        torch._check(count <= layout.capacity)
        keys, values = (state[name].narrow(2, 0, count) for name in ("key", "value"))
        return attend_all(query, keys, values, keys.new_zeros(1, 1, 1, count), scale=scale)
    config, ring = layout.config, layout.ring
    if layout.extra:
        # A sink has its own column from the beginning, which is seen from its handover on.
        sink = (time >= config.focal_per_unit) & (time < config.sinks)
        column = torch.where(sink, time - config.focal_per_unit, layout.slots).view(1)
        _write(state["key"], ring + column, key)
        _write(state["value"], ring + column, value)
        shown = torch.where(sink, 0.0, -math.inf).to(key)
        _write(state["bias"], column, shown.expand(*key.shape[:2], 1))
    if layout.keeps_queries:
        _write(state["query"], at, query)
    done = layout.done(time)
    if layout.per_unit:
        _pool(state, time, layout, scale)

    place = layout.positions(time)
    raw = torch.where(place >= done * config.unit_size, 0.0, -math.inf).to(key)
    raw = raw.expand(*key.shape[:2], -1)
    bias = torch.cat([raw, state["bias"]], 2)
    if layout.extra:
        sinks = slice(ring, ring + layout.extra)
        hidden = torch.where(done > 0, 0.0, -math.inf).to(key)
        bias = torch.cat([raw, bias[:, :, sinks] + hidden, bias[:, :, sinks.stop :]], 2)
    bias, keys, values = bias[:, :, None], state["key"], state["value"]
    if layout.opens:
        opened, far_key, far_value = _open(query, key, value, bias, state, time, layout, scale)
        bias = bias_with_opened(bias, opened, ring)
        keys, values = torch.cat([far_key, keys], 2), torch.cat([far_value, values], 2)
    return attend_all(query, keys, values, bias, scale=scale)


def _whole(x: Tensor, layout: Layout) -> Tensor:
    """(B, H, L, D) in room for a whole text. Beyond it are copies of the last token, never seen."""
    last = _as_data(torch.full((), x.shape[2] - 1, device=x.device), x)
    place = torch.arange(layout.capacity, device=x.device)
    return x.index_select(2, torch.minimum(place, last))


def _write(buffer: Tensor, index: Tensor, new: Tensor) -> None:
    """In place, columns of (B, H, C, ...)."""
    buffer.index_copy_(2, index, new.to(buffer.dtype))


def _homes(layout: Layout, device: torch.device) -> Tensor:
    """(C,) the unit of each column of slots."""
    slot = torch.arange(layout.slots + layout.scrap, device=device) - layout.extra
    unit = torch.div(slot, max(layout.per_unit, 1), rounding_mode="floor")
    inside = (slot >= 0) & (unit < (layout.count if layout.per_unit else 0))
    return torch.where(inside, unit, 0)


def _as_data(number: Tensor, some: Tensor) -> Tensor:
    """`number`, but as if it depended on data: Inductor fails to simplify indices made of sizes."""
    some = some[0, 0, 0, 0]
    return number + ((some != some) & (some == some)).to(number.dtype)


def _slots(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, done: Tensor, layout: Layout,
    scale: float,
) -> list[Tensor]:  # fmt: skip
    """Of whole units: (B, Hkv, N, `per_unit`, D) keys and values, and (B, Hkv, N, ...) bias."""
    config, units = layout.config, key.shape[2] // layout.config.unit_size
    blank = torch.zeros_like(first)
    columns, origins = Columns(key, value, blank, blank), Origins(first, query)
    slots = all_slots_of_units(columns, origins, units, done, config=config, scale=scale)
    groups = group_slots_per_unit(config) * units
    focal = slots.key.shape[2] - groups

    def by_unit(x: Tensor) -> Tensor:
        x_focal, x_group = x.split([focal, groups], 2)
        x_focal = x_focal.unflatten(2, (units, -1))[:, :, :, : config.focal_per_unit]
        return torch.cat([x_focal, x_group.unflatten(2, (units, -1))], 3)

    return [by_unit(x) for x in (slots.key, slots.value, slots.bias)]


def _pool(state: State, time: Tensor, layout: Layout, scale: float) -> None:
    """Slots in place of the units that are due at query `time`, if there are any."""
    config, ring = layout.config, layout.ring
    before, after = layout.done(time - 1), layout.done(time)
    unit = torch.arange(layout.stretch * config.unit_size, device=time.device)
    token = before * config.unit_size + unit
    index = token % ring
    factor: Any = torch.full((), scale, device=time.device)  # `cond` takes no symbolic float

    def pooled(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        first = torch.where(token <= time, 0, NEVER).to(torch.int32).expand(*key.shape[:2], -1)
        query, key, value = (x[:, :, :ring].index_select(2, index) for x in (query, key, value))
        made = _slots(query, key, value, first, before * config.unit_size, layout, factor)
        return tuple(x[:, :, : layout.at_once].flatten(2, 3).contiguous() for x in made)

    def nothing(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        shape = (*key.shape[:2], layout.at_once * layout.per_unit)
        blank = (key.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3]))
        return *blank, key.new_zeros(shape)

    query = state["query"] if layout.keeps_queries else state["key"][:, :, :ring]
    slots = torch.cond(after > before, pooled, nothing, (query, state["key"], state["value"]))
    number = torch.arange(layout.at_once, device=time.device) + before
    column = (number[:, None] * layout.per_unit) + torch.arange(layout.per_unit, device=time.device)
    spare = torch.arange(layout.at_once * layout.per_unit, device=time.device)
    column = torch.where(
        (number < after)[:, None], layout.extra + column, layout.slots + spare.view_as(column)
    ).flatten()
    _write(state["key"], ring + column, slots[0])
    _write(state["value"], ring + column, slots[1])
    written = torch.where(column < layout.slots, slots[2], -math.inf)
    _write(state["bias"], column, written)


# Openings


def _far(
    query: Tensor, key: Tensor, value: Tensor, length: int, time: Tensor, layout: Layout,
    scale: float,
) -> State:  # fmt: skip
    """What a prompt leaves to be opened."""
    config, rows = layout.config, layout.config.block_size[0]
    kept = _packed(key, value, config)
    made = {f"far{i}": filled(x, 2, layout.capacity - key.shape[2], 0) for i, x in enumerate(kept)}
    first = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
    first = torch.where(first < length, 0, NEVER).expand(key.shape[0], -1)
    units = Units(unit_features(key, config), unit_documents(first, config))
    block = (time // rows).view(1)
    index = block * rows + torch.arange(rows, device=key.device)
    around = surroundings(key, first, config=layout.prompt, is_causal=True).of(block)
    since = openings(
        query.index_select(2, index), around, units,
        config=layout.prompt, is_causal=True, scale=scale,
    )  # fmt: skip
    is_open = since[:, :, 0] < NEVER
    made["open"] = filled(is_open, 2, layout.count - is_open.shape[2], False)
    if config.open_by == "landmarks":
        made["units"] = filled(units.key, 2, layout.count - units.key.shape[2], 0)
    return made


def _open(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, state: State, time: Tensor,
    layout: Layout, scale: float,
) -> tuple[Opened, Tensor, Tensor]:  # fmt: skip
    """Store the token among those that may be opened; what its query opens, and its tokens."""
    config, (rows, size) = layout.config, layout.config.block_size
    for i, x in enumerate(_packed(key, value, config)):
        _write(state[f"far{i}"], time.view(1), x)
    kept = [state[f"far{i}"] for i in range(len(_packed(key, value, config)))]
    half, done = len(kept) // 2, layout.done(time)
    if config.open_by == "landmarks":
        # The newest units that may be opened: what was written before is written again.
        number = (done - layout.at_once).clamp(min=0) + torch.arange(
            layout.at_once, device=time.device
        )
        token = number[:, None] * size + torch.arange(size, device=time.device)
        newest = _restored([x.index_select(2, token.flatten()) for x in kept[:half]])
        _write(state["units"], number, unit_features(newest, config))
        units = state["units"]
    else:
        units = _restored(kept[:half])
    ring = layout.ring
    near = raw_scores(query, state["key"][:, :, :ring], bias[..., :ring], scale)
    far = far_log_mass(query, units, config, scale, units_beyond(done.view(1), config))
    may = torch.arange(layout.count, device=time.device) < done
    want, total = asked(far.masked_fill(~may, -math.inf), near, config)
    already = state["open"] & (time % rows != 0)
    if config.open_units is not None:
        share = torch.exp(far - total[..., None])
        chosen = served(want, share, config.open_units, turns=True, already=already)
        want = want & chosen[:, :, None]
    is_open = want[:, :, 0] | already
    state["open"].copy_(is_open)
    needed = is_open.unflatten(1, (key.shape[1], -1)).any(2)
    # Two at least: compilers take sizes of 1 for constants.
    most: Any = needed.sum(-1).amax().clamp(min=2).item()
    torch._check(most >= 2)
    torch._check(most <= layout.count)
    unit = compact(needed, most)
    index = positions(unit, size)
    key, value = (
        _restored([take_rows(x, index) for x in part]) for part in (kept[:half], kept[half:])
    )
    homes = _homes(layout, key.device).expand(*key.shape[:2], -1)
    opened = opened_units(is_open[:, :, None], unit.long(), homes, size, query.dtype)
    return opened, key, value


def _packed(key: Tensor, value: Tensor, config: DGAConfig) -> list[Tensor]:
    if config.keep_raw != "int8":
        return [key, value]
    return [*pack(key), *pack(value)]


def _restored(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else unpack(parts[0], parts[1], parts[1].dtype)
