"""Raw keys and values that left the window of a `LayerCache`, for queries that open them again.

The same rule as in a prefill (`opening.py`): a query opens the units that seem to hold more than
`open_mass` of its attention, and they stay open to the end of its query block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.estimates import far_log_mass, products, unit_documents, unit_features
from flexdga.exact import attend_all
from flexdga.indexing import compact, take_units
from flexdga.int8 import pack, unpack
from flexdga.opening import served, wanted
from flexdga.plan import NEVER
from flexdga.storage import GROWTH, Columns
from score_mods import ScoreMod

BLOCKS = 8
"""Query blocks whose openings are remembered, so that tokens can be taken back."""


class Opened(NamedTuple):
    """What new queries see of the far past.

    Attributes:
        open: (B, H, Q, N) bool, the units that each of them sees raw.
        columns: (B, H, M·U, ...), the tokens of all that any of them sees, with the bias
            (B, H, Q, M·U) of each query.
    """

    open: Tensor
    columns: Columns


class FarUnits:
    """Whole units of raw tokens of one layer, oldest first.

    Args:
        config: `keep_raw`, `open_units`, `open_mass`, `open_by`, `block_size`.
    """

    def __init__(self, config: DGAConfig) -> None:
        self.config = config
        self.count = 0
        self._tables: dict[int, Tensor] = {}  # query block: (B, H, N) int32, open from this query
        self._kept: list[Tensor] = []  # keys and values, or numbers and scales of both
        self._features: Tensor | None = None
        self._first: Tensor  # (B, N) int32

    def add(self, key: Tensor, value: Tensor, first: Tensor) -> None:
        """Units that follow the others.

        Args:
            key: (B, Hkv, n·U, D).
            value: (B, Hkv, n·U, Dv).
            first: (B, n·U) first token of each token's document; NEVER for padding.
        """
        first = unit_documents(first, self.config)
        features = unit_features(key, self.config) if self.config.open_by == "box" else None
        self._keep(key, value)
        if not self.count:
            self._first, self._features = first.clone(), features
        else:
            self._first = torch.cat([self._first[:, : self.count], first], 1)
            if features is not None and self._features is not None:
                self._features = _append(self._features, features, self.count)
        self.count += first.shape[1]

    def _keep(self, key: Tensor, value: Tensor) -> None:
        """Keep the tokens of units that follow the others."""
        self._write(key, value, self.count)

    def _write(self, key: Tensor, value: Tensor, units: int) -> None:
        """Keep tokens behind those of the first `units` units that are kept."""
        kept = [part for x in (key, value) for part in self._pack(x)]
        if not units:
            self._kept = [t.clone() for t in kept]
        else:
            size = self.config.block_size[1]
            self._kept = [
                _append(old, new, units * size, size) for old, new in zip(self._kept, kept)
            ]

    def begin(self, since: Tensor, block: int) -> None:
        """What a prompt's last query block, number `block`, had open: (B, H, N) int32."""
        self._tables = {block: since}

    def forget(self, length: int) -> None:
        """Take back all from token `length` on."""
        self._tables = {
            block: torch.where(since < length, since, NEVER)
            for block, since in self._tables.items()
            if block * self.config.block_size[0] < length
        }

    def cut(self, count: int) -> None:
        """Keep the oldest `count` units at most."""
        self.count = min(self.count, count)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self._kept = [t.index_select(0, rows.to(t.device)) for t in self._kept]
        self._tables = {block: t.index_select(0, rows) for block, t in self._tables.items()}
        if self.count:
            self._first = self._first.index_select(0, rows)
        if self._features is not None:
            self._features = self._features.index_select(0, rows)

    def bytes(self) -> int:
        """Of everything that is kept, on whichever device."""
        kept = [*self._kept, *self._tables.values()]
        kept += [] if self._features is None else [self._features]
        return sum(t.numel() * t.element_size() for t in kept)

    def open(
        self, query: Tensor, near: Tensor, doc_first: Tensor, time: int, *, scale: float
    ) -> Opened | None:
        """Which units new queries of one query block see raw; None if none.

        Args:
            query: (B, H, Q, D).
            near: (B, H, Q) log of Σ exp(score) over the raw tokens that the query sees.
            doc_first: (B, 1) first token of each row's document.
            time: position of the first query.
            scale: of the scores.
        """
        if not self.count:
            return None
        config, rows = self.config, self.config.block_size[0]
        block = time // rows
        far = far_log_mass(query, self._units_of_keys(query.device), config, scale)
        mine = self._first[:, : self.count]
        may = (mine == doc_first) & (mine != NEVER)
        far = far.masked_fill(~may[:, None, None], -math.inf)
        want, total = wanted(far, near, config)
        before = self._tables.get(block)
        already = torch.zeros_like(want[:, :, 0]) if before is None else before < NEVER
        if config.open_units is not None:
            share = torch.exp(far - total[..., None])
            chosen = served(want, share, config.open_units, turns=True, already=already)
            want = want & chosen[:, :, None]
        opened = want.cummax(2).values | already[:, :, None]
        at = torch.arange(time, time + query.shape[2], dtype=torch.int32, device=query.device)
        since = torch.where(want, at[:, None], NEVER).amin(2)
        self._tables[block] = since if before is None else torch.minimum(since, before)
        self._tables.pop(block - BLOCKS, None)
        return Opened(opened, self._columns(opened)) if opened[:, :, -1].any() else None

    def attend(
        self,
        query: Tensor,
        seen: Columns,
        bias: Tensor,
        opened: Opened,
        raw_room: int,
        *,
        scale: float,
        score_mod: ScoreMod | None = None,
        query_position: Tensor | None = None,
    ) -> Tensor:
        """`attend_all` to what is near (see `with_opened`) and what is open: (B, H, Q, Dv)."""
        seen, bias = with_opened(seen, bias, opened, raw_room, self.config.unit_size)
        return attend_all(
            query, seen.key, seen.value, bias, scale=scale, score_mod=score_mod,
            query_position=query_position, key_position=seen.position,
        )  # fmt: skip

    def _columns(self, opened: Tensor) -> Columns:
        """Tokens of the units that are open to the last query, which are open to others or not."""
        last = self._mine(opened[:, :, -1])
        unit = compact(last, int(last.sum(-1).amax()))
        seen = opened.gather(-1, _like(unit.clamp(min=0).long(), opened)) & (unit >= 0)[:, :, None]
        half, place = len(self._kept) // 2, self._places(unit)
        key, value = (self._unpack(part, place) for part in (self._kept[:half], self._kept[half:]))
        hidden = ~seen.repeat_interleave(self.config.block_size[1], -1)
        bias = torch.zeros_like(hidden, dtype=key.dtype).masked_fill(hidden, -math.inf)
        return Columns(key, value, bias, self._tokens(unit))

    def _mine(self, opened: Tensor) -> Tensor:
        """Those of some (..., N) bool units whose tokens are here."""
        return opened

    def _places(self, unit: Tensor) -> Tensor:
        """Where units (int32, -1 for none) stand among those that are kept."""
        return unit

    def _tokens(self, unit: Tensor) -> Tensor:
        """(B, H, M) int32 units to (B, H, M·U) positions of their tokens; -1 for none."""
        size = self.config.block_size[1]
        inside = torch.arange(size, dtype=torch.int32, device=unit.device)
        return torch.where(unit[..., None] >= 0, unit[..., None] * size + inside, -1).flatten(2)

    def _units_of_keys(self, device: torch.device) -> Tensor:
        if self._features is not None:
            return self._features[:, :, : self.count]
        keys = self._kept[: len(self._kept) // 2]
        cut = [t[:, :, : self.count * self.config.block_size[1]] for t in keys]
        return _restored(cut).to(device)

    def _pack(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.config.keep_raw == "int8":
            return pack(x)
        return (x.cpu() if self.config.keep_raw == "cpu" else x,)

    def _unpack(self, kept: list[Tensor], unit: Tensor) -> Tensor:
        """Units (B, H, M) of (B, Hkv, T, ·) tensors: (B, H, M·U, ·); -1 reads the first."""
        rep = unit.shape[1] // kept[0].shape[1]
        # A KV head's units for its query heads side by side: nothing is repeated first.
        index = unit.unflatten(1, (-1, rep)).flatten(2).to(kept[0].device)
        size = self.config.block_size[1]
        rows = _restored([take_units(t, index, size) for t in kept])
        return rows.unflatten(2, (rep, unit.shape[2] * size)).flatten(1, 2).to(unit.device)


def raw_log_mass(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """(B, H, Q) log of Σ exp(score) over raw tokens, of bfloat16 scores as in `far_log_mass`.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, R, D).
        bias: (B, Hkv or 1, Q or 1, R); -inf hides a key.
        scale: of the scores.
    """
    rep = query.shape[1] // key.shape[1]
    rows = (query * scale).bfloat16().unflatten(1, (-1, rep))
    score = products(rows, key[:, :, None].bfloat16()).float()
    return torch.logsumexp(score + bias[:, :, None], -1).flatten(1, 2)


def with_opened(
    seen: Columns, bias: Tensor, opened: Opened, raw_room: int, size: int
) -> tuple[Columns, Tensor]:
    """Columns of every query head with what is open, and without the slots of that.

    Args:
        seen: (B, Hkv, S, ...), slots from column `raw_room` on.
        bias: (B, Hkv or 1, Q or 1, S).
        opened: for these queries.
        raw_room: where slots begin.
        size: tokens of a unit.

    Returns:
        (B, H, S + M·U, ...) columns and (B, H, Q, S + M·U) bias.
    """
    heads, count = opened.open.shape[1:3]
    rep = heads // seen.key.shape[1]
    key, value, position = (
        t.repeat_interleave(rep, 1) for t in (seen.key, seen.value, seen.position)
    )
    bias = bias.expand(-1, seen.key.shape[1], count, -1).repeat_interleave(rep, 1)
    home = (position[..., raw_room:].clamp(min=0) // size).long()
    hidden = opened.open.gather(-1, _like(home, opened.open))
    slots = bias[..., raw_room:].masked_fill(hidden, -math.inf)
    more = opened.columns
    columns = Columns(
        torch.cat([key, more.key], 2),
        torch.cat([value, more.value], 2),
        seen.bias,
        torch.cat([position, more.position], 2),
    )
    return columns, torch.cat([bias[..., :raw_room], slots, more.bias], -1)


def _restored(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else unpack(parts[0], parts[1], parts[1].dtype)


def _like(index: Tensor, table: Tensor) -> Tensor:
    """(B, H, M) to (B, H, Q, M)."""
    return index[:, :, None].expand(-1, -1, table.shape[2], -1)


def _append(buffer: Tensor, new: Tensor, used: int, size: int = 1) -> Tensor:
    """`new` (B, H, n, D) behind the first `used` columns.

    A full buffer is replaced by a larger one, in whole units of `size` columns.
    """
    need = used + new.shape[2]
    if need > buffer.shape[2]:
        room = int(need // size * GROWTH) * size
        buffer = F.pad(buffer[:, :, :used], (0, 0, 0, room - used))
    buffer[:, :, used:need] = new
    return buffer
