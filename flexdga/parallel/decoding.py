"""Decoding after a sharded prefill: `ShardedCache`, and the units that its queries open.

Every rank holds the raw window, the slots and what estimates need of units, so all decide alike
which units a new query opens. The raw tokens of each unit are on one rank: that of its chunk, or of
what is generated each in turn. Every rank attends to the open units that it holds, the first one to
window and slots too, and the parts are put together by their sums of exponentials.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flexdga.config import DGAConfig
from flexdga.decode import LayerCache
from flexdga.estimates import unit_documents
from flexdga.far_units import FarUnits
from flexdga.handoff import without_dead
from flexdga.open_columns import Opened, bias_with_opened
from flexdga.parallel.collectives import all_reduce
from flexdga.parallel.failures import watched
from flexdga.parallel.shards import Shards, group_of
from flexdga.parallel.slots import Gathered
from flexdga.plan import NEVER, Plan
from flexdga.storage import Columns
from score_mods import ScoreMod

PRIME = 1009
"""Ranks compare the sums of their open units' numbers, each modulo this."""


class Prefilled(NamedTuple):
    """What a sharded prefill made, for a cache to begin with.

    Attributes:
        head: tokens before each chunk.
        plan: of the chunks with what stands around them.
        slots: of the whole sequence.
        features: `Units.key` of the whole sequence, or None.
        since: (B, H, T, N) from `open_units`, or None.
    """

    head: int
    plan: Plan
    slots: Gathered
    features: Tensor | None
    since: Tensor | None


