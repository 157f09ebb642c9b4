"""Coarser the farther: of a long past, what is far away is weighed and opened in larger pieces.

A query block with more than `DGAConfig.coarse_beyond` tokens to open from weighs each unit of the
last quarter of so many tokens by itself, and those before them `COARSE` at a time, by the mean of
their estimates. What it weighs then hardly grows with the length. flexdga's choice, measured in
bench/RESEARCH.md.

What query blocks weigh are columns: W units by themselves, then all M coarse ones.

Shape suffixes as in `opening.py`, and S chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexdga.config import COARSE, DGAConfig
from flexdga.estimates import (
    LANDMARKS,
    Units,
    best_landmarks,
    box_of,
    far_log_mass,
    landmarks_of,
    products,
    query_features,
    whole_of,
)
from flexdga.plan import NEVER
from flexdga.saying import warn_once

CHUNK = 8
"""Query blocks that share a window of units: products with more rows run faster."""


class Columns(NamedTuple):
    """What query blocks weigh where units far away are weighed together.

    Attributes:
        at: (S, W) int32, which units stand in the first W columns of a chunk of query blocks; None:
            all N, in order.
        may: (B, 1, T, W) bool, what of that each query block may open.
        may_coarse: (B, 1, T, M) bool, and which coarse units.
        coarse: (B, Hkv, M, 2D), `Units.key` of these.
    """

    at: Tensor | None
    may: Tensor
    may_coarse: Tensor
    coarse: Tensor


def all_fine(length: int, config: DGAConfig) -> bool:
    """Whether causal queries among so many tokens weigh all units by themselves.

    Inside compilers they do, which is said once: what Inductor (torch 2.13) makes of the other way
    writes beyond its memory on CPU.
    """
    if not config.coarsens:
        return True
    assert config.coarse_beyond is not None
    if torch.compiler.is_compiling():
        if not statically_known_true(length <= config.coarse_beyond):
            _say_fine(config.coarse_beyond)
        return True
    return length <= config.coarse_beyond


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say_fine(beyond: int) -> None:
    warn_once(
        "flexdga: a compiled program weighs units far away one by one: of texts longer than "
        f"coarse_beyond={beyond} it may open others than dga_attention does outside of a compiler"
    )


def first_fine(before: Tensor, config: DGAConfig) -> Tensor:
    """(T,) int32: the first unit that a query block weighs by itself, of those it may open.

    Args:
        before: (T,) int32, how many these are.
        config: `coarse_beyond`, `block_size`.
    """
    assert config.coarse_beyond is not None
    far = (before - _span(config)) // COARSE * COARSE
    return torch.where(before * config.block_size[1] > config.coarse_beyond, far, 0)


def _span(config: DGAConfig) -> int:
    assert config.coarse_beyond is not None
    return config.coarse_beyond // 4 // config.block_size[1]


def width(config: DGAConfig) -> int:
    """W of chunks; the last of so many columns is open to none of its query blocks."""
    rows, size = config.block_size
    return _span(config) + COARSE + -(-CHUNK * rows // size)


def coarse_units(units: Units) -> Units:
    """`COARSE` units each as one: the mean of the boxes of those of its latest document.

    Two more than there are whole ones, the last of which are never weighed: compilers take a size
    of 0 or 1 for a constant.
    """
    count, dim = units.first.shape[1], units.key.shape[-1] // (2 + LANDMARKS)
    room = (count // COARSE + 2) * COARSE - count
    first = F.pad(units.first, (0, room), value=NEVER).unflatten(1, (-1, COARSE))
    key = F.pad(box_of(units.key, dim), (0, 0, 0, room)).unflatten(2, (-1, COARSE))
    latest = torch.where(first == NEVER, -1, first).amax(-1)
    mine = first == latest[..., None]
    number = mine.sum(-1).clamp(min=1)
    # Others are left out by `where`: they may hold what is no number.
    total = torch.where(mine[:, None, ..., None], key, 0).sum(3, dtype=torch.float32)
    mean = total / number[:, None, :, None]
    return Units(mean.bfloat16(), torch.where(latest < 0, NEVER, latest))


def columns(
    before: Tensor,
    document: Tensor,
    first: Tensor,
    coarse: Units,
    config: DGAConfig,
    *,
    chunks: bool,
) -> Columns:
    """The columns of some query blocks.

    Args:
        before: (T,) int32 units that each may open.
        document: (B, 1, T) int32 for which it opens.
        first: (B, N) int32, `Units.first`.
        coarse: from `coarse_units` of all N.
        config: the choices.
        chunks: whether they are whole chunks of query blocks that weigh together.
    """
    least, here = first_fine(before, config), document[:, 0, :, None]
    if chunks:
        at = least[::CHUNK, None] + torch.arange(
            width(config), dtype=torch.int32, device=before.device
        )
        fine = at.repeat_interleave(CHUNK, 0)  # (T, W)
        home = first[:, fine.clamp(max=first.shape[1] - 1)]
    else:
        at = None
        fine = torch.arange(first.shape[1], dtype=torch.int32, device=before.device)
        home = first[:, None]
    may = (fine >= least[:, None]) & (fine < before[:, None]) & (home == here)
    number = torch.arange(coarse.first.shape[1], dtype=torch.int32, device=before.device)
    may_coarse = (number * COARSE < least[:, None]) & (coarse.first[:, None] == here)
    return Columns(at, may[:, None], may_coarse[:, None], coarse.key)


def column_log_mass(
    query: Tensor, key: Tensor, columns: Columns, config: DGAConfig, scale: float
) -> Tensor:
    """(B, H, T·I, W + M) `far_log_mass` of the columns, whether they may be opened or not.

    Args:
        query: (B, H, T·I, D), whole query blocks.
        key: `Units.key` of all N units.
        columns: of the query blocks.
        config: the choices.
        scale: of the scores.
    """
    if columns.at is None:
        both = [far_log_mass(query, units, config, scale) for units in (key, columns.coarse)]
        return torch.cat(both, -1)
    (batch, heads, count, head_dim), kv_heads = query.shape, key.shape[1]
    (chunks, wide), rep = columns.at.shape, heads // kv_heads
    together = columns.may.shape[2] // chunks * config.block_size[0]
    q_BGSRCD = query.view(batch, kv_heads, rep, chunks, together, head_dim).transpose(2, 3)
    rows = query_features(q_BGSRCD, scale).flatten(3, 4)
    window = key.index_select(2, columns.at.clamp(max=key.shape[2] - 1).flatten())
    window = window.unflatten(2, (chunks, wide))
    fine = best_landmarks(
        rows, whole_of(rows), box_of(window, head_dim), landmarks_of(window, head_dim)
    )
    coarse = products(rows.flatten(2, 3), columns.coarse)
    shape = (batch, kv_heads, chunks, rep, together)
    made = torch.cat([fine.view(*shape, wide), coarse.view(*shape, coarse.shape[-1])], -1)
    return made.transpose(2, 3).reshape(batch, heads, count, made.shape[-1])


def by_unit(
    since: Tensor,
    before: Tensor,
    document: Tensor,
    first: Tensor,
    config: DGAConfig,
    *,
    chunks: bool,
    packed: bool,
) -> Tensor:
    """(B, H, T, N) of what stands in columns, (B, H, T, W + M): a coarse unit's is its units'.

    Args:
        since: NEVER in columns that are closed.
        before: (T,) int32 units that each query block may open.
        document: (B, 1, T) int32 for which it opens.
        first: (B, N) int32, `Units.first`.
        config: the choices.
        chunks: as for `columns`.
        packed: whether a coarse unit may hold several documents, or padding before them.
    """
    count = first.shape[1]
    unit = torch.arange(count, dtype=torch.int32, device=since.device)
    least = first_fine(before, config)
    if not chunks:
        far = since[..., count:].repeat_interleave(COARSE, -1)[..., :count]
        far = torch.where(first[:, None, None] == document[..., None], far, NEVER)
        return torch.where(unit < least[:, None], far, since[..., :count])
    last = width(config) - 1
    start = least[::CHUNK].repeat_interleave(CHUNK)[:, None]
    near = (unit - start).clamp(0, last)
    column = torch.where(unit < least[:, None], last + 1 + unit // COARSE, near)
    if packed:  # a coarse unit is its latest document's alone
        column = torch.where(first[:, None] == document[:, 0, :, None], column, last)[:, None]
    return since.gather(-1, column.long().expand(*since.shape[:3], -1))
