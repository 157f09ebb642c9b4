"""What new queries have open of the far past, as columns that attention takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexdga.storage import Columns, with_spare

Gather = Callable[[list[tuple[int, int]]], tuple[Tensor, Tensor]]
"""From P pairs, of one of B·Hkv heads and a unit, to keys (P, U, D) and values (P, U, Dv)."""


class Opened(NamedTuple):
    """What new queries see of the far past.

    Attributes:
        open: (B, H, Q, N) bool, the units that each of them sees raw.
        unit: (B, Hkv, M) int64, the units that have columns: those that any query sees, or a head
            of its KV head; -1 for none.
        bias: (B, H, Q, M·U) of these columns.
        hidden: (B, H, Q, C) bool, slots that stand for what is open.
    """

    open: Tensor
    unit: Tensor
    bias: Tensor
    hidden: Tensor


def opened_units(
    opened: Tensor, unit: Tensor, homes: Tensor, size: int, dtype: torch.dtype
) -> Opened:
    """What is open, as attention needs it.

    Args:
        opened: (B, H, Q, N) bool.
        unit: (B, Hkv, M) int64, the units that have columns; -1 for none.
        homes: (B, Hkv, C) int64, the unit of each slot.
        size: tokens of a unit.
        dtype: of the bias.
    """
    kv_heads, columns = unit.shape[1:]
    rep, count = opened.shape[1] // kv_heads, opened.shape[2]
    index = torch.cat([unit.clamp(min=0), homes], 2)[:, :, None, None]
    seen = opened.gather(-1, index.expand(-1, -1, rep, count, -1).flatten(1, 2))
    blank = torch.where(unit < 0, -math.inf, 0.0).to(dtype)[:, :, None, None]
    here = seen[..., :columns].unflatten(1, (-1, rep))
    bias = torch.where(here, blank, -math.inf).flatten(1, 2)[..., None]
    bias = bias.expand(-1, -1, -1, -1, size).flatten(3)
    return Opened(opened, unit, bias, seen[..., columns:])


def bias_with_opened(bias: Tensor, opened: Opened, raw_room: int) -> Tensor:
    """Bias of what is open, and behind it of what is near, without the slots of what is open.

    Args:
        bias: (B, Hkv or 1, Q or 1, S) of the near columns, slots from `raw_room` on.
        opened: for these queries.
        raw_room: where slots begin.

    Returns:
        (B, H, Q, M·U + S).
    """
    heads, count = opened.open.shape[1:3]
    kv_heads = opened.unit.shape[1]
    bias = bias.expand(-1, kv_heads, count, -1)[:, :, None]
    bias = bias.expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2)
    slots = bias[..., raw_room:].masked_fill(opened.hidden, -math.inf)
    return torch.cat([opened.bias, bias[..., :raw_room], slots], -1)


def positions(unit: Tensor, size: int) -> Tensor:
    """(B, Hkv, M) units to (B, Hkv, M·U) int32 positions of their tokens; -1 for none."""
    inside = torch.arange(size, dtype=torch.int32, device=unit.device)
    token = unit[..., None].int() * size + inside
    return torch.where(unit[..., None] >= 0, token, -1).flatten(2)


class OpenColumns:
    """Raw tokens that the queries of one block have open, side by side for each KV head.

    They stay from query to query, so that a step copies only what it is the first to open, and
    what is near.

    Args:
        size: tokens of a unit.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.unit = torch.empty(0, 0, 0, dtype=torch.int64)
        """(B, Hkv, M), -1 for none."""
        self._units: list[list[int]] = []  # the same, of each of B·Hkv heads
        self._kept: list[Tensor] = []  # keys and values, (B, Hkv, room·U, ·)

    def clear(self, like: Tensor, device: torch.device) -> None:
        """Begin anew, with none, for tensors (B, Hkv, ...) like this one."""
        batch, heads = like.shape[:2]
        self.unit = torch.empty(batch, heads, 0, dtype=torch.int64, device=device)
        self._units = [[] for _ in range(batch * heads)]
        if self._kept and self._kept[0].shape[:2] != like.shape[:2]:
            self._kept = []

    def add(self, opened: Tensor, gather: Gather) -> None:
        """Units (B, H, N) bool to have too; those that are here stay where they are."""
        batch, heads = self.unit.shape[:2]
        rep, new, places = opened.shape[1] // heads, [], []
        # Few: lists take a fraction of the time of as many operations on tensors.
        for b, h, unit in opened.nonzero().tolist():
            head = b * heads + h // rep
            if unit not in self._units[head]:
                new.append((head, unit))
                places.append((head, len(self._units[head])))
                self._units[head].append(unit)
        if not new:
            return
        most = max(len(units) for units in self._units)
        table = [units + [-1] * (most - len(units)) for units in self._units]
        self.unit = torch.tensor(table, device=opened.device).view(batch, heads, most)
        made = gather(new)
        self._reserve(most, made)
        room = self._kept[0].shape[2] // self.size
        index = torch.tensor([head * room + place for head, place in places], device=opened.device)
        for kept, x in zip(self._kept, made):
            kept.view(-1, *x.shape[1:]).index_copy_(0, index, x)

    def with_near(self, near: Columns) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, M·U + S, ·) of these, and behind them of what is near.

        The next call overwrites them.
        """
        count = near.key.shape[2]
        begin, end = self.unit.shape[2] * self.size, self.unit.shape[2] * self.size + count
        self._reserve(-(-end // self.size), (near.key, near.value))
        for kept, x in zip(self._kept, (near.key, near.value)):
            kept[:, :, begin:end] = x
        key, value = (kept[:, :, :end] for kept in self._kept)
        return key, value

    def bytes(self) -> int:
        """Of everything that is kept."""
        return sum(t.numel() * t.element_size() for t in self._kept)

    def _reserve(self, units: int, like: tuple[Tensor, Tensor]) -> None:
        """Room for so many."""
        if self._kept and units * self.size <= self._kept[0].shape[2]:
            return
        room = with_spare(units) * self.size
        batch, heads = self.unit.shape[:2]
        grown = [x.new_zeros(batch, heads, room, x.shape[-1]) for x in like]
        for new, old in zip(grown, self._kept):
            new[:, :, : old.shape[2]] = old
        self._kept = grown