class ShardedUnits(FarUnits):
    """Far units whose raw tokens are spread over ranks.

    Args:
        config: as in `FarUnits`.
        group: the ranks.
    """

    def __init__(self, config: DGAConfig, group: ProcessGroup) -> None:
        super().__init__(config)
        self.group, self.rank = group, dist.get_rank(group)
        self._held = torch.empty(0, dtype=torch.int32)  # (N,) among the tokens here, -1 elsewhere

    def receive(
        self, key: Tensor, value: Tensor, held: Tensor, features: Tensor, first: Tensor
    ) -> None:
        """The units of a prompt.

        Args:
            key: (B, Hkv, n·U, D) of this rank's units, in order.
            value: (B, Hkv, n·U, Dv).
            held: (n,) which they are.
            features: (B, Hkv, N, 2D) of all units.
            first: (B, N), as `unit_documents` has it.
        """
        self.count, self._first = first.shape[1], first
        self._features = features.float() if key.device.type == "cpu" else features.contiguous()
        self._forget_block()
        place = torch.full((self.count,), -1, dtype=torch.int32, device=key.device)
        place[held] = torch.arange(len(held), dtype=torch.int32, device=key.device)
        self._held = place
        self._write(key, value, 0)

    def bytes(self) -> int:
        """Of everything that this rank keeps."""
        return super().bytes() + self._held.numel() * self._held.element_size()

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
        """As `FarUnits.attend`, over all ranks.

        Raises:
            RuntimeError: ranks do not open the same units.
            RankError: a rank does not answer.
        """
        assert score_mod is None
        bias = bias_with_opened(bias, opened, raw_room)
        key, value = self._with_near(seen)
        end = None if not self.rank else opened.bias.shape[-1]
        bias, key, value = bias[..., :end], key[:, :, :end], value[:, :, :end].float()
        rows = query.reshape(*key.shape[:2], -1, key.shape[3])  # of the heads of a KV head
        score = (rows @ key.mT).float().view(bias.shape) * scale + bias.float()
        none = score.new_full((*score.shape[:-1], 1), -math.inf)
        top = torch.cat([score, none], -1).amax(-1)
        number = torch.arange(opened.open.shape[-1], device=query.device) % PRIME + 1
        check = (opened.open[:, :, -1] * number).sum(-1, keepdim=True).float()
        with watched(self.group, "flexdga, decoding"):
            most = torch.cat([top, check, -check], -1)
            most = all_reduce(most, "max", self.group, "highest scores")
            top, high, low = most.split([top.shape[-1], 1, 1], -1)
            if not torch.equal(high, -low):
                raise RuntimeError(
                    "flexdga, decoding: ranks do not open the same units; expected the same "
                    "tokens and the same kind of device on all ranks"
                )
            weight = torch.exp(score - top[..., None])
            part = weight.view(*rows.shape[:3], key.shape[2]) @ value
            part = part.view(*query.shape[:3], value.shape[3])
            part = torch.cat([part, weight.sum(-1, keepdim=True)], -1)
            part = all_reduce(part, "sum", self.group, "parts of the output")
        return (part[..., :-1] / part[..., -1:]).to(query.dtype)

    def _keep(self, key: Tensor, value: Tensor) -> None:
        size, device = self.config.block_size[1], key.device
        new = torch.arange(self.count, self.count + key.shape[2] // size, device=device)
        mine = new % dist.get_world_size(self.group) == self.rank
        old = self._held[: self.count].to(device)
        held = int((old >= 0).sum())
        place = torch.where(mine, held - 1 + mine.cumsum(0), -1).int()
        key, value = (x.unflatten(2, (-1, size))[:, :, mine].flatten(2, 3) for x in (key, value))
        self._write(key, value, held)
        self._held = torch.cat([old, place])

    def _mine(self, opened: Tensor) -> Tensor:
        return opened & (self._held[: self.count] >= 0)

    def _place(self, unit: int) -> int:
        return int(self._held[unit])


class ShardedCache(LayerCache):
    """A `LayerCache` that `parallel_attention(..., cache=...)` fills with a sharded prompt.

    Raw tokens that queries may open again are on one rank each. The raw window, the slots and the
    units' features (on CPU in float32, 1/32 of such keys and values) are on every rank, and so is
    everything while a text is shorter than `config.dense_below`. After the prefill every rank calls
    `attend` with the same new tokens, and gets the same output.

    Args:
        config: the choices.
        mesh: the ranks, as `Shards` takes them.
        max_length: as in `LayerCache`.
        int8: as in `LayerCache`.

    Raises:
        ValueError: the config estimates openings by all keys, which no rank has.
    """

    def __init__(
        self,
        config: DGAConfig,
        mesh: DeviceMesh | ProcessGroup,
        *,
        max_length: int | None = None,
        int8: bool = False,
    ) -> None:
        opens = config.opens and config.keep_raw != "none" and config.dense_below != NEVER
        if opens and config.open_by != "landmarks":
            raise ValueError(
                f"config: open_by={config.open_by!r} estimates by all keys, which no rank has; "
                "expected 'landmarks'"
            )
        self.group = group_of(mesh)
        super().__init__(config, max_length=max_length, int8=int8)

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
        """As `LayerCache.attend`, the same on every rank; without a score mod, as the prompt was.

        Raises:
            ValueError: as there, or there is a score mod.
        """
        if score_mod is not None:
            raise ValueError(
                f"score_mod: a sharded cache takes none; expected None, got "
                f"{type(score_mod).__name__}"
            )
        return super().attend(query, key, value, scale=scale, document_ids=document_ids)

    def _far_units(self) -> FarUnits:
        return ShardedUnits(self._causal, self.group)

    @torch.no_grad()
    def begin_dense(
        self, query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None, scale: float
    ) -> None:
        """Keep all of a short prompt.

        Args:
            query: (B, H, L, D), or of no tokens where none are kept.
            key: (B, Hkv, L, D).
            value: (B, Hkv, L, Dv).
            ids: (B, L) documents, or None.
            scale: of the scores.
        """
        self.seen = key.shape[2]
        real = self._begin(ids, query, key, self.seen)
        raw = real[:, None].expand(key.shape[:3])
        self._store(*self._recent(query, key, value, raw), None)
        self._pool_due(self.seen - 1, scale)

    @torch.no_grad()
    def begin(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ids: Tensor | None,
        shards: Shards,
        made: Prefilled,
        scale: float,
    ) -> None:
        """Keep what decoding needs of a sharded prompt.

        Args:
            query: (B, H, C·n, D), this rank's.
            key: (B, Hkv, C·n, D).
            value: (B, Hkv, C·n, Dv).
            ids: (B, L) documents of the whole sequence, or None.
            shards: how it is cut.
            made: by its prefill.
            scale: of the scores.
        """
        length, size = shards.length, shards.size
        real = self._begin(ids, query, key, length)
        self.seen = length
        number = (length - 1) // size  # the chunk of the last token, whose plan knows what is raw
        begin = number * size - made.head
        first = max(begin, 0)
        raw = torch.zeros(*key.shape[:2], length - first, dtype=torch.uint8, device=key.device)
        if number in shards.numbers:
            rows = slice(
                shards.numbers.index(number) * len(key),
                (shards.numbers.index(number) + 1) * len(key),
            )
            start, end = (
                t[rows, :, first - begin : length - begin] for t in (made.plan.start, made.plan.end)
            )
            seen = (start < length - begin) & (end >= length - begin)
            raw = (seen & real[:, None, first:]).to(torch.uint8)
        raw = all_reduce(raw, "sum", self.group, "raw window").bool()
        self._settle(raw)
        ends = [_end_of(x, first, shards) for x in (query, key, value)]
        columns, origins = self._recent(ends[0], ends[1], ends[2], raw)
        # Each token is one rank's, and 0 on the others.
        keys, values, queries = (
            all_reduce(x, "sum", self.group, "raw window") if x.numel() else x
            for x in (columns.key, columns.value, origins.query)
        )
        columns, origins = columns._replace(key=keys, value=values), origins._replace(query=queries)
        self._store(columns, origins, _slots_after(made.slots, length))
        if self._far is not None and self.done:
            self._receive(key, value, real, shards, made)
        self._pool_due(length - 1, scale)

    def _receive(
        self, key: Tensor, value: Tensor, real: Tensor, shards: Shards, made: Prefilled
    ) -> None:
        assert isinstance(self._far, ShardedUnits)
        assert made.features is not None and made.since is not None
        rows, size = self.config.block_size
        count = self.done // size
        first = torch.where(real, self._doc_first, NEVER)[:, : self.done]
        inside = torch.arange(shards.size // size, device=key.device)
        held = torch.cat([number * (shards.size // size) + inside for number in shards.numbers])
        mine = held < count
        key, value = (x.unflatten(2, (-1, size))[:, :, mine].flatten(2, 3) for x in (key, value))
        first = unit_documents(first, self.config)
        self._far.receive(key, value, held[mine], made.features[:, :, :count], first)

        number, last = divmod(shards.length - 1, shards.size)
        table = torch.zeros_like(made.since[:, :, 0, :count])
        if number in shards.numbers:
            chunk = shards.numbers.index(number)
            table = made.since[:, :, (chunk * shards.size + last) // rows, :count]
            moved = table + (number - chunk) * shards.size
            table = torch.where(table == NEVER, NEVER, moved)
        table = all_reduce(table, "sum", self.group, "open units")
        self._far.begin(table, (shards.length - 1) // rows)


def _end_of(x: Tensor, first: int, shards: Shards) -> Tensor:
    """(B, H, C·n, D) to the tokens of the sequence from `first` on: 0 where others have them."""
    out = x.new_zeros(*x.shape[:2], shards.length - first, x.shape[3])
    for c, number in enumerate(shards.numbers):
        begin = number * shards.size
        low, high = max(begin, first), min(begin + shards.size, shards.length)
        if low < high:
            at = c * shards.size - begin
            out[:, :, low - first : high - first] = x[:, :, low + at : high + at]
    return out


def _slots_after(slots: Gathered, length: int) -> Columns:
    """Those that a query after so many sees."""
    alive = (slots.start < length) & (slots.end >= length)
    bias = torch.zeros_like(alive, dtype=slots.key.dtype)
    if slots.bias is not None:
        bias = slots.bias[..., 0].to(bias)
    return without_dead(
        Columns(
            slots.key,
            slots.value,
            bias.masked_fill(~alive, -math.inf),
            slots.position.masked_fill(~alive, -1),
        )
    )
