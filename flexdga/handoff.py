"""From plans to the slots with which decoding goes on: of a prompt, and of units of new tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexdga.compress import Pooled, pool
from flexdga.config import DGAConfig
from flexdga.handover import leaves_window
from flexdga.indexing import compact, take, take_rows
from flexdga.plan import NEVER, Documents, Plan
from flexdga.planner import plan_units
from flexdga.storage import Columns, Origins


def goes_on(ids: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """(B, L) bool: the tokens of a prompt that decoding goes on from.

    Args:
        ids: (B, L) documents, or None.
        shape: (B, L).
        device: where to put them.

    Raises:
        ValueError: a row ends in padding.
    """
    if ids is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    bad = ((ids[:, -1] < 0) & (ids >= 0).any(-1)).nonzero()
    if len(bad):
        raise ValueError(
            f"document_ids: decoding goes on from a row's last token; expected padding on "
            f"the left, got row {int(bad[0, 0])}, which ends in padding"
        )
    return (ids == ids[:, -1:]) & (ids >= 0)  # not padding, nor a document that ended


def first_real(real: Tensor) -> Tensor:
    """(B, 1) int32: the first real token of each row, or the row's length."""
    none = ~real.any(-1, keepdim=True)
    first = real.int().argmax(-1, keepdim=True).masked_fill(none, real.shape[1])
    return first.to(torch.int32)


