"""What one attention layer remembers while it decodes: slots of old tokens, and raw recent ones.

It is the plan of the text so far, kept up to date. When a unit's handover is due, the unit is
planned exactly as `causal` scope plans it in a prefill, its slots are stored, and its keys and
values are gone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from flexdga.attention import dga_attention, make_plan
from flexdga.checks import check_step
from flexdga.config import DGAConfig
from flexdga.cost_model import dense_below
from flexdga.exact import attend_all
from flexdga.far_units import FarUnits, raw_scores
from flexdga.handoff import (
    first_real,
    goes_on,
    raw_columns,
    seen_after,
    sinks_after,
    slots_after,
    slots_of_units,
)
from flexdga.handover import handover, lookahead
from flexdga.plan import NEVER
from flexdga.planner import group_slots_per_unit
from flexdga.storage import CacheMemory, Columns, Origins, Saved, SlotBuffer
from score_mods import ScoreMod

ROOM = 64
"""Slots beyond a prompt's own, and raw tokens beyond a dense prompt's, to grow into."""
HISTORY = 4
"""Poolings that can be taken back while the past is recorded."""
HELD = 64
"""Tokens at the end of a prompt that can be taken back while the past is recorded."""


class LayerCache:
    """Keys and values of one layer.

    A unit of `config.unit_size` tokens is pooled when its handover is due: at the same query, and
    with the same outcome, as in a prefill in `causal` scope, so decoding equals prefill. The paper
    regroups every m' = 1.1·m tokens; `DGAConfig.paper(unit_size=18)` is that, rounded up: 16
    tokens to group, and γ of 18 to keep. What was pooled stays as it is.

    A prompt is planned as `config.scope` says; what comes after it, in `causal` scope. While a
    text is shorter than `config.dense_below` (where that is None, than `dense_below` says) it is
    kept whole besides, and attended to densely.

    Args:
        config: the choices.
        max_length: tokens to make room for at once, so that nothing grows while decoding.
        int8: whether slots are kept in int8.
    """

    def __init__(
        self, config: DGAConfig, *, max_length: int | None = None, int8: bool = False
    ) -> None:
        self.config = config
        self.int8 = int8
        self.max_length = max_length
        self.record_past = False
        changes: dict[str, Any] = {"scope": "causal", "focal_budget": None}
        self._causal = dataclasses.replace(config, **changes, probe_placement="even")
        self._forever_dense = config.dense_below == NEVER
        reads_queries = config.needs_importance or (
            config.groups and config.group_weights == "last_query"
        )
        self.keeps_queries = reads_queries and not self._forever_dense
        unit = config.unit_size
        self._unit_slots = self._causal.focal_per_unit + group_slots_per_unit(config)
        self._steady = max(handover(unit - 1, self._causal), unit + lookahead(self._causal))
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        """Tokens so far, padding included."""
        self.done = 0
        """How many of them are pooled; the others are raw."""
        self._buffer: SlotBuffer | None = None
        self._whole: SlotBuffer | None = None  # all tokens, while they are few
        self._far: FarUnits | None = None  # raw tokens to open again
        if self.config.opens and self.config.keep_raw != "none" and not self._forever_dense:
            self._far = self._far_units()
        self.below = 0
        """Shorter texts stay whole; known with the first tokens."""
        self._doc_first: Tensor  # (B, 1) int32, where each row's document begins
        self._pooled_at = -1  # the newest query at which something was pooled
        self._history: list[tuple[Saved, int, int]] = []  # before it: the rest, done, _pooled_at

    def _far_units(self) -> FarUnits:
        return FarUnits(self._causal)

    @property
    def num_slots(self) -> int:
        """Slots that queries see; 0 while the text is attended to densely."""
        return 0 if self._buffer is None else self._seen_now(self.seen).num_slots

    @property
    def num_raw(self) -> int:
        """Tokens that queries see raw (or padding among them)."""
        return 0 if self._buffer is None else self._seen_now(self.seen).live

    @property
    def batch_size(self) -> int:
        """Sequences; 0 before the first token."""
        return 0 if self._buffer is None else self._buffer.batch_size

    def memory(self) -> CacheMemory:
        """Bytes of all that is kept, of the slots, and of the same tokens' keys and values."""
        if self._buffer is None:
            return CacheMemory(0, 0)
        parts = (self._buffer, self._whole, self._far)
        kept = sum(part.bytes() for part in parts if part is not None)
        dense = self._buffer.bytes_per_token() * self.seen
        return CacheMemory(kept, dense, self._buffer.bytes_per_slot() * self.num_slots)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Attention of new tokens to all tokens so far, themselves included; then keep them.

        Args:
            query: (B, H, Q, D) of the new tokens.
            key: (B, Hkv, Q, D).
            value: (B, Hkv, Q, Dv).
            scale: of the scores; None = 1/√D.
            score_mod: of token positions.
            document_ids: (B, Q), negative for padding, whose output is 0. The first call may
                bring packed documents: the last one goes on. Later, real tokens continue it.

        Returns:
            (B, H, Q, Dv).

        Raises:
            ValueError: the shapes do not fit what the cache holds, or a row of the first call
                ends in padding (decoding goes on from its last token: pad on the left).
        """
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        with torch.no_grad():
            parts, at, total = [], 0, query.shape[2]
            real = None if document_ids is None else document_ids >= 0
            if self._buffer is None:
                # What is planned with a prompt cannot be cropped: its end comes as new tokens.
                at = max(total - HELD, 1) if self.record_past else total
                ids = None if document_ids is None else document_ids[:, :at]
                parts.append(
                    self._prefill(
                        query[:, :, :at], key[:, :, :at], value[:, :, :at], scale, score_mod, ids
                    )
                )
            else:
                check_step(query, key, value, document_ids, self._buffer.columns)
            while at < total:  # in stretches in which no unit is handed over
                count = min(total - at, self._next_due() - self.seen)
                if self._far is not None:  # openings are those of one query block
                    rows = self.config.block_size[0]
                    count = min(count, rows - self.seen % rows)
                new = slice(at, at + count)
                parts.append(
                    self._extend(
                        query[:, :, new], key[:, :, new], value[:, :, new],
                        None if real is None else real[:, new], scale, score_mod,
                    )
                )  # fmt: skip
                at += count
            return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order; one may come several times."""
        if self._buffer is None:
            return
        rows = rows.to(self._doc_first.device)
        for part in (self._buffer, self._whole, self._far):
            if part is not None:
                part.select(rows)
        self._doc_first = self._doc_first.index_select(0, rows)
        self._history.clear()

    def crop(self, remove: int) -> None:
        """Forget the newest `remove` tokens, as if they had never come.

        Raises:
            ValueError: something was pooled at one of them, and `record_past` was not set before.
        """
        if remove == 0 or self._buffer is None:
            return
        left = self.seen - remove
        while self._history and self._pooled_at >= left:
            saved, self.done, self._pooled_at = self._history.pop()
            self._buffer.restore(saved)
            self.seen = self.done + self._buffer.live
        gone = left < self.below and self._whole is None and not self._forever_dense
        if self._pooled_at >= left or left < self.done or left < 1 or gone:
            raise ValueError(
                f"remove: tokens up to {max(self._pooled_at, 0)} are pooled for good (set "
                f"record_past before tokens that may be removed); cannot go back from "
                f"{self.seen} tokens to {left}"
            )
        self._buffer.forget(self.seen - left)
        if self._whole is not None:
            self._whole.forget(self._whole.live - left)
        if self._far is not None:
            self._far.cut(self.done // self.config.unit_size)
            self._far.forget(left)
        self.seen = left

    def _extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        scale: float,
        score_mod: ScoreMod | None,
    ) -> Tensor:
        """New tokens, at the first of which units may be handed over."""
        assert self._buffer is not None
        time, count = self.seen, query.shape[2]
        self._pool_due(time, scale)
        if real is not None:
            begun = self._doc_first < time
            self._doc_first = torch.where(begun, self._doc_first, time + first_real(real))
        # Cropping may make the text short again.
        if time + 1 >= self.below + (HELD if self.record_past else 0):
            self._keep_far()
            self._whole = None
        for buffer in (self._buffer, self._whole):
            if buffer is not None:
                buffer.append(query, key, value, position=time, first=self._doc_first, real=real)
        self.seen += count
        self._pool_due(time, scale)  # without a raw window a unit goes with its own last token

        now = self._seen_now(time + 1)
        seen = now.visible()
        bias = seen.bias[:, :, None]
        if count > 1:
            later = torch.ones(count, count, dtype=torch.bool, device=key.device).triu(1)
            bias = bias.expand(-1, -1, count, -1).clone()
            live = now.live
            raw = min(count, live)  # the first of them may be pooled already
            bias[..., live - raw : live].masked_fill_(later[:, count - raw :], -math.inf)
        if real is not None:  # a query of padding sees all, so that no softmax is empty
            bias = torch.where(real[:, None, :, None], bias, 0.0)
        opened = None
        if self._far is not None and now is self._buffer:
            self._keep_far()
            near = raw_scores(query, seen.key[:, :, : now.live], bias[..., : now.live], scale)
            slots = seen.position[..., now.raw_room :]
            opened = self._far.open(query, near, slots, self._doc_first, time, scale=scale)
        at = None
        if score_mod is not None:
            at = torch.arange(time, time + count, dtype=torch.int32, device=key.device)
        if opened is not None and self._far is not None:
            out = self._far.attend(
                query, seen, bias, opened, now.raw_room, scale=scale, score_mod=score_mod,
                query_position=at,
            )  # fmt: skip
        else:
            out = attend_all(
                query, seen.key, seen.value, bias, scale=scale, score_mod=score_mod,
                query_position=at, key_position=seen.position,
            )  # fmt: skip
        return out if real is None else out * real[:, None, :, None]

    def _keep_far(self) -> None:
        """Units that were pooled while the whole text was there anyway."""
        if self._far is None or self._whole is None:
            return
        begin = self._far.count * self.config.unit_size
        if begin < self.done:
            columns, origins = self._whole.raw(self.done)
            self._far.add(
                columns.key[:, :, begin:], columns.value[:, :, begin:], origins.first[:, 0, begin:]
            )

    def _seen_now(self, length: int) -> SlotBuffer:
        """What the last query of a text of that length attends to."""
        assert self._buffer is not None
        if self._whole is not None and length < self.below:
            return self._whole
        return self._buffer

    # The prompt

    def _prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        score_mod: ScoreMod | None,
        ids: Tensor | None,
    ) -> Tensor:
        length = key.shape[2]
        real = self._begin(ids, query, key, length)
        plan = None
        config = dataclasses.replace(self.config, dense_below=self.below)
        whole = length < self.below
        if whole or config.prefill == "dense":
            out = dga_attention(
                query, key, value, config=config, scale=scale, score_mod=score_mod,
                document_ids=ids,
            )  # fmt: skip
            if not whole:
                plan = make_plan(query, key, value, config=config, scale=scale, document_ids=ids)
        else:
            out, plan = dga_attention(
                query, key, value, config=config, scale=scale, score_mod=score_mod,
                document_ids=ids, return_plan=True,
            )  # fmt: skip
        raw = real[:, None].expand(key.shape[:3])
        slots = None
        if plan is not None:
            raw = raw & seen_after(plan, length)[..., :length]
            if self.config.only_sinks:
                raw, slots = sinks_after(key, value, raw, self.config)
            else:
                slots = slots_after(query, key, value, plan, self.config, scale)
        self.seen = length
        if plan is not None:
            self._settle(raw)
        self._store(*self._recent(query, key, value, raw), slots)
        if self._far is not None and self.done:
            here = torch.where(real, self._doc_first, NEVER)[:, : self.done]
            self._far.add(key[:, :, : self.done], value[:, :, : self.done], here)
            assert plan is not None and plan.open is not None
            block = (length - 1) // self.config.block_size[0]
            self._far.begin(plan.open[:, :, block, : self._far.count], block)
        self._pool_due(length - 1, scale)
        return out

    def _begin(self, ids: Tensor | None, query: Tensor, key: Tensor, length: int) -> Tensor:
        """`goes_on` of a prompt; from now on each row's document is known, and what is short."""
        self.below = dense_below(self.config, query, key, decodes=True)
        real = goes_on(ids, (key.shape[0], length), key.device)
        self._doc_first = first_real(real)
        return real

    def _settle(self, raw: Tensor) -> None:
        """How much of a planned prompt is done, of which the last query sees these tokens raw."""
        # Heads keep different tokens raw. All get as many columns, and whole units are done.
        behind = self.seen - int(raw.sum(-1).amax())
        self.done = behind // self.config.unit_size * self.config.unit_size
        self._pooled_at = self.seen - 1
        if self.config.scope == "causal":
            self._pooled_at = self._due(self.done - self.config.unit_size)

    def _recent(
        self, query: Tensor, key: Tensor, value: Tensor, raw: Tensor
    ) -> tuple[Columns, Origins]:
        """`raw_columns` of the last tokens of a prompt."""
        return raw_columns(
            query, key, value, raw, self._doc_first,
            live=self.seen - self.done, seen=self.seen, keep_queries=self.keeps_queries,
        )  # fmt: skip

    def _store(self, columns: Columns, origins: Origins, slots: Columns | None) -> None:
        """Begin with a prompt's raw columns and its slots."""
        config, live, length = self.config, self.seen - self.done, self.seen
        ahead = max(self.max_length or 0, length)
        if self._forever_dense:
            self._buffer = SlotBuffer(
                columns, origins, max(live + ROOM, ahead), 0, keep_queries=False
            )
            return
        if slots is None:
            room = max(live + ROOM, min(ahead, self.below))
            alone = origins._replace(query=origins.query[:, :, :0])
            self._whole = SlotBuffer(columns, alone, room, 0, keep_queries=False)
        slot_room = max((ahead - self.done) // config.unit_size * self._unit_slots, ROOM)
        slot_room += 0 if slots is None else slots.key.shape[2]
        self._buffer = SlotBuffer(
            columns, origins, self._steady, slot_room,
            keep_queries=self.keeps_queries, int8=self.int8,
        )  # fmt: skip
        if slots is not None:
            self._buffer.add_slots(slots)

    # Pooling

    def _due(self, done: int) -> int:
        """The first query that sees slots in place of the unit that begins at `done`."""
        return handover(done + self.config.unit_size - 1, self._causal)

    def _next_due(self) -> int:
        """The first query after the next one that sees otherwise than the one before it."""
        if self._forever_dense:
            return NEVER
        if self._whole is not None and self.seen < self.below - 1:
            return min(self._next_handover(), self.below - 1)
        return self._next_handover()

    def _next_handover(self) -> int:
        done = self.done
        while self._due(done) <= self.seen:
            done += self.config.unit_size
        return self._due(done)

    def _pool_due(self, time: int, scale: float) -> None:
        """Pool the units that query `time` sees as slots, if all that decides on them is here."""
        if self._forever_dense:
            return
        unit, ahead, end = self.config.unit_size, lookahead(self._causal), self.done
        while self._due(end) <= time and end + unit + ahead <= self.seen:
            end += unit
        if end == self.done:
            return
        assert self._buffer is not None
        if self.record_past:
            past = (self._buffer.save(), self.done, self._pooled_at)
            self._history = [*self._history, past][-HISTORY:]
        count = end - self.done
        columns, origins = self._buffer.raw(-(-(count + ahead) // unit) * unit)
        slots = slots_of_units(
            columns, origins, count // unit, self.done, config=self._causal, scale=scale
        )
        if self._far is not None and self._whole is None:
            new = slice(count)
            self._far.add(
                columns.key[:, :, new], columns.value[:, :, new], origins.first[:, 0, new]
            )
        self._buffer.pool(count, slots, self._steady)
        self.done, self._pooled_at = end, self._due(end - unit)
