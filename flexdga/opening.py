"""Which raw units each query block opens: what this query needs of the far past.

A query opens the units that seem to hold more than a given share of its attention, and what one
query opens stays open to the end of its query block. So nothing depends on a later query, and a
unit is open to few queries that do not need it, while the kernel still works on whole blocks.

Shape suffixes: B batch, H query heads, G KV heads, R query heads per KV head, L tokens, C queries,
N units, U tokens of a unit, T query blocks, I queries of one, W tokens around it, D head_dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.indexing import take_rows
from flexdga.plan import NEVER, Documents

Run = Callable[..., Any]
STRETCH = 1024
"""Queries whose scores of units are held at a time."""
BOX_SHARE = 0.3
"""How far a unit's estimate goes from its mean key towards the corner of the box around its keys
that suits the query best. Measured on a real model: bench/RESEARCH.md."""


class Units(NamedTuple):
    """What estimates need of each unit.

    Attributes:
        key: (B, Hkv, N, 2D) features for `box`, (B, Hkv, N·U, D) the keys themselves for `exact`.
        first: (B, N) int32 first token of the unit's document; NEVER if the unit holds padding or
            parts of two documents, and so never opens.
    """

    key: Tensor
    first: Tensor


def unit_features(key: Tensor, config: DGAConfig) -> Tensor:
    """Features of whole units of keys (B, Hkv, N·U, D), as `Units.key`."""
    if config.open_by == "exact":
        return key
    units = key.unflatten(2, (-1, config.block_size[1]))
    middle = (1 - BOX_SHARE) * units.mean(3)
    high = BOX_SHARE * units.amax(3) + middle
    low = BOX_SHARE * units.amin(3) + middle
    return torch.cat([high, low], -1)


def unit_documents(first: Tensor, config: DGAConfig) -> Tensor:
    """(B, N) `Units.first` from the documents of (B, N·U) tokens."""
    units = first.unflatten(-1, (-1, config.block_size[1]))
    return torch.where(units.amin(-1) == units.amax(-1), units[..., 0], NEVER)


def far_log_mass(query: Tensor, units: Tensor, config: DGAConfig, scale: float) -> Tensor:
    """(B, H, C, N) estimated log of Σ exp(score) over each unit's tokens, for every query.

    `box` takes a unit to be one token, somewhere between its mean key and the best corner of the
    box: what is worth opening stands out of its unit. Counting the unit's tokens opened more and
    found less.

    Args:
        query: (B, H, C, D).
        units: `Units.key`.
        config: `open_by`, `block_size`.
        scale: of the scores.
    """
    batch, heads, count, _ = query.shape
    size, kv_heads = config.block_size[1], units.shape[1]
    if config.open_by == "box":
        # q·corner = Σ max(q_d high_d, q_d low_d), the corner being the best one for this query.
        query = torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)
    rows = query.reshape(batch, kv_heads, -1, query.shape[-1])
    score = (rows @ units.mT).float() * scale
    score = score.view(batch, heads, count, -1)
    if config.open_by == "exact":
        return torch.logsumexp(score.unflatten(-1, (-1, size)), -1)
    return score


def near_log_mass(
    query: Tensor,
    key: Tensor,
    first: Tensor,
    block: Tensor,
    *,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """(B, H, T·I) log of Σ exp(score) over the tokens of each query that are too near to open.

    Args:
        query: (B, H, T·I, D), whole query blocks.
        key: (B, Hkv, L, D), all keys.
        first: (B, L) first token of each token's document.
        block: (T,) int32, the numbers of these query blocks.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
    """
    batch, heads, count, _ = query.shape
    kv_heads, rows = key.shape[1], config.block_size[0]
    span = config.window + config.block_size[1]
    width = rows + (span if is_causal else 2 * span)
    offset = torch.arange(width, dtype=torch.int32, device=key.device)
    pos_TW = block[:, None] * rows - span + offset
    index = pos_TW.clamp(min=0, max=key.shape[2] - 1)
    k_BGTWD = take_rows(key, index.expand(batch, kv_heads, -1, -1))
    q_BGRTID = query.view(batch, kv_heads, -1, count // rows, rows, query.shape[-1])
    q_BGTXD = q_BGRTID.transpose(2, 3).flatten(3, 4)  # X = R·I
    score = (q_BGTXD @ k_BGTWD.mT).float() * scale
    score = score.unflatten(3, (-1, rows)).transpose(2, 3)  # (B, G, R, T, I, W)

    at_TI = block[:, None] * rows + torch.arange(rows, dtype=torch.int32, device=key.device)
    before_T, after_T = far_units(block * rows, config)
    size = config.block_size[1]
    seen_TW = (pos_TW >= before_T[:, None] * size) & (pos_TW < after_T[:, None] * size)
    seen_TW = seen_TW & (pos_TW >= 0) & (pos_TW < key.shape[2])
    same = first[:, index.long()][:, :, None] == first[:, at_TI.long()][..., None]
    seen = same & seen_TW[:, None]  # (B, T, I, W)
    if is_causal:
        seen = seen & (pos_TW[:, None] <= at_TI[..., None])
    score = score.masked_fill(~seen[:, None, None], -math.inf)
    return torch.logsumexp(score, -1).reshape(batch, heads, count)


def far_units(first_query: Tensor, config: DGAConfig) -> tuple[Tensor, Tensor]:
    """Which units a query block may open: how many before it, and those from this one on after it.

    They are those that the whole block sees through their slots. Causal attention has none after.
    """
    rows, size = config.block_size
    before = (first_query - config.window + 1).clamp(min=0) // size
    return before, -(-(first_query + rows + config.window - 1) // size)


def wanted(far: Tensor, near: Tensor, config: DGAConfig) -> tuple[Tensor, Tensor]:
    """Which units each query asks for, and the log of all its mass.

    Args:
        far: (..., N) from `far_log_mass`; -inf for units that the query may not open.
        near: (...) log mass of what is not far.
        config: `open_mass`.

    Returns:
        (..., N) bool and (...) float32.
    """
    total = torch.logaddexp(torch.logsumexp(far, -1), near)
    least = math.log(config.open_mass) if config.open_mass else -math.inf
    return far > (total + least)[..., None], total


def served(
    want: Tensor, share: Tensor, count: int, *, turns: bool, already: Tensor | None = None
) -> Tensor:
    """(..., N) bool: the `count` units that a query block may open, of all that it asks for.

    Args:
        want: (..., C, N) bool, what each query asks for.
        share: (..., C, N) of the query's attention, at most 1.
        count: `DGAConfig.open_units`.
        turns: who asks first is served first, and among those who ask together the larger share;
            otherwise the larger share of all.
        already: (..., N) bool, units that are open: they keep their place.
    """
    if turns:
        share = share - torch.arange(want.shape[-2], device=want.device)[:, None]
    rank = torch.where(want, share, -math.inf).amax(-2)
    if already is not None:
        rank = rank.masked_fill(already, math.inf)
    best = rank.topk(min(count, rank.shape[-1]), dim=-1).indices
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)


def open_table(
    query: Tensor,
    key: Tensor,
    docs: Documents,
    *,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
    run: Run,
) -> Tensor:
    """`openings` of a whole sequence, a stretch of queries at a time: (B, H, L / I, L / U).

    Inside a compiler it is one stretch, whose scores of units take B·H·L·N numbers.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        docs: the documents.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
        run: how to call `openings`.
    """
    rows, size = config.block_size
    blocks = query.shape[2] // rows
    units = Units(unit_features(key, config), unit_documents(docs.first, config))
    number = torch.arange(blocks, dtype=torch.int32, device=key.device)
    if torch.compiler.is_compiling():
        # Numbers that seem to depend on data: Inductor (torch 2.13) takes what is computed from
        # an `arange` for an index of its own, and fails to simplify it.
        some = key[0, 0, 0, :1]
        number = number + ((some != some) & (some == some)).to(torch.int32)
        made = openings(
            query, key, docs.first, units, number,
            config=config, is_causal=is_causal, packed=docs.packed, scale=scale,
        )  # fmt: skip
        # The kernel's mask captures it, and Inductor takes the result of a `cat` as it is.
        return torch.cat([made[:, :, :1], made[:, :, 1:]], 2)
    parts = -(-blocks * rows // STRETCH)
    edges = [i * blocks // parts for i in range(parts + 1)]
    per_unit = units.key.shape[2] // units.first.shape[1]
    table = []
    for begin, end in itertools.pairwise(edges):
        # Units that no block of the stretch can open are left out, in whole multiples of few.
        reach = -(-end * rows // size // 16) * 16 if is_causal else units.first.shape[1]
        # Copies: a slice is compiled for strides that differ from stretch to stretch.
        near = Units(
            units.key[:, :, : reach * per_unit].contiguous(), units.first[:, :reach].contiguous()
        )
        part = run(
            openings, query[:, :, begin * rows : end * rows].contiguous(), key, docs.first, near,
            number[begin:end].clone(),
            config=config, is_causal=is_causal, packed=docs.packed, scale=scale,
        )  # fmt: skip
        table.append(F.pad(part, (0, units.first.shape[1] - part.shape[-1]), value=NEVER))
    return torch.cat(table, 2)


def openings(
    query: Tensor,
    key: Tensor,
    first: Tensor,
    units: Units,
    block: Tensor,
    *,
    config: DGAConfig,
    is_causal: bool,
    packed: bool,
    scale: float,
) -> Tensor:
    """From which query on each of these query blocks sees each unit raw.

    Args:
        query: (B, H, T·I, D) of the query blocks.
        key: (B, Hkv, L, D), all keys.
        first: (B, L) first token of each token's document.
        units: the first N units at least as far as these blocks may open them.
        block: (T,) int32, the numbers of the query blocks.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        packed: whether a row may hold several documents, or padding on the left.
        scale: of the scores.

    Returns:
        (B, H, T, N) int32, NEVER where the unit stays closed. In `prompt` scope all queries of the
        document in a block see what it opens.
    """
    rows = config.block_size[0]
    before_T, after_T = far_units(block * rows, config)
    number = torch.arange(units.first.shape[-1], dtype=torch.int32, device=key.device)
    far_TN = number < before_T[:, None]
    if not is_causal:
        far_TN = far_TN | (number >= after_T[:, None])
    open_to = far_TN[:, None]
    at_TI = block[:, None] * rows + torch.arange(rows, dtype=torch.int32, device=key.device)
    begin_T = block * rows
    if packed or not is_causal:
        doc_BTI = first[:, at_TI.long()]
        # A block in which a document ends opens for the next one alone: the table has no end.
        last_BT = torch.where(doc_BTI == NEVER, -1, doc_BTI).amax(-1)
        doc_BTI = torch.where(doc_BTI == last_BT[..., None], doc_BTI, -1)
        same_BTIN = units.first[:, None, None] == doc_BTI[..., None]
        open_to = (open_to & same_BTIN)[:, None]
        begin_T = torch.maximum(begin_T, last_BT)[:, None, :, None]
    else:
        begin_T = begin_T[:, None]
    far = far_log_mass(query, units.key, config, scale).unflatten(2, (-1, rows))
    far = far.masked_fill(~open_to, -math.inf)
    near = near_log_mass(
        query, key, first, block, config=config, is_causal=is_causal, scale=scale
    ).unflatten(2, (-1, rows))
    want, total = wanted(far, near, config)
    if config.scope == "prompt":
        since = torch.where(want.any(3), begin_T, NEVER)
    else:
        since = torch.where(want, at_TI[..., None], NEVER).amin(3)
    if config.open_units is not None:
        share = torch.exp(far - total[..., None])
        turns = config.scope == "causal"
        since = torch.where(served(want, share, config.open_units, turns=turns), since, NEVER)
    return since
