"""Which tokens share a group: in sequence order, or by likeness inside a unit."""

from __future__ import annotations

import torch
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.indexing import compact, take_rows


def group_whole(free: Tensor, steps: int, config: DGAConfig) -> Tensor:
    """Groups in order over the whole sequence; a remainder shorter than m stays out (raw).

    Args:
        free: (B, Hkv, L) bool, the tokens to group.
        steps: L in steps of the plan.
        config: `group_size`, `step`.

    Returns:
        (B, Hkv, G, m) int32 token indices; -1 throughout where there is no group.
    """
    size = config.group_size
    count = steps * -(-config.step // size)
    members = compact(free, count * size).unflatten(-1, (count, size))
    return torch.where(members[..., -1:] >= 0, members, -1)


def group_units(free: Tensor, key: Tensor, value: Tensor, config: DGAConfig) -> Tensor:
    """Groups that stay inside units; the last of a unit may be short.

    Args:
        free: (B, Hkv, N, U) bool, the tokens to group.
        key: (B, Hkv, N·U, D).
        value: (B, Hkv, N·U, D).
        config: `group_size`, `grouping`.

    Returns:
        (B, Hkv, N · ceil(U / m), m) int32 token indices; -1 where a group has no such member.
    """
    size, unit = config.group_size, free.shape[-1]
    per_unit = -(-unit // size)
    local = compact(free, per_unit * size)
    base = torch.arange(free.shape[2], dtype=torch.int32, device=free.device)[:, None] * unit
    token = torch.where(local >= 0, local + base, -1)
    if config.grouping == "similarity":
        token = _order_by_likeness(token, key, value, size)
    return token.unflatten(-1, (per_unit, size)).flatten(2, 3)


def _order_by_likeness(token: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
    """Reorder (B, Hkv, N, T) tokens so that every run of `size` is a cluster.

    flexdga's choice: halve the tokens along their principal direction, and the halves again,
    until `size` are left. It is balanced, so groups fill up, and needs no iteration count tuned.
    """
    shape = token.shape
    units = (*shape[:3], -1, key.shape[-1])
    parts = [_unit_scale(t.view(units)) for t in (key, value)]
    x = torch.cat(parts, -1).flatten(2, 3)
    token = token.unsqueeze(3)
    while token.shape[-1] > size:
        here = token >= 0
        rows = torch.where(here[..., None], take_rows(x, token), 0.0)
        mean = rows.sum(-2, keepdim=True) / here.sum(-1)[..., None, None].clamp(min=1)
        rows = torch.where(here[..., None], rows - mean, 0.0)
        along = _principal_projection(rows)
        order = torch.where(here, along, torch.inf).argsort(dim=-1, stable=True)
        token = token.gather(-1, order).unflatten(-1, (2, -1)).flatten(3, 4)
    return token.reshape(shape)


def _unit_scale(x: Tensor) -> Tensor:
    """(B, Hkv, N, U, D) scaled per unit, so that keys and values weigh alike in any model."""
    x = x.float()
    return x / x.norm(dim=-1).mean(-1)[..., None, None].clamp(min=1e-12)


def _principal_projection(rows: Tensor) -> Tensor:
    """(..., T, D) centred rows to (..., T): two power iterations from the longest row."""
    longest = (
        rows.norm(dim=-1).argmax(-1)[..., None, None].expand(*rows.shape[:-2], 1, rows.shape[-1])
    )
    direction = rows.gather(-2, longest)
    for _ in range(2):
        direction = (rows @ direction.mT).mT @ rows
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (rows @ direction.mT).squeeze(-1)
