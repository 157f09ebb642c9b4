"""The `BlockMask` of a `Plan`, from the intervals of whole key blocks: nothing Q×KV is formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.attention.flex_attention import BlockMask

from flexdga import cpp, cpu_tables
from flexdga.indexing import heads_per_kv_head
from flexdga.plan import NEVER, Plan

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NARROW = 1 << 15
"""Key blocks below which both counts of a row fit an int32."""


class Tables(NamedTuple):
    """The key blocks of every query block, in order: as many as a row's count says.

    Attributes:
        part_count: (B, H, T) int32, how many each of T query blocks sees in part.
        part: (B, H, T, N) int32, which; from `listed` (≥ B·H·T, W), see `_as_wide`.
        whole_count: (B, H, T) int32, how many it sees whole.
        whole: like `part`, which.
    """

    part_count: Tensor
    part: Tensor
    whole_count: Tensor
    whole: Tensor


def visible_blocks(
    plan: Plan, block_size: tuple[int, int], queries: int | None = None
) -> tuple[Tensor, Tensor]:
    """Which key blocks the query blocks touch, and which of them they see whole.

    Args:
        plan: the intervals, and what is open.
        block_size: (query, key) tile.
        queries: how many there are; None = as many as raw tokens.

    Returns:
        Two (B, Hkv, query blocks, key blocks) bool, or (B, H, ...) with openings: touched in
        part, seen whole. Exclusive.
    """
    query_block, key_block = block_size
    start, end = plan.start, plan.end
    if plan.num_stand_ins:  # raw tokens alone fill their blocks
        pad = (0, -plan.num_slots % key_block)
        start, end = F.pad(start, pad, value=NEVER), F.pad(end, pad)
    start, end = (t.unflatten(-1, (-1, key_block)) for t in (start, end))
    earliest, latest_start = (t[..., None, :] for t in (start.amin(-1), start.amax(-1)))
    earliest_end, latest_end = (t[..., None, :] for t in (end.amin(-1), end.amax(-1)))
    queries = plan.length if queries is None else queries
    rows = queries // query_block
    q0 = torch.arange(rows, dtype=torch.int32, device=start.device)[:, None] * query_block
    q1 = q0 + query_block - 1
    touched = (q1 >= earliest) & (q0 < latest_end)
    whole = (q0 >= latest_start) & (q1 < earliest_end)
    if plan.open is not None:
        rep = heads_per_kv_head(plan.open.shape[1], start.shape[1])
        touched, whole = (t.repeat_interleave(rep, 1) for t in (touched, whole))
        opened = plan.open
        if plan.num_stand_ins:
            hidden = _slots_of_open_units(plan, key_block)
            whole = whole & ~F.pad(hidden, (plan.length // key_block - 1, 0))
            opened = F.pad(opened, (0, touched.shape[-1] - opened.shape[-1]), value=NEVER)
        touched = touched | (opened < NEVER)
        own = plan.start[:, :, :queries].unflatten(-1, (-1, query_block)).amax(-1) < NEVER
        real = own.repeat_interleave(rep, 1)[..., None]  # no padding among the queries
        whole = whole | ((opened <= q0) & real)
    return touched & ~whole, whole


def _slots_of_open_units(plan: Plan, key_block: int) -> Tensor:
    """(B, H, query blocks, key blocks) bool: whether slots of an open unit are in the block.

    The blocks are the last one of raw tokens and those after it. The slots of a section are in the
    order of their units, so a block spans a range of these.
    """
    assert plan.open is not None
    heads, units = plan.open.shape[1], plan.open.shape[-1]
    position = plan.position[..., plan.length :]
    # The block in front holds no slots: a compiler would take a single block for a constant.
    position = F.pad(position, (key_block, -position.shape[-1] % key_block), value=-1)
    position = position.unflatten(-1, (-1, key_block))
    home = position // key_block
    first = torch.where(position >= 0, home, units).amin(-1)
    after = torch.where(position >= 0, home + 1, 0).amax(-1)
    rep = heads_per_kv_head(heads, first.shape[1])
    count = F.pad((plan.open < NEVER).cumsum(-1, dtype=torch.int32), (1, 0))

    def before(unit: Tensor) -> Tensor:
        index = unit.long().repeat_interleave(rep, 1)[:, :, None]
        return count.gather(-1, index.expand(-1, -1, count.shape[2], -1))

    return before(after) > before(first)


def kinds_of_blocks(query: Tensor, plan: Plan, *, block_size: tuple[int, int]) -> Tensor:
    """`visible_blocks` of these (B, H, Q, D) queries in one (B, H, T, N) uint8: 1 part, 2 whole."""
    part, whole = visible_blocks(plan, block_size, query.shape[2])
    # By int32: Inductor (torch 2.13, CPU) turns bools into bytes one by one.
    kinds = (part.int() + 2 * whole.int()).to(torch.uint8)
    return kinds.repeat_interleave(heads_per_kv_head(query.shape[1], kinds.shape[1]), 1)


def listed(kinds: Tensor) -> Tables:
    """The tables of `kinds_of_blocks`, as narrow as the longest row lets them. Not for a compiler.

    Few blocks of all are seen: to find them takes a tenth of the time that sorting all takes.
    """
    rows, blocks = kinds.shape[:3].numel(), kinds.shape[3]
    if cpp.available(cpu_tables.NAME):
        of_both, part, whole = cpu_tables.list_kinds(kinds.contiguous().view(rows, blocks))
        part_count, whole_count = of_both.view(2, *kinds.shape[:3])
        return Tables(part_count, part, whole_count, whole)
    row, block = kinds.view(rows, blocks).nonzero().unbind(1)
    kind = kinds.view(rows, blocks)[row, block]
    found = [(row[kind == k], block[kind == k]) for k in (1, 2)]
    counts = [torch.bincount(row, minlength=rows) for row, _ in found]
    # Odd: a compiler takes sizes that are equal by chance for the same.
    width = int(torch.stack(counts).amax()) // 16 * 16 + 17
    made = []
    for (row, block), count in zip(found, counts):
        table = kinds.new_zeros(rows + -(-blocks // width), width, dtype=torch.int32)
        first = count.cumsum(0) - count
        place = torch.arange(row.shape[0], device=row.device) - first[row]
        table[row, place] = block.int()
        made += [count.int().view(kinds.shape[:3]), table]
    return Tables(*made)


def _as_wide(count: Tensor, table: Tensor, blocks: int) -> Tensor:
    """(B, H, T, N) view of a narrow table, for flex_attention asks for tables of all blocks.

    Of a row it reads no more than its count; what it would find behind are the next rows.
    """
    batch, heads, rows = count.shape
    width = table.shape[1]
    return table.as_strided(
        (batch, heads, rows, blocks), (heads * rows * width, rows * width, width, 1)
    )


def block_mask(
    plan: Plan,
    query_heads: int,
    block_size: tuple[int, int],
    *,
    backward: bool = False,
    table_size: tuple[int, int] | None = None,
    queries: int | None = None,
    tables: Tables | None = None,
) -> BlockMask:
    """The mask of `plan` for `query_heads` heads, for flex_attention over the slots.

    Args:
        plan: who sees what.
        query_heads: H.
        block_size: (query, key) tile of the plan.
        backward: adds the transposed tables that a gradient needs.
        table_size: multiples of `block_size` for the tables' blocks, where the kernel wants larger
            ones; what they add is masked entry by entry.
        queries: how many there are, where the first raw tokens alone have one.
        tables: of these blocks, where they are made already.
    """
    rep = heads_per_kv_head(query_heads, plan.start.shape[1])
    if tables is None:
        seen = visible_blocks(plan, block_size, queries)
        if plan.open is None:
            seen = (seen[0].repeat_interleave(rep, 1), seen[1].repeat_interleave(rep, 1))
        if table_size is not None:
            by = (table_size[0] // block_size[0], table_size[1] // block_size[1])
            seen = _coarser(*seen, by)
        tables = _all_in_order(*seen)
    else:
        blocks = -(-plan.num_slots // block_size[1])
        part, whole = (_as_wide(*pair, blocks) for pair in (tables[:2], tables[2:]))
        tables = tables._replace(part=part, whole=whole)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=tables.part_count,
        kv_indices=tables.part,
        full_kv_num_blocks=tables.whole_count,
        full_kv_indices=tables.whole,
        BLOCK_SIZE=table_size or block_size,
        mask_mod=_mask_mod(plan, rep, block_size),
        seq_lengths=(plan.length if queries is None else queries, plan.num_slots),
        compute_q_blocks=backward,
    )


def _coarser(part: Tensor, whole: Tensor, by: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`visible_blocks` of blocks so many times as large; what is cut off by the end is in part."""

    # Numbers, in one reduction: two that a compiler unrolls took more registers than there are.
    def count(blocks: Tensor) -> Tensor:
        fill = (0, -blocks.shape[-1] % by[1], 0, -blocks.shape[-2] % by[0])
        tiles = F.pad(blocks, fill).unflatten(-1, (-1, by[1])).unflatten(-3, (-1, by[0]))
        return tiles.sum((-3, -1), dtype=torch.int32)

    touched, all_of_it = count(part | whole) > 0, count(whole) == by[0] * by[1]
    return touched & ~all_of_it, all_of_it


