"""The tensors behind a layer's cache: raw tokens in front, slots behind them, in one buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flexdga.int8 import pack, unpack
from flexdga.plan import NEVER

SPARE, LEAST_SPARE = 1 / 16, 8
"""Of a buffer that grows, how much stays free: to copy all of it every so many tokens takes a step
of decoding next to nothing more, and a cache is there to be small."""


class Columns(NamedTuple):
    """Keys with all that attention needs to know of them.

    Attributes:
        key: (B, Hkv, C, D).
        value: (B, Hkv, C, Dv).
        bias: (B, Hkv, C) in the dtype of the keys, added to the score; -inf where nothing is.
        position: (B, Hkv, C) int32, where in the sequence; -1 where nothing is.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    position: Tensor


class Origins(NamedTuple):
    """What pooling needs besides, of raw tokens alone.

    Attributes:
        first: (B, Hkv, R) int32, first token of the document; NEVER where nothing is.
        query: (B, H, R, D), or without columns where the configuration asks for no queries.
    """

    first: Tensor
    query: Tensor


T = TypeVar("T", Columns, Origins)


class Saved(NamedTuple):
    """A state to go back to: the raw section, and how many slots there were."""

    columns: Columns
    origins: Origins
    num_slots: int


class CacheMemory(NamedTuple):
    """Bytes of a cache, of its slots alone, and of what dense attention would keep."""

    bytes: int
    dense_bytes: int
    slot_bytes: int = 0

    @property
    def ratio(self) -> float:
        """The cache's share of dense."""
        return self.bytes / max(self.dense_bytes, 1)


