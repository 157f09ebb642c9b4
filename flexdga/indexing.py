"""Small index helpers: static shapes, no loops over tokens, everything traceable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compact(mask: Tensor, capacity: int) -> Tensor:
    """Where `mask` holds along its last dimension, in order: (..., capacity) int32, rest -1.

    What does not fit is dropped from the end.
    """
    rank = mask.cumsum(-1)
    slot = torch.where(mask & (rank <= capacity), rank - 1, capacity)
    index = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand_as(slot)
    out = torch.full((*mask.shape[:-1], capacity + 1), -1, dtype=torch.int32, device=mask.device)
    return out.scatter(-1, slot, index)[..., :capacity]


def take(table: Tensor, index: Tensor) -> Tensor:
    """Entries of `table` (..., L) at `index` (..., N); an index of -1 reads entry 0."""
    flat = index.clamp(min=0).long().flatten(table.dim() - 1)
    return table.gather(-1, flat).view(index.shape)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` (B, H, L, D) at `index` (B, H, ...): (B, H, ..., D); -1 reads row 0."""
    flat = index.clamp(min=0).long().flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).view(*index.shape, x.shape[-1])


def take_units(x: Tensor, unit: Tensor, size: int) -> Tensor:
    """Whole units of `size` rows of `x` (B, H, N·size, D), side by side: (B, H, M·size, D).

    A unit (B, H, M) of -1 reads the first. Units are copied as long rows: several times as fast as
    row by row.
    """
    batch, heads, rows, width = x.shape
    if not rows:
        return x
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * (rows // size)
    units = x.reshape(-1, size * width)
    taken = units.index_select(0, (unit.clamp(min=0) + first).flatten())
    return taken.view(batch, heads, unit.shape[2] * size, width)


def put(table: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Copy of `table` (..., L) with `value` at `index` (..., N); an index of -1 writes nothing."""
    length = table.shape[-1]
    target = torch.where(index < 0, length, index).long()
    return F.pad(table, (0, 1)).scatter(-1, target, value)[..., :length]


def filled(x: Tensor, dim: int, count: int, value: int) -> Tensor:
    """`count` entries more along `dim`, all `value`; the result of a `cat` even for none."""
    return torch.cat([x, x.new_full((*x.shape[:dim], count, *x.shape[dim + 1 :]), value)], dim)


def runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First index of, and first index after, the run of equal `ids` (..., L) around each entry."""
    length = ids.shape[-1]
    index = torch.arange(length, dtype=torch.int32, device=ids.device).expand_as(ids)
    edge = torch.ones_like(ids[..., :1], dtype=torch.bool)
    change = ids[..., 1:] != ids[..., :-1]
    first = torch.where(torch.cat([edge, change], -1), index, 0).cummax(-1).values
    after = torch.where(torch.cat([change, edge], -1), index + 1, length)
    return first, after.flip(-1).cummin(-1).values.flip(-1)


def heads_per_kv_head(query_heads: int, kv_heads: int) -> int:
    """Query heads that share a KV head, as a number that a compiler specialises on.

    The kernel's mods divide by it; `range` is what makes a symbolic integer a constant.
    """
    return len(range(query_heads)) // len(range(kv_heads))


def stored(x: Tensor) -> Tensor:
    """`x` as a tensor in memory, where a compiler for a GPU would compute it for each reader.

    Inductor (torch 2.13) stores there what is to have strides. On CPU nothing is done.
    """
    return x if x.device.type == "cpu" else x.as_strided(x.shape, x.stride())


def stored_mask(seen: Tensor) -> Tensor:
    """-1 where `seen` (..., T, N) is not true, else 0: on CPU as a table in memory.

    Otherwise a compiler computes the mask anew for each query of a block, which takes a CPU longer
    than the exponential; what a `cat` gives, it stores there.
    """
    table = torch.where(seen, 0.0, -1.0)
    if seen.device.type != "cpu":
        return table
    return torch.cat([table[..., :1, :], table[..., 1:, :]], -2)
