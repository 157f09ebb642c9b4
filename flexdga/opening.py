"""Which raw units each query block opens: what this query needs of the far past.

A query opens the units that seem to hold more than a given share of its attention, and what one
query opens stays open to the end of its query block. So nothing depends on a later query, and a
unit is open to few queries that do not need it, while the kernel still works on whole blocks.

Shape suffixes: B batch, H query heads, G KV heads, R query heads per KV head, L tokens, C queries,
N units, U tokens of a unit, T query blocks, I queries of one, W tokens near one, D head_dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexdga.coarse import Columns, column_log_mass
from flexdga.config import DGAConfig
from flexdga.estimates import Units, far_log_mass, in_bfloat16, products, units_beyond
from flexdga.indexing import stored, stored_mask
from flexdga.plan import NEVER

BEYOND = 60.0
"""A unit's log mass counts as at most so much more than that of all that is near: e^60 of them
still sum up in float32, and whoever asks for a share asks for such a unit in any case."""
OUTSIDE = -2
"""In place of the document of a token that is not there: no query's, not even a query's without."""


class QueryBlocks(NamedTuple):
    """Query blocks, with the tokens around them: `near_span` on either side.

    Attributes:
        begin: (T,) int32, the first query of each block.
        before: (T,) int32, the units that it may open: so many from the first on,
        after: (T,) int32, and those from this one on.
        document: (B, 1, T, I) int32, the first token of each query's document if it is the last
            one in the block, else -1: a block opens for one document alone, as what it opens
            stays open to its end.
        near: (B, 1, T, W) int32, the first token of the document of each token around; OUTSIDE
            where none is, or one that the block may open.
        near_key: (B, Hkv, T, W, D) bfloat16, their keys.
    """

    begin: Tensor
    before: Tensor
    after: Tensor
    document: Tensor
    near: Tensor
    near_key: Tensor

    def of(self, blocks: slice | Tensor) -> QueryBlocks:
        """Some of the blocks."""
        by_block, by_document = self[:3], self[3:]
        return QueryBlocks(*(t[blocks] for t in by_block), *(t[:, :, blocks] for t in by_document))


def near_log_mass(
    query: Tensor, around: QueryBlocks, *, config: DGAConfig, is_causal: bool, scale: float
) -> Tensor:
    """(B, H, T, I) log of Σ exp(score) over the tokens of each query that are too near to open.

    Of the block's last document: queries of another one get a number without a meaning. Scores are
    bfloat16 products, as in `far_log_mass`.

    Args:
        query: (B, H, T·I, D), whole query blocks.
        around: these blocks.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
    """
    batch, kv_heads, blocks, width, head_dim = around.near_key.shape
    rows, rep = config.block_size[0], query.shape[1] // kv_heads
    # No -1 among sizes: a compiler would divide to find it, in the middle of its loops.
    q_BGRTID = query.view(batch, kv_heads, rep, blocks, rows, head_dim)
    q_BGTXD = q_BGRTID.transpose(2, 3).reshape(batch, kv_heads, blocks, rep * rows, head_dim)
    score = products(in_bfloat16(q_BGTXD * scale), around.near_key).float()
    score = score.view(batch, kv_heads, blocks, rep, rows, width)

    same = around.near == around.document.amax(-1, keepdim=True)  # (B, 1, T, W)
    score = score.masked_fill(stored_mask(same)[:, :, :, None, None] < 0, -math.inf)
    if is_causal:
        offset = torch.arange(width, dtype=torch.int32, device=query.device) - near_span(config)
        index = torch.arange(rows, dtype=torch.int32, device=query.device)
        score = score.masked_fill(stored_mask(offset <= index[:, None]) < 0, -math.inf)
    return torch.logsumexp(score, -1).transpose(2, 3).flatten(1, 2)


def surroundings(
    key: Tensor, first: Tensor, *, config: DGAConfig, is_causal: bool, ahead: int = 0
) -> QueryBlocks:
    """All query blocks of a sequence, with the tokens around each as a view of its keys.

    Args:
        key: (B, Hkv, L, D), L in whole query blocks.
        first: (B, L) first token of each token's document.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        ahead: tokens before the first query block: none, or at least `near_span`.
    """
    rows, size = config.block_size
    blocks = (key.shape[2] - ahead) // rows
    begin = torch.arange(blocks, dtype=torch.int32, device=key.device) * rows
    begin = begin + ahead if ahead else begin
    if torch.compiler.is_compiling():
        # Numbers that seem to depend on data: Inductor (torch 2.13) takes what is computed from
        # an `arange` for an index of its own, and fails to simplify it.
        some = key[0, 0, 0, :1]
        begin = begin + ((some != some) & (some == some)).to(torch.int32)
    before, after = far_units(begin, config)
    document = (first[:, None, ahead:] if ahead else first[:, None]).unflatten(2, (-1, rows))
    last = torch.where(document == NEVER, -1, document).amax(-1, keepdim=True)
    document = torch.where(document == last, document, -1)

    span = near_span(config)
    width = rows + (span if is_causal else 2 * span)

    def windows(x: Tensor, outside: int) -> Tensor:  # (B, G, L, ...) to (B, G, T, W, ...)
        blank = x.new_full((*x.shape[:2], span, *x.shape[3:]), outside)
        if ahead:
            x = x[:, :, ahead - span :]
        sides = ([] if ahead else [blank], [] if is_causal else [blank])
        x = torch.cat([*sides[0], x, *sides[1]], 2) if any(sides) else x
        # Not `unfold`, which computes T from the length: a compiler would not see that it is T.
        shape = (*x.shape[:2], begin.shape[0], width, *x.shape[3:])
        return x.as_strided(shape, (*x.stride()[:2], rows * x.stride(2), *x.stride()[2:]))

    at = begin[:, None] - span + torch.arange(width, dtype=torch.int32, device=key.device)
    too_near = (at >= before[:, None] * size) & (at < after[:, None] * size)
    near = torch.where(too_near, windows(first[:, None], OUTSIDE), OUTSIDE)
    return QueryBlocks(begin, before, after, document, near, windows(in_bfloat16(key), 0))


def near_span(config: DGAConfig) -> int:
    """How far from a query block the tokens reach, on either side, that it may not open."""
    (rows, size), beyond = config.block_size, config.window - 1
    return beyond + max((r - beyond) % size for r in range(0, size, math.gcd(rows, size)))


def _positions(around: QueryBlocks, rows: int) -> Tensor:
    """(T, I) int32, where the queries stand."""
    index = torch.arange(rows, dtype=torch.int32, device=around.begin.device)
    return around.begin[:, None] + index


def far_units(first_query: Tensor, config: DGAConfig) -> tuple[Tensor, Tensor]:
    """Which units a query block may open: how many before it, and those from this one on after it.

    They are those that the whole block sees through their slots. Causal attention has none after.
    """
    rows, size = config.block_size
    before = (first_query - config.window + 1).clamp(min=0) // size
    return before, -(-(first_query + rows + config.window - 1) // size)


def log_mass(far: Tensor, near: Tensor) -> Tensor:
    """(...) float32, the log of all the mass that each query sees.

    Args:
        far: (..., N) from `far_log_mass`; -inf for units that the query may not open.
        near: (...) log mass of what is not far.
    """
    # One pass over the units, in place of the two that finding their maximum would take.
    base = torch.where(near > -math.inf, near, 0.0)
    beyond = torch.exp((far - base[..., None]).clamp(max=BEYOND)).sum(-1)
    return base + torch.log(beyond + torch.exp(near - base))


def served(
    want: Tensor, share: Tensor, count: int, *, turns: bool, already: Tensor | None = None
) -> Tensor:
    """(..., N) bool: the `count` units that a query block may open, of all that it asks for.

    Args:
        want: (..., C, N) bool, what each query asks for.
        share: (..., C, N) of the query's attention, at most 1.
        count: `DGAConfig.open_units`.
        turns: who asks first is served first, and among those who ask together the larger share;
            otherwise the larger share of all. Of equal ones the older unit.
        already: (..., N) bool, units that are open: they keep their place.
    """
    if turns:
        share = share - torch.arange(want.shape[-2], device=want.device)[:, None]
    rank = torch.where(want, share, -math.inf).amax(-2)
    if already is not None:
        rank = rank.masked_fill(already, math.inf)
    # Scores of 8 bits tie: then the older unit, in prefill and decode alike.
    age = torch.arange(rank.shape[-1], dtype=torch.float64, device=rank.device)
    rank = rank.double() - age * 2**-40
    best = rank.topk(min(count, rank.shape[-1]), dim=-1).indices
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)


def openings(
    query: Tensor,
    around: QueryBlocks,
    units: Units,
    *,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
    far: Tensor | None = None,
    columns: Columns | None = None,
) -> Tensor:
    """From which query on each of these query blocks sees each unit raw.

    Args:
        query: (B, H, T·I, D) of the query blocks.
        around: these blocks.
        units: the first N units, at least as far as these blocks may open them.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
        far: (B, H, T·I, N) from `far_log_mass`, where it is known already.
        columns: of these blocks, where units far away are weighed together.

    Returns:
        (B, H, T, N) int32, of columns (B, H, T, W + M), NEVER where the unit stays closed. In
        `prompt` scope all queries of the document in a block see what it opens.
    """
    rows = config.block_size[0]
    document = around.document.amax(-1)
    if columns is not None:
        open_to = torch.cat([columns.may, columns.may_coarse], -1)
        far = column_log_mass(query, units.key, columns, config, scale)
    else:
        number = torch.arange(units.first.shape[-1], dtype=torch.int32, device=query.device)
        far_TN = number < around.before[:, None]
        if not is_causal:
            far_TN = far_TN | (number >= around.after[:, None])
        open_to = far_TN & (units.first[:, None, None] == document[..., None])
        if far is None:
            beyond = units_beyond(around.before, config) if is_causal else None
            far = far_log_mass(query, units.key, config, scale, beyond)
    far = far.float().unflatten(2, (around.begin.shape[0], rows))
    allowed = far.masked_fill(stored_mask(open_to)[..., None, :] < 0, -math.inf)
    near = near_log_mass(query, around, config=config, is_causal=is_causal, scale=scale)
    # Queries of a document that ends in the block ask for nothing: no share of theirs is large.
    asks = around.document == document[..., None]
    total = log_mass(allowed, torch.where(asks, near, torch.finfo(near.dtype).max))
    least = math.log(config.open_mass) if config.open_mass else -math.inf
    # Stored, or a GPU's compiler would store the wishes, query by query: twice the scores.
    want = far > stored(total + least)[..., None]
    if config.scope == "prompt":
        at = torch.maximum(around.begin[:, None], document[..., None])
    else:
        at = _positions(around, rows)
    since = torch.where(want, at[..., None], NEVER).amin(3)
    since = torch.where(open_to, since, NEVER)
    if config.open_units is not None:
        share, turns = torch.exp(allowed - total[..., None]), config.scope == "causal"
        want = want & open_to[..., None, :]
        since = torch.where(served(want, share, config.open_units, turns=turns), since, NEVER)
    return since