def raw_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    raw: Tensor,
    doc_first: Tensor,
    *,
    live: int,
    seen: int,
    keep_queries: bool,
) -> tuple[Columns, Origins]:
    """Raw tokens of a prompt, in order at the end of `live` columns.

    Args:
        query: (B, H, n, D) of its last n tokens.
        key: (B, Hkv, n, D).
        value: (B, Hkv, n, Dv).
        raw: (B, Hkv, n) bool, those that stay raw.
        doc_first: (B, 1) first token of each row's document.
        live: how many columns.
        seen: tokens of the prompt.
        keep_queries: whether the queries are wanted too.
    """
    count = key.shape[2]
    token = count - 1 - compact(raw.flip(-1), live).flip(-1)
    token = torch.where(token < count, token, -1)
    here = token >= 0
    bias = torch.where(here, 0.0, -math.inf).to(key)
    position = torch.where(here, token + seen - count, -1)
    # Columns of nothing are 0: what is grouped by likeness is scaled by all of its unit.
    columns = Columns(_rows_or_0(key, token), _rows_or_0(value, token), bias, position)
    queries = query[:, :, :0]
    if keep_queries:
        queries = _rows_or_0(query, token.repeat_interleave(query.shape[1] // key.shape[1], 1))
    return columns, Origins(torch.where(here, doc_first[:, None], NEVER), queries)


def _rows_or_0(x: Tensor, index: Tensor) -> Tensor:
    return take_rows(x, index).masked_fill((index < 0)[..., None], 0)


def seen_after(plan: Plan, length: int) -> Tensor:
    """(B, Hkv, S) bool: the slots of the plan that the last of `length` queries sees."""
    return (plan.start < length) & (plan.end >= length)


def slots_after(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, config: DGAConfig, scale: float
) -> Columns:
    """Focal copies and groups of a prompt, those alone that a query after it sees.

    Args:
        query: (B, H, L, D) of the prompt.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        plan: of the prompt.
        config: with which it was made.
        scale: of the scores.
    """
    length = key.shape[2]
    alive = seen_after(plan, length)[..., plan.length :]
    focal, group = alive.split([plan.focal.shape[-1], plan.members.shape[-2]], -1)
    pooled = pool(
        query, key, value,
        torch.where(focal, plan.focal, -1),
        torch.where(group[..., None], plan.members, -1),
        plan.member_score,
        weights=config.group_weights, mass=config.group_bias == "mass", scale=scale,
    )  # fmt: skip
    return without_dead(slot_columns(pooled, plan.position[..., plan.length :], alive))


def sinks_after(
    key: Tensor, value: Tensor, raw: Tensor, config: DGAConfig
) -> tuple[Tensor, Columns]:
    """Copies of sinks that a prompt left raw (`DGAConfig.only_sinks`) and whose window is over.

    Args:
        key: (B, Hkv, L, D) of the prompt.
        value: (B, Hkv, L, Dv).
        raw: (B, Hkv, L) bool, the raw tokens that a query after it sees.
        config: with which it was planned.

    Returns:
        `raw` without them, and their columns.
    """
    length = key.shape[2]
    index = torch.arange(length, dtype=torch.int32, device=key.device)
    sink = raw & (leaves_window(index, config) < length)
    focal = compact(sink, config.sinks)
    bias = torch.zeros_like(focal, dtype=key.dtype).masked_fill(focal < 0, -math.inf)
    copies = Columns(take_rows(key, focal), take_rows(value, focal), bias, focal)
    return raw & ~sink, without_dead(copies)


def slots_of_units(
    columns: Columns, origins: Origins, units: int, done: int, *, config: DGAConfig, scale: float
) -> Columns:
    """`all_slots_of_units`, without those that stand for nothing where they would add up."""
    slots = all_slots_of_units(columns, origins, units, done, config=config, scale=scale)
    # Room for sinks in every unit, which only a document's first one has, would add up.
    return without_dead(slots) if config.focal_per_unit < config.sinks else slots


def all_slots_of_units(
    columns: Columns,
    origins: Origins,
    units: int,
    done: int | Tensor,
    *,
    config: DGAConfig,
    scale: float,
) -> Columns:
    """Slots of the oldest units among raw tokens, decided as `causal` scope does.

    They are the focal copies of all units, then their groups. KV heads are planned as if each were
    a sequence: what is raw may differ between them.

    Args:
        columns: (B, Hkv, R, ...) raw tokens, whole units, with those that come after these units
            and decide on them.
        origins: of these.
        units: how many of them get slots.
        done: position of the first column in the sequence.
        config: the choices.
        scale: of the scores.
    """
    batch, kv_heads = columns.key.shape[:2]

    def alone(x: Tensor) -> Tensor:  # (B, Hkv·r, ...) to (B·Hkv, r, ...)
        return x.reshape(batch * kv_heads, x.shape[1] // kv_heads, *x.shape[2:])

    query, key, value = alone(origins.query), alone(columns.key), alone(columns.value)
    first = origins.first.flatten(0, 1)
    dead = first == NEVER
    docs = Documents(
        first.sub(done).masked_fill(dead, NEVER), torch.where(dead, 0, NEVER), packed=False
    )
    focal, members, member_score = plan_units(query, key, value, docs, config=config, scale=scale)
    focal, members = focal[:, :, :units].flatten(2), members[:, :, :units].flatten(2, 3)
    if member_score is not None:
        member_score = member_score[:, :, :units].flatten(2, 3)
    pooled = pool(
        query, key, value, focal, members, member_score,
        weights=config.group_weights, mass=config.group_bias == "mass", scale=scale,
    )  # fmt: skip
    place, here = alone(columns.position), members >= 0
    size = here.sum(-1)
    middle = torch.where(here, take(place, members), 0).sum(-1) // size.clamp(min=1)
    position = torch.cat([take(place, focal), middle.int()], -1)
    made = slot_columns(pooled, position, torch.cat([focal >= 0, size > 0], -1))
    return Columns(*(t.view(batch, kv_heads, *t.shape[2:]) for t in made))


def without_dead(columns: Columns) -> Columns:
    """As few columns as the head with most slots alive needs; the others fill up with dead ones."""
    alive = columns.position >= 0
    keep = compact(alive, int(alive.sum(-1).amax()))
    return Columns(
        take_rows(columns.key, keep),
        take_rows(columns.value, keep),
        take(columns.bias, keep).masked_fill(keep < 0, -math.inf),
        take(columns.position, keep).masked_fill(keep < 0, -1),
    )


def slot_columns(pooled: Pooled, position: Tensor, alive: Tensor) -> Columns:
    """Focal copies, then groups, as (B, Hkv, F + G) columns; what is not alive is hidden."""
    bias = torch.zeros_like(alive, dtype=pooled.group_key.dtype)
    if pooled.entropy is not None:
        bias[..., pooled.focal_key.shape[2] :] = pooled.entropy.to(bias)
    return Columns(
        torch.cat([pooled.focal_key, pooled.group_key], 2),
        torch.cat([pooled.focal_value, pooled.group_value], 2),
        bias.masked_fill(~alive, -math.inf),
        position.masked_fill(~alive, -1),
    )
