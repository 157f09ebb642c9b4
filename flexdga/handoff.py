"""From a prompt's plan to the slots with which decoding goes on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexdga.compress import Pooled, pool
from flexdga.config import DGAConfig
from flexdga.indexing import compact, take, take_rows
from flexdga.plan import Plan
from flexdga.storage import Columns


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