class SlotBuffer:
    """Raw columns [0, live), room up to `raw_room`, then slots, then room for more of them.

    Args:
        columns: the raw columns to begin with.
        origins: of these.
        raw_room: raw columns to make room for.
        slot_room: slots to make room for.
        keep_queries: whether raw tokens keep their queries; without, `origins` has none.
        int8: whether keys and values of slots are int8, with a bfloat16 scale for each slot and
            head; raw columns are not.
    """

    def __init__(
        self,
        columns: Columns,
        origins: Origins,
        raw_room: int,
        slot_room: int,
        *,
        keep_queries: bool,
        int8: bool = False,
    ) -> None:
        self.keep_queries = keep_queries
        self._int8: list[Tensor] | None = None  # of slots: numbers and scales of keys, of values
        if int8:
            none = (columns.key[:, :, :0], columns.value[:, :, :0])
            self._int8 = [part for x in none for part in _packed(x)]
        self.live, self.num_slots = columns.key.shape[2], 0
        self.raw_room = self.live
        self._columns, self._origins = columns, origins
        self._resize(max(raw_room, self.live), slot_room)

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self._columns.key.shape[0]

    @property
    def columns(self) -> Columns:
        """All of them, those that hold nothing too."""
        return self._columns

    def visible(self) -> Columns:
        """What a query sees; `bias` hides the empty columns among it."""
        end = self.raw_room + self.num_slots if self.num_slots else self.live
        seen = _cut(self._columns, 0, end)
        if self._int8 is None or not self.num_slots:
            return seen
        key8, key_scale, value8, value_scale = (t[:, :, : self.num_slots] for t in self._int8)
        key = unpack(key8, key_scale, seen.key.dtype)
        value = unpack(value8, value_scale, seen.value.dtype)
        return seen._replace(
            key=torch.cat([seen.key, key], 2), value=torch.cat([seen.value, value], 2)
        )

    def raw(self, count: int) -> tuple[Columns, Origins]:
        """The oldest raw columns, filled up with empty ones to `count`."""
        take = min(count, self.live)
        fill: tuple[float, ...] = (0, 0, -math.inf, -1)
        columns = _cut(self._columns, 0, take)
        origins = _cut(self._origins, 0, take)
        queries = count if self.keep_queries else 0
        return (
            Columns(*(_fill(t, count, x) for t, x in zip(columns, fill))),
            Origins(_fill(origins.first, count, NEVER), _fill(origins.query, queries, 0)),
        )

    def append(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        position: int,
        first: Tensor,
        real: Tensor | None = None,
    ) -> None:
        """Raw tokens, newer than all others.

        Args:
            query: (B, H, Q, D).
            key: (B, Hkv, Q, D).
            value: (B, Hkv, Q, Dv).
            position: of the first of them; the others follow.
            first: (B, 1) first token of each row's document.
            real: (B, Q) bool, false for padding; None where there is none.
        """
        count = key.shape[2]
        self.reserve(self.live + count, self.num_slots)
        new = slice(self.live, self.live + count)
        self.live += count
        columns, origins = _cut(self._columns, new.start, new.stop), self._origins
        columns.key.copy_(key)
        columns.value.copy_(value)
        columns.bias.zero_()
        if count == 1:
            columns.position.fill_(position)
        else:
            places = torch.arange(position, position + count, dtype=torch.int32, device=key.device)
            columns.position.copy_(places)
        origins.first[:, :, new] = first[:, None]
        if self.keep_queries:
            origins.query[:, :, new] = query
        if real is not None:
            dead = ~real[:, None]
            columns.bias.masked_fill_(dead, -math.inf)
            columns.position.masked_fill_(dead, -1)
            origins.first[:, :, new].masked_fill_(dead, NEVER)

    def pool(self, count: int, slots: Columns, raw_room: int) -> None:
        """Drop the `count` oldest raw tokens, add what stands for them.

        The first slots bring the room for raw tokens down to `raw_room`: few will be raw from now.
        """
        rest = self.live - count
        for tensor in (*self._columns, *self._origins):
            if tensor.shape[2]:
                tensor[:, :, :rest] = tensor[:, :, count : self.live].clone()
        self.live = rest
        self._hide_beyond(rest)
        if not self.num_slots:
            self._resize(max(raw_room, rest), self._slot_room)
        self.add_slots(slots)

    def add_slots(self, slots: Columns) -> None:
        """Slots behind the others."""
        count = slots.key.shape[2]
        self.reserve(self.raw_room, self.num_slots + count)
        at = self.raw_room + self.num_slots
        if self._int8 is None:
            _write(self._columns, at, slots)
        else:
            _write(self._columns[2:], at, slots[2:])
            new = (*_packed(slots.key), *_packed(slots.value))
            _write(self._int8, self.num_slots, new)
        self.num_slots += count

    def forget(self, remove: int) -> None:
        """Drop the newest raw tokens."""
        self.live -= remove
        self._hide_beyond(self.live)

    def save(self) -> Saved:
        """The state, to `restore` after `pool`."""
        columns, origins = _cut(self._columns, 0, self.live), _cut(self._origins, 0, self.live)
        return Saved(
            Columns(*(t.clone() for t in columns)),
            Origins(*(t.clone() for t in origins)),
            self.num_slots,
        )

    def restore(self, saved: Saved) -> None:
        """Go back."""
        self.live, self.num_slots = saved.columns.key.shape[2], saved.num_slots
        self.reserve(self.live, self.num_slots)
        _write(self._columns, 0, saved.columns)
        _write(self._origins, 0, saved.origins)
        self._hide_beyond(self.live)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self._columns = _rows(self._columns, rows)
        self._origins = _rows(self._origins, rows)
        if self._int8 is not None:
            self._int8 = [t.index_select(0, rows) for t in self._int8]

    def reserve(self, raw: int, slots: int) -> None:
        """Make room for so many raw columns and slots in all."""
        slot_room = self._slot_room
        if raw > self.raw_room or slots > slot_room:
            self._resize(
                self.raw_room if raw <= self.raw_room else with_spare(raw),
                slot_room if slots <= slot_room else with_spare(slots),
            )

    def bytes(self) -> int:
        """Of everything that is kept."""
        kept = (*self._columns, *self._origins, *(self._int8 or ()))
        return sum(t.numel() * t.element_size() for t in kept)

    def bytes_per_slot(self) -> int:
        """Of one slot, all heads and sequences."""
        kept = self._columns if self._int8 is None else (*self._int8, *self._columns[2:])
        return sum(t[:, :, :1].numel() * t.element_size() for t in kept)

    def bytes_per_token(self) -> int:
        """Of one dense token: its key and value, all heads and sequences."""
        return sum(
            t.shape[0] * t.shape[1] * t.shape[3] * t.element_size()
            for t in (self._columns.key, self._columns.value)
        )

    @property
    def _slot_room(self) -> int:
        return self._columns.bias.shape[2] - self.raw_room

    def _hide_beyond(self, live: int) -> None:
        self._columns.bias[:, :, live : self.raw_room] = -math.inf

    def _resize(self, raw_room: int, slot_room: int) -> None:
        old, old_origins = self._columns, self._origins
        size = raw_room + slot_room

        def empty(like: Tensor, size: int, value: float) -> Tensor:
            return like.new_full((*like.shape[:2], size, *like.shape[3:]), value)

        sizes = (size if self._int8 is None else raw_room,) * 2 + (size,) * 2
        new = Columns(*(empty(t, n, x) for t, n, x in zip(old, sizes, (0, 0, -math.inf, -1))))
        _write(new, 0, _cut(old, 0, self.live))
        moved = old[2:] if self._int8 is not None else old  # columns of slots
        slots = [t[:, :, self.raw_room : self.raw_room + self.num_slots] for t in moved]
        _write(new[-len(moved) :], raw_room, slots)
        if self._int8 is not None:
            grown = [empty(t, slot_room, 0) for t in self._int8]
            _write(grown, 0, [t[:, :, : self.num_slots] for t in self._int8])
            self._int8 = grown
        queries = raw_room if self.keep_queries else 0
        origins = Origins(
            empty(old_origins.first, raw_room, NEVER), empty(old_origins.query, queries, 0)
        )
        _write(origins, 0, _cut(old_origins, 0, self.live))
        self._columns, self._origins, self.raw_room = new, origins, raw_room


def with_spare(count: int) -> int:
    """The size of a buffer that is to hold `count`, and grows."""
    return count + max(int(count * SPARE), LEAST_SPARE)


def _cut(tensors: T, begin: int, end: int) -> T:
    return type(tensors)(*(t[:, :, begin:end] for t in tensors))


def _packed(x: Tensor) -> tuple[Tensor, Tensor]:
    return pack(x, torch.bfloat16)


def _write(target: Sequence[Tensor], at: int, new: Sequence[Tensor]) -> None:
    for old, tensor in zip(target, new):
        if old.shape[2]:
            old[:, :, at : at + tensor.shape[2]] = tensor


def _rows(tensors: T, rows: Tensor) -> T:
    return type(tensors)(*(t.index_select(0, rows) for t in tensors))


def _fill(tensor: Tensor, count: int, value: float) -> Tensor:
    """Columns added up to `count`."""
    more = count - tensor.shape[2]
    if not more:
        return tensor
    blank = tensor.new_full((*tensor.shape[:2], more, *tensor.shape[3:]), value)
    return torch.cat([tensor, blank], 2)
