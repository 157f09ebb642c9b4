"""How much of a query's attention a unit of far away tokens seems to hold.

Estimates are products of the query with what is known of each unit (`Units`): by `box` two vectors
in place of its keys, by `exact` the keys.

Shape suffixes: B batch, H query heads, G KV heads, R query heads per KV head, C queries, N units, U
tokens of a unit, T query blocks, I queries of one, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.plan import NEVER

BOX_SHARE = 0.3
"""How far a unit's estimate goes from its mean key towards the corner of the box around its keys
that suits the query best. Measured on a real model: bench/RESEARCH.md."""

BFLOAT16_ON_CPU: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU has fast bfloat16 products; float32 ones, rounded afterwards, are the same."""


class Units(NamedTuple):
    """What estimates need of each unit.

    Attributes:
        key: bfloat16, (B, Hkv, N, 2D) features for `box`, (B, Hkv, N·U, D) the keys for `exact`.
        first: (B, N) int32 first token of the unit's document; NEVER if the unit holds padding or
            parts of two documents, and so never opens.
    """

    key: Tensor
    first: Tensor


def unit_features(key: Tensor, config: DGAConfig) -> Tensor:
    """Features of whole units of keys (B, Hkv, N·U, D), as `Units.key`."""
    if config.open_by == "exact":
        return key.bfloat16()
    units = key.unflatten(2, (-1, config.block_size[1]))
    middle = (1 - BOX_SHARE) * units.mean(3)
    high = BOX_SHARE * units.amax(3) + middle
    low = BOX_SHARE * units.amin(3) + middle
    return torch.cat([high, low], -1).bfloat16()


def unit_documents(first: Tensor, config: DGAConfig) -> Tensor:
    """(B, N) `Units.first` from the documents of (B, N·U) tokens."""
    units = first.unflatten(-1, (-1, config.block_size[1]))
    return torch.where(units.amin(-1) == units.amax(-1), units[..., 0], NEVER)


def far_log_mass(query: Tensor, units: Tensor, config: DGAConfig, scale: float) -> Tensor:
    """(B, H, C, N) estimated log of Σ exp(score) over each unit's tokens, for every query.

    A unit counts as one token: what is worth opening stands out of its unit. For `exact` that is
    its best token: to sum them up takes several times as long, and a tenth less need be open then.
    For `box` it is one somewhere between the mean key and the best corner of the box; counting
    the box's tokens opened more and found less.

    Scores are bfloat16 products, whatever the dtype of the query, and rounded to bfloat16: a few
    per cent of a unit's mass, of which `open_mass` is a rough bound, for an eighth of the time.

    Args:
        query: (B, H, C, D).
        units: `Units.key`.
        config: `open_by`, `block_size`.
        scale: of the scores.
    """
    rows = in_matrices(query_features(query, scale, config), units.shape[1])
    if config.open_by == "box":
        far = products(rows, units)
    elif query.shape[2] == 1:  # keys are rows here, so that none need be moved
        far = products(units.bfloat16(), rows).unflatten(2, (-1, config.block_size[1]))
        far = far.amax(3).mT
    else:
        far = best_keys(rows, by_place(units, config.block_size[1]))
    return far.reshape(*query.shape[:3], far.shape[-1]).float()


def in_matrices(rows: Tensor, kv_heads: int) -> Tensor:
    """(B, G, R·C, D) of (B, H, C, D): the queries that share keys, in one matrix.

    It costs nothing where the rows are in memory, as what a `cat` gives is. Where Inductor would
    compute them here, it would divide to find R and C, for every number.
    """
    batch, heads, count, width = rows.shape
    return rows.reshape(batch, kv_heads, heads // kv_heads * count, width)


def query_features(query: Tensor, scale: float, config: DGAConfig) -> Tensor:
    """bfloat16 queries as `Units.key` wants them: (..., D), or (..., 2D) for `box`."""
    rows = (query * scale).bfloat16()
    if config.open_by == "box":
        # q·corner = Σ max(q_d high_d, q_d low_d), the corner being the best one for this query.
        return torch.cat([rows.clamp(min=0), rows.clamp(max=0)], -1)
    return rows


def by_place(key: Tensor, size: int) -> Tensor:
    """(B, G, U, N, D) bfloat16 of (B, G, N·U, D): the first keys of all units, the second, ..."""
    number = key.shape[2] // size
    return key.unflatten(2, (number, size)).transpose(2, 3).bfloat16().contiguous()


def best_keys(rows: Tensor, key: Tensor) -> Tensor:
    """(B, G, R, N) bfloat16 score of the best of each unit's keys.

    Args:
        rows: (B, G, R, D) bfloat16.
        key: (B, G, U, N, D) bfloat16, so that the maximum runs over whole vectors of units.
    """
    score = products(rows, key.flatten(2, 3))
    return score.unflatten(-1, key.shape[2:4]).amax(-2)


def products(rows: Tensor, units: Tensor) -> Tensor:
    """(..., R, N) bfloat16 of bfloat16 rows and units, or of units of such numbers in float32."""
    in_float32 = rows.device.type == "cpu" and not BFLOAT16_ON_CPU
    if in_float32 or units.dtype == torch.float32:
        return (rows.float() @ units.float().mT).bfloat16()
    return rows @ units.mT
