"""Attention over the slots of a plan, and its gradients, in plain PyTorch block by block.

Query blocks that see equally many key blocks are taken together, some at a time: the keys that they
see are gathered, and all products are batched. Nothing that is held at once grows with the length,
and blocks that nobody sees cost nothing. Focal copies, groups, their weights and their bias are
made by `compress.pool`, and autograd differentiates that part.

Shapes: B batch, H query heads, G KV heads, T query blocks of I queries, key blocks of J slots, D
head_dim; n query blocks that see R key blocks of raw tokens, and P of other slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from flexdga.block_mask import visible_blocks
from flexdga.compress import pool
from flexdga.config import GroupWeights
from flexdga.indexing import take_rows
from flexdga.plan import NEVER, Plan, with_null_slot
from score_mods import ScoreMod, is_elementwise, needs_null_slot

SCORES = 1 << 19
"""Scores that are held at a time."""
HIDDEN = -1e30
"""The score of what a query does not see. Finite: a row of nothing else stays a number."""


class Choices(NamedTuple):
    """What `kernel.attend` is told besides tensors; see there."""

    weights: GroupWeights
    mass: bool
    block_size: tuple[int, int]
    scale: float
    score_mod: ScoreMod | None


class _Blocks(NamedTuple):
    """Query blocks that see equally many key blocks, and these.

    Attributes:
        row: (n,) which of the B·H·T query blocks.
        query: (n, I) int32 the positions of their queries.
        seen: (n, R) and (n, P) blocks of raw tokens and of other slots, numbered within a head.
        places: the same, numbered through all KV heads of the batch, flat.
    """

    row: Tensor
    query: Tensor
    seen: list[Tensor]
    places: list[Tensor]


class _Scores(NamedTuple):
    """What such query blocks make of the keys that they see.

    Attributes:
        query: (n, I, D), times the scale.
        keys: (n, R·J, D) and (n, P·J, D).
        values: (n, R·J, Dv) and (n, P·J, Dv).
        share: (n, I, (R+P)·J) the softmax. A query that sees nothing has some too.
        blind: (n, I, 1) bool, such queries.
        raw: scores before the user's score mod, or None.
        modified: and after it, with autograd's graph between them.
    """

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    share: Tensor
    blind: Tensor
    raw: Tensor | None
    modified: Tensor | None


class _Sums(NamedTuple):
    """Gradients as they grow: by blocks, of both sections, and of the captured tensors."""

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    bias: Tensor | None
    captured: list[Tensor]


class _Rows:
    """Reads rows for `pool`, each time as a leaf of autograd's, and adds up their gradients.

    Autograd's own gradient of reading is as large as what was read from.
    """

    def __init__(self, sources: list[Tensor]) -> None:
        self.sources = sources
        self.taken: list[tuple[int, Tensor, Tensor]] = []

    def take(self, source: Tensor, index: Tensor) -> Tensor:
        """As `take_rows`."""
        leaf = take_rows(source.detach(), index).requires_grad_()
        self.taken.append((self._number(source), index, leaf))
        return leaf

    def _number(self, source: Tensor) -> int:
        return next(i for i, one in enumerate(self.sources) if one is source)

    def add(self, sums: list[Tensor]) -> list[Tensor]:
        """Sums (of any shape) plus the gradients of the rows, in the shape and dtype of sources."""
        for number, index, leaf in self.taken:
            if leaf.grad is None or not leaf.numel():
                continue
            batch, heads, length, dim = self.sources[number].shape
            base = torch.arange(batch * heads).view(batch, heads, 1) * length
            rows = (index.clamp(min=0).long().flatten(2) + base).flatten()
            grad = leaf.grad.reshape(-1, dim).to(sums[number].dtype)
            sums[number].view(-1, dim).index_add_(0, rows, grad)
            leaf.grad = None
        return [t.view(s.shape).to(s.dtype) for t, s in zip(sums, self.sources)]


class Pass:
    """One call by blocks, forward or backward. Sections: raw tokens, and all other slots.

    Args:
        query: (B, H, Q, D), of all raw tokens, or of the first Q where slots are `given`.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        plan: of L raw tokens.
        choices: of the call.
        given: keys, values and bias (B, Hkv, S - L, ·) of the other slots, leaves of autograd's
            that the backward pass gives their gradients; None = pooled by the plan.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        choices: Choices,
        given: list[Tensor] | None = None,
    ) -> None:
        if needs_null_slot(choices.score_mod):
            plan = with_null_slot(plan)
        self.plan, self.choices, self.heads = plan, choices, query.shape[1]
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.shape = (*query.shape[:3], value.shape[-1])
        self.rows = _Rows([query, key, value])
        self.made = self._pooled(query, key, value) if given is None else given
        rows, size = choices.block_size
        self.query = _blocks(query, rows)
        made = [_blocks(t.detach(), size) for t in self.made]
        self.keys, self.values = (_blocks(key, size), made[0]), (_blocks(value, size), made[1])
        self.bias = made[2] if len(made) > 2 else None
        self.counts = [k.shape[0] // plan.start.shape[:2].numel() for k in self.keys]
        self.queries = query.shape[2]
        own = plan.start[..., : self.queries].repeat_interleave(query.shape[1] // key.shape[1], 1)
        self.own = own.reshape(-1, rows)  # when the queries' own raw slots start
        self.start, self.end, self.position = (
            [_blocks(part[..., None], size, fill) for part in _sections(t, plan.length)]
            for t, fill in ((plan.start, NEVER), (plan.end, 0), (plan.position, -1))
        )

    def _pooled(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keys, values and perhaps bias of focal copies and groups, with autograd's graph."""
        plan, choices = self.plan, self.choices
        with torch.enable_grad():
            pooled = pool(
                query, key, value, plan.focal, plan.members, plan.member_score,
                weights=choices.weights, mass=choices.mass, scale=choices.scale,
                take=self.rows.take,
            )  # fmt: skip
            made = [
                torch.cat([pooled.focal_key, pooled.group_key], 2),
                torch.cat([pooled.focal_value, pooled.group_value], 2),
            ]
            if pooled.entropy is not None:
                bias = F.pad(pooled.entropy, (plan.focal.shape[-1], 0))
                made.append(bias[..., None].to(self.wide))
        return made

    def forward(self) -> Tensor:
        """The output, (B, H, L, Dv)."""
        out = self.query.new_zeros(*self.query.shape[:2], self.shape[-1])
        for blocks in self._visible():
            made = self._scores(blocks)
            share = _split(made.share.masked_fill(made.blind, 0), made.values)
            out[blocks.row] = _sum_of_products(share, made.values).to(out.dtype)
        return out.view(self.shape)

    def backward(self, grad: Tensor, captured: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of query, key, value and the captured tensors, from the output's."""
        sums = _Sums(
            query=torch.zeros_like(self.query, dtype=self.wide),
            # Many queries see one key: their sum needs the precision.
            keys=[torch.zeros_like(t, dtype=self.wide) for t in self.keys],
            values=[torch.zeros_like(t, dtype=self.wide) for t in self.values],
            bias=None if self.bias is None else torch.zeros_like(self.bias),
            captured=[torch.zeros_like(t) for t in captured],
        )
        for blocks in self._visible():
            self._add(sums, blocks, grad, captured)
        tensors, grads = [], []
        for made, total in zip(self.made, (sums.keys[1], sums.values[1], sums.bias)):
            if made.requires_grad and total is not None:
                whole = total.view(*made.shape[:2], -1, made.shape[3])
                tensors.append(made)
                grads.append(whole[:, :, : made.shape[2]].to(made.dtype))
        if tensors:
            torch.autograd.backward(tensors, grads)
        return [*self.rows.add([sums.query, sums.keys[0], sums.values[0]]), *sums.captured]

    def _add(self, sums: _Sums, blocks: _Blocks, grad: Tensor, captured: Sequence[Tensor]) -> None:
        """What some query blocks add to the gradients."""
        made = self._scores(blocks)
        d_out = self._of_rows(grad, blocks.row).to(self.wide).masked_fill(made.blind, 0)
        d_share = _against(d_out, made.values)
        d_score = torch._softmax_backward_data(d_share, made.share, -1, self.wide)
        del d_share
        for i, share in enumerate(_split(made.share, made.values)):
            part = _products(share, d_out, sums.values[i])
            sums.values[i].index_add_(0, blocks.places[i], part)
        if sums.bias is not None:
            part = _split(d_score, made.keys)[1].sum(1).view(-1, *sums.bias.shape[1:])
            sums.bias.index_add_(0, blocks.places[1], part)
        if made.modified is not None and made.raw is not None:
            if not made.modified.requires_grad:  # a mod that looks at nothing
                return
            d_score, *more = torch.autograd.grad(
                made.modified, [made.raw, *captured], d_score,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            for total, part in zip(sums.captured, more):
                total += part
        parts = _split(d_score, made.keys)
        d_query = _sum_of_products(parts, made.keys).mul_(self.choices.scale)
        sums.query[blocks.row] = d_query
        for i, d_part in enumerate(parts):
            part = _products(d_part, made.query, sums.keys[i])
            sums.keys[i].index_add_(0, blocks.places[i], part)

    def _visible(self) -> Iterator[_Blocks]:
        """All query blocks that see anything, those that see equally many key blocks together."""
        rows, size = self.choices.block_size
        part, whole = visible_blocks(self.plan, (rows, size), self.queries)
        table = part | whole
        table = table.repeat_interleave(self.heads // table.shape[1], 1)
        per_head, rep = table.shape[2], self.heads // self.plan.start.shape[1]
        tables = table.flatten(0, 2).split(self.counts, -1)
        base = self.counts[1] + 1
        kind = tables[0].sum(-1) * base + tables[1].sum(-1)
        order = kind.argsort(stable=True)
        columns = [t[order].nonzero()[:, 1] for t in tables]
        kinds, sizes = kind[order].unique_consecutive(return_counts=True)
        inside = torch.arange(rows, dtype=torch.int32)
        for numbers, of_kind in zip(kinds.tolist(), order.split(sizes.tolist())):
            each = divmod(numbers, base)
            if not sum(each):
                continue
            for row in of_kind.split(max(1, SCORES // (sum(each) * rows * size))):
                head = row // (per_head * rep)  # of all KV heads of the batch
                seen, places = [], []
                for i in range(2):
                    took, columns[i] = columns[i].tensor_split([len(row) * each[i]])
                    seen.append(took.view(len(row), each[i]))
                    places.append((seen[i] + head[:, None] * self.counts[i]).flatten())
                first = (row % per_head * rows).to(torch.int32)
                yield _Blocks(row, first[:, None] + inside, seen, places)

    def _scores(self, blocks: _Blocks) -> _Scores:
        query = self.query[blocks.row].to(self.wide) * self.choices.scale
        keys, values = (
            [_taken(t, i, len(query)).to(self.wide) for t, i in zip(section, blocks.places)]
            for section in (self.keys, self.values)
        )
        score = _against(query, keys)
        raw = modified = None
        if self.choices.score_mod is not None:
            raw = score.requires_grad_()
            with torch.enable_grad():
                modified = self._modified(raw, self.choices.score_mod, blocks)
            score = modified.detach().clone()
        if self.bias is not None:
            bias = _taken(self.bias, blocks.places[1], len(query)).mT
            score[..., score.shape[-1] - bias.shape[-1] :] += bias
        for part, hidden in zip(_split(score, keys), self._hidden(blocks)):
            part.masked_fill_(hidden, HIDDEN)
        if modified is not None:
            score.clamp_(min=HIDDEN)  # a mod may hide more, by -inf
        blind = score.amax(-1, keepdim=True) <= HIDDEN
        return _Scores(query, keys, values, torch.softmax(score, -1), blind, raw, modified)

    def _modified(self, score: Tensor, mod: ScoreMod, blocks: _Blocks) -> Tensor:
        """The user's score mod over (n, I, S) scores, at the slots' positions."""
        head = blocks.row // (self.queries // self.choices.block_size[0])
        place = [_taken(t, i, len(head)) for t, i in zip(self.position, blocks.places)]
        b, h = (t.int()[:, None, None] for t in (head // self.heads, head % self.heads))
        at = (b, h, blocks.query[..., None], torch.cat(place, 1).mT)
        if is_elementwise(mod):
            return mod(score, *at)
        flat = (t.expand(score.shape).flatten() for t in (score, *at))
        with TransformGetItemToIndex():
            return torch.vmap(mod)(*flat).view(score.shape)

    def _hidden(self, blocks: _Blocks) -> tuple[Tensor, Tensor]:
        """(n, I, R·J) and (n, I, P·J) bool: what queries do not see, as `block_mask._mask_mod`."""
        query, count = blocks.query[..., None], len(blocks.row)
        start, end = (
            [_taken(t, i, count).mT for t, i in zip(section, blocks.places)]
            for section in (self.start, self.end)
        )
        raw, other = ((s > query).bitwise_or_(query >= e) for s, e in zip(start, end))
        if self.plan.open is None:
            return raw, other
        size = self.choices.block_size[1]
        since = self.plan.open.flatten(0, 2)[blocks.row]
        # Padding sees nothing, whatever its block opens: its own raw slot never starts.
        own = self.own[blocks.row]
        awake = torch.where(own <= blocks.query, blocks.query, -1)[..., None]
        closed = since.gather(1, blocks.seen[0])[:, None] > awake
        raw.view(*closed.shape, size).bitwise_and_(closed[..., None])
        home = _taken(self.position[1], blocks.places[1], count)[..., 0] // size
        opens = since.gather(1, home.clamp(min=0).long()).masked_fill(home < 0, NEVER)
        return raw, other.bitwise_or_(opens[:, None] <= awake)

    def _of_rows(self, x: Tensor, row: Tensor) -> Tensor:
        """The query blocks (n, I, D) of (B, H, L, D), whatever its strides."""
        per_head = self.queries // self.choices.block_size[0]
        head = row // per_head
        blocks = x.unflatten(2, (per_head, -1))
        return blocks[head // self.heads, head % self.heads, row % per_head]


def _blocks(x: Tensor, size: int, fill: int = 0) -> Tensor:
    """(B, H, L, D) to (B·H·blocks, size, D), the last block filled up."""
    short = -x.shape[2] % size
    x = F.pad(x, (0, 0, 0, short), value=fill) if short else x
    return x.reshape(-1, size, x.shape[3])


def _taken(blocks: Tensor, index: Tensor, count: int) -> Tensor:
    """Blocks (N, J, D) at an index (n·R): (n, R·J, D)."""
    size = len(index) // count * blocks.shape[1]
    return blocks.index_select(0, index).view(count, size, blocks.shape[2])


def _sections(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(B, G, S) split into raw tokens and other slots."""
    return x[..., :length], x[..., length:]


def _split(x: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(n, I, S) by the sections of the keys."""
    return x.split([k.shape[1] for k in keys], -1)


def _against(rows: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """(n, I, S): products of the rows (n, I, D) with the keys of the sections."""
    parts = [rows @ k.mT for k in keys if k.shape[1]]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def _sum_of_products(shares: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """Σ (n, I, S) @ (n, S, D) over the sections."""
    total = shares[0] @ keys[0]
    return total + shares[1] @ keys[1] if keys[1].shape[1] else total


def _products(share: Tensor, query: Tensor, like: Tensor) -> Tensor:
    """(n, I, R·J), (n, I, D) to what (n·R, J, D) key blocks get from their queries."""
    return (share.mT @ query).view(-1, *like.shape[1:])
