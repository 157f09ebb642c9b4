"""How much of a query's attention a unit of far away tokens seems to hold.

Estimates are products of the query with what is known of each unit (`Units`): by `landmarks` six
vectors in place of its keys, by `exact` the keys.

Shape suffixes: B batch, H query heads, G KV heads, R query heads per KV head, C queries, N units, U
tokens of a unit, T query blocks, I queries of one, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexdga.config import DGAConfig
from flexdga.cpu_planning import best_keys_on_cpu, decides
from flexdga.indexing import stored_mask
from flexdga.plan import NEVER

Count = TypeVar("Count", int, Tensor)

LANDMARKS = 4
"""Keys of a unit that are known as they are: those farthest from its mean."""
BOX_SHARE = 0.225
"""How far the estimate of the others goes from their mean towards the corner of the box around them
that suits the query best. Both are measured on a real model: bench/RESEARCH.md."""
WHOLE_BOX_SHARE = 0.35
"""The same of a box around all keys of a unit."""

NEAR: dict[str, int] = {"landmarks": 4096, "exact": 6144}
SEGMENT = 2048
"""Causal queries know units by landmarks, or by all keys, in the `NEAR` tokens before the present
`SEGMENT` of so many, and in that, but older ones by their boxes alone: or planning would take three
times as long where it grows with the square of the length. Segments, so that many queries agree on
it."""
UNIT_NUMBERS = 1 << 22
"""Of keys, made to features at a time."""
BFLOAT16_ON_CPU: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU has fast bfloat16 products; float32 ones, rounded afterwards, are the same."""


class Units(NamedTuple):
    """What estimates need of each unit.

    Attributes:
        key: bfloat16, (B, Hkv, N, (2 + `LANDMARKS`)·D) features for `landmarks`; (B, Hkv, N·U, D)
            the keys for `exact`; (B, Hkv, N, 2D) for either are boxes alone.
        first: (B, N) int32 first token of the unit's document; NEVER if the unit holds padding or
            parts of two documents, and so never opens.
    """

    key: Tensor
    first: Tensor