def _mask_mod(plan: Plan, rep: int, block_size: tuple[int, int]) -> MaskMod:
    start, end, position, since = plan.start, plan.end, plan.position, plan.open
    query_block, key_block = block_size

    def interval(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        g = h // rep
        return (start[b, g, s] <= q) & (q < end[b, g, s])

    if since is None:
        return interval

    def interval_or_open_raw(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        opened = (since[b, h, q // query_block, s // key_block] <= q) & (start[b, h // rep, q] <= q)
        return interval(b, h, q, s) | opened

    if not plan.num_stand_ins:
        return interval_or_open_raw

    def interval_or_open(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        place = position[b, h // rep, s]
        unit = torch.clamp(place, min=0) // key_block
        # Padding sees nothing, whatever its block opens: its own raw slot never starts.
        opened = (since[b, h, q // query_block, unit] <= q) & (start[b, h // rep, q] <= q)
        inside = interval(b, h, q, s)
        # A raw slot stands at its own position, a slot of another section before it; one that
        # stands nowhere (attention sinks) belongs to no unit.
        return torch.where(place == s, inside | opened, inside & ~(opened & (place >= 0)))

    return interval_or_open


def _all_in_order(part: Tensor, whole: Tensor) -> Tables:
    """The tables of both (..., Q, KV) bool, with all blocks in a row: first those that it has."""
    # One running count for both, in the halves of a number: no other tensor takes more memory.
    blocks = part.shape[-1]
    half, dtype = (32, torch.int64) if guard_or_false(blocks >= NARROW) else (16, torch.int32)
    torch._check(half == 32 or blocks < NARROW)
    ranks = (part.to(dtype) + (whole.to(dtype) << half)).cumsum(-1, dtype=dtype)
    number = torch.arange(blocks, dtype=torch.int32, device=part.device)

    def table(blocks: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        count = rank[..., -1:]
        place = torch.where(blocks, rank - 1, count + number - rank)
        order = torch.empty_like(rank).scatter(-1, place.long(), number.expand_as(rank))
        return count.squeeze(-1), order

    low = ranks & ((1 << half) - 1)
    return Tables(*table(part, low.int()), *table(whole, (ranks >> half).int()))
