"""KV heads as rows of a batch: one compilation for all head counts, and parts of bounded memory.

Nothing that is planned for a KV head, or attended, depends on another one. As rows of the batch,
whose size compilations leave open, all head counts of one ratio share what is compiled; and a long
call takes a few of them at a time.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexdga.plan import Documents, Plan
from flexdga.scratch import blocks_held

T = TypeVar("T")


def by_kv_head(
    call: Callable[[Tensor, Tensor, Tensor, Documents, Plan | None], T],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents,
    plan: Plan | None,
) -> T:
    """`call` with (B·Hkv, H / Hkv, L, D) queries, (B·Hkv, 1, L, D) keys and values.

    Args:
        call: of query, key, value, documents and plan, to tensors of this form.
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        docs: the documents.
        plan: if there is one.

    Returns:
        What it gives, each tensor (B, heads, ...) again.
    """
    kv_heads = key.shape[1]
    return unfolded(call(*folded(query, key, value, docs, plan)), kv_heads)


def in_parts(
    call: Callable[[Tensor, Tensor, Tensor, Documents, Plan | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents,
    plan: Plan | None,
    *,
    table: int,
) -> Tensor:
    """`by_kv_head` of a (B, H, L, Dv) output, a few rows at a time; without gradients.

    Args:
        call: as there.
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        docs: the documents.
        plan: if there is one.
        table: entries of a table of blocks of one query head.
    """
    rows = folded(query, key, value, docs, plan)
    parts = list(parts_of(query, key.shape[1], table))
    if len(parts) == 1:
        out = call(*rows)
    else:
        out = query.new_empty(*rows[0].shape[:3], value.shape[-1])
        for part in parts:
            out[part] = call(*_each(operator.itemgetter(part), rows))
    return out.view(*query.shape[:3], -1)


def parts_of(query: Tensor, kv_heads: int, table: int) -> Iterator[slice]:
    """The rows of (B, H, L, D) queries that are taken at a time; `table` as in `in_parts`."""
    count = query.shape[0] * kv_heads
    # Two rows at least: a single one would be compiled for itself.
    held = blocks_held(query.device.type)
    parts = max(min(query.shape[:2].numel() * table // held, count // 2), 1)
    for begin, end in itertools.pairwise(i * count // parts for i in range(parts + 1)):
        yield slice(begin, end)


def unfolded(made: T, kv_heads: int) -> T:
    """Tensors (B·Hkv, heads, ...) of whatever is made, as (B, Hkv·heads, ...)."""
    whole: T = _each(
        lambda x: x.unflatten(0, (x.shape[0] // kv_heads, kv_heads)).flatten(1, 2), made
    )
    return whole


def folded(query: Tensor, key: Tensor, value: Tensor, docs: Documents, plan: Plan | None) -> Any:
    """These with KV heads as rows of the batch."""
    heads = key.shape[1]
    first, after = (t.repeat_interleave(heads, 0) for t in docs[:2])
    query, key, value, plan = _each(
        lambda x: x.unflatten(1, (heads, x.shape[1] // heads)).flatten(0, 1),
        (query, key, value, plan),
    )
    return query, key, value, Documents(first, after, docs.packed), plan


def _each(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, function, tree)