def unit_features(key: Tensor, config: DGAConfig) -> Tensor:
    """Features of whole units of keys (B, Hkv, N·U, D), as `Units.key`."""
    if config.open_by == "exact":
        return in_bfloat16(key)
    units = key.float().unflatten(2, (-1, config.block_size[1]))
    if torch.compiler.is_compiling() or key.device.type != "cpu":
        return _landmarks_and_box(units)
    # As much at a time as stays in a cache.
    few = max(UNIT_NUMBERS // units[:, :, :1].numel(), 1)
    return torch.cat([_landmarks_and_box(some) for some in units.split(few, 2)], 2)


def _landmarks_and_box(units: Tensor) -> Tensor:
    """Features of (B, G, N, U, D) units."""
    mean, number = units.mean(3, keepdim=True), units.shape[3]
    # Squares of the distances from the mean, but for its own.
    away = torch.linalg.vector_norm(units, dim=-1).square() - 2 * (units @ mean.mT).squeeze(-1)
    farthest = away.topk(LANDMARKS, -1).indices[..., None].expand(-1, -1, -1, -1, units.shape[4])
    landmarks = units.gather(3, farthest)
    # With the mean in place of landmarks: in hardly any direction is that the others' utmost.
    others = units.scatter(3, farthest, mean.expand_as(landmarks))
    middle = (number * mean.squeeze(3) - landmarks.sum(3)) / (number - LANDMARKS)
    high = torch.lerp(middle, others.amax(3), BOX_SHARE)
    low = torch.lerp(middle, others.amin(3), BOX_SHARE)
    return in_bfloat16(torch.cat([high, low, landmarks.flatten(3)], -1))


def boxes(key: Tensor, config: DGAConfig) -> Tensor:
    """(B, Hkv, N, 2D) bfloat16, around all keys of each of the units (B, Hkv, N·U, D)."""
    units = in_bfloat16(key.float()).float().unflatten(2, (-1, config.block_size[1]))
    middle = units.mean(3)
    corners = (torch.lerp(middle, x, WHOLE_BOX_SHARE) for x in (units.amax(3), units.amin(3)))
    return in_eight_bits(torch.cat([*corners], -1), [3])


def unit_documents(first: Tensor, config: DGAConfig) -> Tensor:
    """(B, N) `Units.first` from the documents of (B, N·U) tokens."""
    units = first.unflatten(-1, (-1, config.block_size[1]))
    return torch.where(units.amin(-1) == units.amax(-1), units[..., 0], NEVER)


def units_beyond(before: Count, config: DGAConfig) -> Count:
    """How many units a causal query block knows by their boxes alone, of those `before` it."""
    size = config.block_size[1]
    far = before // (SEGMENT // size) * (SEGMENT // size) - NEAR[config.open_by] // size
    return far * (far > 0)


def far_log_mass(
    query: Tensor,
    units: Tensor,
    config: DGAConfig,
    scale: float,
    beyond: Tensor | None = None,
) -> Tensor:
    """(B, H, C, N) estimated log of Σ exp(score) over each unit's tokens, for every query.

    A unit counts as one token: what is worth opening stands out of its unit. For `exact` that is
    its best token: to sum them up takes several times as long, and a tenth less need be open then.
    For `landmarks` it is the best of these, or one somewhere between the mean of the other keys and
    the best corner of the box around them; counting the box's tokens opened more and found less.

    Scores are bfloat16 products, whatever the dtype of the query, and rounded to bfloat16: a few
    per cent of a unit's mass, of which `open_mass` is a rough bound, for an eighth of the time. For
    `exact` queries and keys are `in_eight_bits` first: no worse on a real model
    (bench/RESEARCH.md).

    Args:
        query: (B, H, C, D).
        units: `Units.key`.
        config: `open_by`, `block_size`.
        scale: of the scores.
        beyond: `units_beyond` of blocks of equally many queries; None: all are near.
    """
    by_box = None
    if units.shape[-1] == query.shape[3]:
        best = _best_of_keys(query, units, config, scale)
        all_near = units.shape[2] < NEAR["exact"] + SEGMENT
        if beyond is not None and not statically_known_true(all_near):
            by_box = products(_signed_rows(query, units, config, scale), boxes(units, config))
    else:
        weigh = _of_few if query.shape[2] == 1 else _of_many
        by_box, near = weigh(_signed_rows(query, units, config, scale), units, query.shape[3])
        best = by_box if near is None else torch.maximum(near, by_box)
    if beyond is not None and by_box is not None:
        best = _old_by_box(best, by_box, beyond, query)
    return best.reshape(*query.shape[:3], best.shape[-1]).float()


def _best_of_keys(query: Tensor, key: Tensor, config: DGAConfig, scale: float) -> Tensor:
    """(B, G, R·C, N) bfloat16, the best score of each unit's keys (B, G, N·U, D)."""
    size, (batch, kv_heads) = config.block_size[1], key.shape[:2]
    if not torch.compiler.is_compiling() and decides(query, config):
        best = best_keys_on_cpu(query, key.bfloat16(), config=config, scale=scale)
        return best.view(batch, kv_heads, -1, best.shape[-1])
    rows = in_matrices(in_eight_bits(query * scale, [3]), kv_heads)
    if query.shape[2] == 1:  # keys are rows here, so that none need be moved
        key = in_eight_bits(key.unflatten(2, (-1, size)), [3, 4]).flatten(2, 3)
        return products(key, rows).unflatten(2, (-1, size)).amax(3).mT
    return best_keys(rows, by_place(key, size))


def _signed_rows(query: Tensor, units: Tensor, config: DGAConfig, scale: float) -> Tensor:
    """Queries as boxes want them: for `exact` in eight bits, as these boxes are."""
    if config.open_by == "exact":
        rows = _signed(in_eight_bits(query * scale, [3]))
    else:
        rows = query_features(query, scale)
    return in_matrices(rows, units.shape[1])


def _old_by_box(best: Tensor, by_box: Tensor, beyond: Tensor, query: Tensor) -> Tensor:
    """The estimates by box of units that a block knows by nothing else, the best of others."""
    (_, heads, count, _), blocks, kv_heads = query.shape, beyond.shape[0], best.shape[1]
    number = torch.arange(best.shape[-1], dtype=torch.int32, device=best.device)
    known = stored_mask(number >= beyond[:, None])[:, None] == 0
    shape = best.shape[0], kv_heads, heads // kv_heads, blocks, count // blocks, best.shape[-1]
    return torch.where(known, best.view(shape), by_box.view(shape)).view(best.shape)


def near_log_scores(
    query: Tensor, box: Tensor, landmarks: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Estimates by `landmarks`: (B, G, R·C, N) bfloat16; and the (B, G, R·C, 2D) `query_features`.

    Args:
        query: (B, H, C, D).
        box: (B, G, N, 2D) `box_of` units.
        landmarks: (B, G, `LANDMARKS`·N, D) `landmarks_of` them.
        scale: of the scores.
    """
    rows = in_matrices(query_features(query, scale), box.shape[1])
    whole = in_matrices(in_bfloat16(query * scale), box.shape[1])
    return best_landmarks(rows, whole, box, landmarks), rows


def best_landmarks(rows: Tensor, query: Tensor, box: Tensor, landmarks: Tensor) -> Tensor:
    """(..., R, N) bfloat16 estimates by `landmarks`.

    Args:
        rows: (..., R, 2D) `query_features`.
        query: (..., R, D) `whole_of` them.
        box: (..., N, 2D) `box_of` units.
        landmarks: (..., `LANDMARKS`·N, D) `landmarks_of` them.
    """
    best = products(query, landmarks).unflatten(-1, (LANDMARKS, box.shape[-2])).amax(-2)
    return torch.maximum(best, products(rows, box))


def whole_of(rows: Tensor) -> Tensor:
    """The queries (..., R, D) in bfloat16 whose positive and negative parts are (..., R, 2D)."""
    positive, negative = rows.chunk(2, -1)
    return positive + negative


def _of_many(rows: Tensor, units: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """(B, G, R, N) bfloat16 estimates by boxes, and by landmarks where features have any.

    Args:
        rows: (B, G, R, 2D) `query_features`.
        units: (B, G, N, ·) features.
        dim: D.
    """
    box = products(rows, box_of(units, dim))
    if units.shape[-1] == 2 * dim:
        return box, None
    score = products(whole_of(rows), landmarks_of(units, dim))
    return box, score.unflatten(-1, (LANDMARKS, units.shape[2])).amax(-2)


def _of_few(rows: Tensor, units: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """The same for a few rows: features are read once, where they are."""
    if units.shape[-1] == 2 * dim:
        return products(rows, units.float()), None
    vectors = units.unflatten(-1, (-1, dim)).flatten(-3, -2).float()
    halves = rows.unflatten(-1, (2, dim)).flatten(-3, -2).float()
    score = (halves @ vectors.mT).unflatten(-2, (-1, 2))
    above, below = score.unflatten(-1, (units.shape[-2], -1)).unbind(-3)
    box = in_bfloat16(above[..., 0] + below[..., 1])
    return box, in_bfloat16((above[..., 2:] + below[..., 2:]).amax(-1))


def box_of(features: Tensor, dim: int) -> Tensor:
    """(..., N, 2D) of (..., N, 2D or more) features."""
    return features[..., : 2 * dim]


def landmarks_of(features: Tensor, dim: int) -> Tensor:
    """And (..., `LANDMARKS`·N, D): the first ones of all units, the second, ..."""
    vectors = features[..., 2 * dim :].unflatten(-1, (LANDMARKS, dim))
    return vectors.transpose(-3, -2).flatten(-3, -2)


def in_matrices(rows: Tensor, kv_heads: int) -> Tensor:
    """(B, G, R·C, D) of (B, H, C, D): the queries that share keys, in one matrix.

    It costs nothing where the rows are in memory, as what a `cat` gives is. Where Inductor would
    compute them here, it would divide to find R and C, for every number.
    """
    batch, heads, count, width = rows.shape
    return rows.reshape(batch, kv_heads, heads // kv_heads * count, width)


def query_features(query: Tensor, scale: float) -> Tensor:
    """bfloat16 queries as boxes want them: (..., 2D), positive parts and negative ones.

    q·corner = Σ max(q_d high_d, q_d low_d), the corner being the best one for this query.
    """
    return _signed(in_bfloat16(query * scale))


def _signed(rows: Tensor) -> Tensor:
    return torch.cat([rows.clamp(min=0), rows.clamp(max=0)], -1)


def by_place(key: Tensor, size: int) -> Tensor:
    """(B, G, U, N, D) of (B, G, N·U, D) `in_eight_bits`: first keys of all units, second, ..."""
    number = key.shape[2] // size
    return in_eight_bits(key.unflatten(2, (number, size)), [3, 4]).transpose(2, 3).contiguous()


def best_keys(rows: Tensor, key: Tensor) -> Tensor:
    """(..., R, N) bfloat16 score of the best of each unit's keys.

    Args:
        rows: (..., R, D) bfloat16.
        key: (..., U, N, D) bfloat16, so that the maximum runs over whole vectors of units.
    """
    score = products(rows, key.flatten(-3, -2))
    return score.unflatten(-1, key.shape[-3:-1]).amax(-2)


def products(rows: Tensor, units: Tensor) -> Tensor:
    """(..., R, N) bfloat16 of bfloat16 rows and units, or of units of such numbers in float32."""
    in_float32 = rows.device.type == "cpu" and not BFLOAT16_ON_CPU
    if in_float32 or units.dtype == torch.float32:
        return in_bfloat16(rows.float() @ units.float().mT)
    return rows @ units.mT


def in_bfloat16(x: Tensor) -> Tensor:
    """`x.bfloat16()`, even where a compiler would keep more bits.

    On CPU Inductor (torch 2.13) leaves out a rounding where float32 numbers follow in its kernel.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype != torch.bfloat16:
        x = x.float()
        bits = x.view(torch.int32)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -(1 << 16)
        x = torch.where(x == x, even.view(torch.float32), x)
    return x.bfloat16()


def in_eight_bits(x: Tensor, dims: list[int]) -> Tensor:
    """`in_bfloat16`, but of integers up to 127 times a power of two, one for all along `dims`.

    Products of such numbers are exact wherever they are summed up in float32, and in whatever
    order, so that every device and every road opens the same units. CPUs multiply them fastest.
    Where a number is infinite or none, all that share its power are none.
    """
    x = in_bfloat16(x.float()).float()
    most = x.abs().amax(dims, keepdim=True).clamp(min=2.0**-100)
    step = (most.view(torch.int32) & 0x7F800000).view(torch.float32) / 64
    return ((x / step).round().clamp(-127, 127) * step).bfloat16()
