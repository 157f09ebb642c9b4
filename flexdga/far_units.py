"""Raw keys and values that left the window of a `LayerCache`, for queries that open them again.

The same rule as in a prefill (`opening.py`): a query opens the units that seem to hold more than
`open_mass` of its attention, and they stay open to the end of its query block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.coarse import coarse_units, first_fine
from flexdga.config import COARSE, DGAConfig
from flexdga.estimates import (
    Units,
    box_of,
    boxes,
    far_log_mass,
    in_bfloat16,
    in_matrices,
    products,
    unit_documents,
    unit_features,
    units_beyond,
)
from flexdga.exact import attend_all
from flexdga.int8 import pack, unpack
from flexdga.open_columns import (
    OpenColumns,
    Opened,
    bias_with_opened,
    opened_units,
    positions,
)
from flexdga.opening import served
from flexdga.plan import NEVER
from flexdga.storage import Columns, with_spare
from score_mods import ScoreMod

BLOCKS = 8
"""Query blocks whose openings are remembered, so that tokens can be taken back."""


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
        self._features: Tensor | None = None  # for estimates; None: the keys that are kept
        self._boxes: Tensor | None = None  # of the oldest units, where features are keys
        self._first: Tensor  # (B, N) int32
        self._columns = OpenColumns(config.block_size[1])
        self._block: int  # the present query block, and what is open in it:
        self._open: Tensor  # (B, H, N) bool
        self._any: bool
        self._last: Opened | None  # of the last query
        self._homes: Tensor  # (B, Hkv, C) int64, the unit of each slot
        self._hidden: Tensor | None
        self._hidden_of: Tensor | None
        self._coarse: Units  # of the first units, so many that they are weighed together:
        self._least = 0
        self._coarse_of: int  # which query block
        self._forget_block()

    def add(self, key: Tensor, value: Tensor, first: Tensor) -> None:
        """Units that follow the others.

        Args:
            key: (B, Hkv, n·U, D).
            value: (B, Hkv, n·U, Dv).
            first: (B, n·U) first token of each token's document; NEVER for padding.
        """
        first = unit_documents(first, self.config)
        self._keep(key, value)
        features = self._features_of(key)
        if not self.count:
            self._first = first[:, :0]
            self._features = None if features is None else features[:, :, :0]
        self._first = torch.cat([self._first[:, : self.count], first], 1)
        if features is not None and self._features is not None:
            each = features.shape[2] // first.shape[1]
            self._features = _append(self._features, features, self.count * each, each)
        self.count += first.shape[1]
        self._forget_block()

    def _features_of(self, key: Tensor) -> Tensor | None:
        """What estimates read of units, in the dtype in which few products are fast."""
        if self.config.open_by == "landmarks":
            features = unit_features(key, self.config)
            return features.float() if key.device.type == "cpu" else features
        whole = key.dtype == torch.bfloat16  # then raw keys serve, where they are at hand
        kept = {"full": not whole, "cpu": not whole or key.device.type != "cpu"}
        return key.bfloat16() if kept.get(self.config.keep_raw, False) else None

    def _keep(self, key: Tensor, value: Tensor) -> None:
        """Keep the tokens of units that follow the others."""
        self._write(key, value, self.count)

    def _write(self, key: Tensor, value: Tensor, units: int) -> None:
        """Keep tokens behind those of the first `units` units that are kept."""
        new = [part for x in (key, value) for part in self._pack(x)]
        size = self.config.block_size[1]
        old = self._kept if units else [t[:, :, :0] for t in new]
        self._kept = [_append(t, x, units * size, size) for t, x in zip(old, new)]

    def begin(self, since: Tensor, block: int) -> None:
        """What a prompt's last query block, number `block`, had open: (B, H, N) int32."""
        self._tables = {block: since}
        self._forget_block()

    def forget(self, length: int) -> None:
        """Take back all from token `length` on."""
        self._tables = {
            block: torch.where(since < length, since, NEVER)
            for block, since in self._tables.items()
            if block * self.config.block_size[0] < length
        }
        self._forget_block()

    def cut(self, count: int) -> None:
        """Keep the oldest `count` units at most."""
        self.count = min(self.count, count)
        self._boxes = None if self._boxes is None else self._boxes[:, :, : self.count]
        self._forget_block()

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self._kept = [t.index_select(0, rows.to(t.device)) for t in self._kept]
        self._tables = {block: t.index_select(0, rows) for block, t in self._tables.items()}
        if self.count:
            self._first = self._first.index_select(0, rows)
        if self._features is not None:
            self._features = self._features.index_select(0, rows)
        self._boxes = None if self._boxes is None else self._boxes.index_select(0, rows)
        self._forget_block()

    def bytes(self) -> int:
        """Of everything that is kept, on whichever device."""
        kept = [*self._kept, *self._tables.values()]
        kept += [x for x in (self._features, self._boxes) if x is not None]
        return sum(t.numel() * t.element_size() for t in kept) + self._columns.bytes()

    def open(
        self,
        query: Tensor,
        near: Tensor,
        slots: Tensor,
        doc_first: Tensor,
        time: int,
        *,
        scale: float,
    ) -> Opened | None:
        """Which units new queries of one query block see raw; None if none.

        Args:
            query: (B, H, Q, D).
            near: (B, H, Q, R) `raw_scores`.
            slots: (B, Hkv, C) int32 positions, the same ones for all queries of a block.
            doc_first: (B, 1) first token of each row's document.
            time: position of the first query.
            scale: of the scores.
        """
        if not self.count:
            return None
        config, count, block = self.config, query.shape[2], time // self.config.block_size[0]
        far = self._weighed(query, doc_first, block, scale)
        want, total = asked(far, near, config)
        want = self._by_unit(want, doc_first)
        self._enter(block, want, slots)
        already = self._open[:, :, None]
        if config.open_units is not None:
            share = torch.exp(far - total[..., None])
            chosen = served(want, share, config.open_units, turns=True, already=self._open)
            want = want & chosen[:, :, None]
        new = want > already
        if new.any():
            at = torch.arange(time, time + count, dtype=torch.int32, device=query.device)
            since = self._tables[self._block][:, :, None]
            self._tables[self._block] = torch.where(new, at[:, None], since).amin(2)
            opens = new[:, :, 0] if count == 1 else new.any(2)
            self._open, self._any = self._open | opens, True
            self._columns.add(self._mine(opens), self._gather)
        elif not self._any:
            return None
        elif count == 1 and self._last is not None:
            return self._last
        opened = self._open[:, :, None] if count == 1 else already | want.cummax(2).values
        size = config.block_size[1]
        now = opened_units(opened, self._columns.unit, self._homes, size, query.dtype)
        self._last = now if count == 1 else None
        return now

    def _weighed(self, query: Tensor, doc_first: Tensor, block: int, scale: float) -> Tensor:
        """(B, H, Q, M + N) `far_log_mass` of M coarse units and N others; -inf of hidden ones."""
        config = self.config
        before = max(block * config.block_size[0] - config.window + 1, 0) // config.block_size[1]
        if config.coarsens and block != self._coarse_of:
            assert self._features is not None
            self._coarse_of = block
            self._least = int(first_fine(torch.tensor(before, dtype=torch.int32), config))
            old = self._features[:, :, : self._least].bfloat16(), self._first[:, : self._least]
            self._coarse = coarse_units(Units(*old))
        least, hidden = self._least, self._hidden_from(doc_first)
        beyond = max(units_beyond(before, config), least)
        parts = [self._known_from(beyond, query.device)]
        if beyond > least:
            parts.insert(0, self._boxes_to(beyond, query)[:, :, least:])
        weighed = [far_log_mass(query, part, config, scale) for part in parts]
        far = weighed[0] if len(weighed) == 1 else torch.cat(weighed, -1)
        far = far[..., : self.count - least]
        if hidden is not None:
            far = far.masked_fill(hidden[..., least:], -math.inf)
        if not least:
            return far
        key, first = (t[..., : least // COARSE] for t in (self._coarse.key.mT, self._coarse.first))
        coarse = far_log_mass(query, key.mT, config, scale)
        coarse = coarse.masked_fill((first != doc_first)[:, None, None], -math.inf)
        return torch.cat([coarse, far], -1)

    def _known_from(self, unit: int, device: torch.device) -> Tensor:
        """What `far_log_mass` takes of the units from this one on."""
        if self._features is not None:
            each = 1 if self.config.open_by == "landmarks" else self.config.block_size[1]
            return self._features[:, :, unit * each :]
        keys = self._kept[: len(self._kept) // 2]
        return _restored([x[:, :, unit * self.config.block_size[1] :] for x in keys]).to(device)

    def _boxes_to(self, unit: int, query: Tensor) -> Tensor:
        """And of those before it, by their boxes alone."""
        if self.config.open_by == "landmarks":
            assert self._features is not None
            return box_of(self._features[:, :, :unit], query.shape[3])
        have = 0 if self._boxes is None else self._boxes.shape[2]
        if have < unit:
            count = (unit - have) * self.config.block_size[1]
            new = boxes(self._known_from(have, query.device)[:, :, :count], self.config)
            new = new.float() if query.device.type == "cpu" else new
            self._boxes = new if self._boxes is None else torch.cat([self._boxes, new], 2)
        assert self._boxes is not None
        return self._boxes[:, :, :unit]

    def _by_unit(self, want: Tensor, doc_first: Tensor) -> Tensor:
        """What is true of a coarse unit for each of its units."""
        if not self._least:
            return want
        coarse, fine = want.tensor_split([self._least // COARSE], -1)
        want = torch.cat([coarse.repeat_interleave(COARSE, -1), fine], -1)
        hidden = self._hidden_from(doc_first)
        return want if hidden is None else want & ~hidden

    def _enter(self, block: int, want: Tensor, slots: Tensor) -> None:
        """Begin with what a query block has open already, unless it is the present one."""
        if block == self._block:
            return
        self._block, self._last = block, None
        self._homes = slots.clamp(min=0).long() // self.config.block_size[1]
        self._tables.pop(block - BLOCKS, None)
        if block not in self._tables:
            self._tables[block] = torch.full_like(want[:, :, 0], NEVER, dtype=torch.int32)
        self._open = self._tables[block] < NEVER
        self._any = bool(self._open.any())
        self._columns.clear(self._kept[0], want.device)
        if self._any:
            self._columns.add(self._mine(self._open), self._gather)

    def _forget_block(self) -> None:
        """What is known of the present query block, and follows from the rest."""
        self._block, self._hidden_of, self._coarse_of = -1, None, -1

    def _hidden_from(self, doc_first: Tensor) -> Tensor | None:
        """(B, 1, 1, N) bool, units of other documents and of padding; None where there are none."""
        if self._hidden_of is not doc_first:
            mine = self._first[:, : self.count]
            hidden = ((mine != doc_first) | (mine == NEVER))[:, None, None]
            self._hidden, self._hidden_of = hidden if hidden.any() else None, doc_first
        return self._hidden

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
        """`attend_all` to what is near and what is open: (B, H, Q, Dv).

        Args:
            query: (B, H, Q, D).
            seen: the near columns, slots from `raw_room` on.
            bias: (B, Hkv or 1, Q or 1, S) of these.
            opened: by these queries, and the last call of `open`.
            raw_room: where slots begin.
            scale: of the scores.
            score_mod: of positions.
            query_position: (Q,) for the score mod.
        """
        key, value = self._with_near(seen)
        bias = bias_with_opened(bias, opened, raw_room)
        at = None
        if score_mod is not None:
            at = torch.cat([positions(opened.unit, self.config.unit_size), seen.position], 2)
        return attend_all(
            query, key, value, bias, scale=scale, score_mod=score_mod,
            query_position=query_position, key_position=at,
        )  # fmt: skip

    def _with_near(self, seen: Columns) -> tuple[Tensor, Tensor]:
        """`OpenColumns.with_near`."""
        made = self._columns.with_near(seen)
        if self.config.keep_raw == "int8":  # whoever asks for that wants bytes, and no copies
            self._columns = OpenColumns(self.config.block_size[1])
            self._forget_block()
        return made

    def _mine(self, opened: Tensor) -> Tensor:
        """Those of some (..., N) bool units whose tokens are here."""
        return opened

    def _place(self, unit: int) -> int:
        """Where a unit stands among those that are kept."""
        return unit

    def _gather(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Keys and values (P, U, ·) of some heads (of B·Hkv) and units."""
        size, half, device = self.config.block_size[1], len(self._kept) // 2, self._first.device
        room = self._kept[0].shape[2] // size
        index = torch.tensor([head * room + self._place(unit) for head, unit in pairs])
        index = index.to(self._kept[0].device)
        units = [t.view(-1, size, t.shape[3]).index_select(0, index) for t in self._kept]
        key, value = (_restored(part).to(device) for part in (units[:half], units[half:]))
        return key, value

    def _pack(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.config.keep_raw == "int8":
            return pack(x)
        return (x.cpu() if self.config.keep_raw == "cpu" else x,)


def raw_scores(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """(B, H, Q, R) float32 scores of raw tokens, of bfloat16 numbers as in `near_log_mass`.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, R, D).
        bias: (B, Hkv or 1, Q or 1, R); -inf hides a key.
        scale: of the scores.
    """
    batch, heads, count, _ = query.shape
    rows = in_matrices(in_bfloat16(query * scale), key.shape[1])
    # In float32: on CPU products of few bfloat16 rows are slow, and each new shape of them more so.
    score = products(rows, in_bfloat16(key).float())
    score = score.view(batch, key.shape[1], heads // key.shape[1], count, key.shape[2])
    return (score + bias[:, :, None]).flatten(1, 2)


def asked(far: Tensor, near: Tensor, config: DGAConfig) -> tuple[Tensor, Tensor]:
    """As `openings` decides, of few queries, in fewer operations; `near` are scores (..., R)."""
    total = torch.logsumexp(torch.cat([near, far], -1), -1)
    least = math.log(config.open_mass) if config.open_mass else -math.inf
    return far > (total + least)[..., None], total


def _restored(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else unpack(parts[0], parts[1], parts[1].dtype)


def _append(buffer: Tensor, new: Tensor, used: int, size: int = 1) -> Tensor:
    """`new` (B, H, n, D) behind the first `used` columns.

    A full buffer is replaced by a larger one, in whole units of `size` columns.
    """
    need = used + new.shape[2]
    if need > buffer.shape[2]:
        room = with_spare(need // size) * size
        buffer = F.pad(buffer[:, :, :used], (0, 0, 0, room - used))
    buffer[:, :, used:need] = new
    return buffer
