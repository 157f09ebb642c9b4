"""Openings of a whole sequence, a stretch of queries at a time, so that few estimates are held.

Units are weighed each by itself, or far away several at a time (`coarse.py`).

Shape suffixes as in `opening.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.coarse import (
    CHUNK,
    all_fine,
    by_unit,
    coarse_units,
    columns,
    width,
)
from flexdga.config import COARSE, DGAConfig
from flexdga.estimates import (
    Units,
    best_keys,
    by_place,
    in_matrices,
    query_features,
    unit_documents,
    unit_features,
)
from flexdga.opening import QueryBlocks, openings, surroundings
from flexdga.plan import NEVER, Documents
from flexdga.scratch import scores_held

Run = Callable[..., Any]
TOGETHER = 64
"""Units whose keys are weighed at a time."""


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

    Inside a compiler it is one stretch, whose scores of units take B·H·L·N numbers; on a GPU, one
    for each KV head, of B·(H / Hkv)·L·N: thousands of tokens are enough to keep it busy.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        docs: the documents.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
        run: how to call `openings`.
    """
    # On CPU they are a few large views and copies: not worth the seconds of a compilation.
    prepare = prepared if key.device.type == "cpu" else functools.partial(run, prepared)
    around, units = prepare(key, docs.first, config=config, is_causal=is_causal)
    return in_stretches(
        query, around, units, packed=docs.packed, config=config, is_causal=is_causal, scale=scale,
        run=run,
    )  # fmt: skip


def prepared(
    key: Tensor, first: Tensor, *, config: DGAConfig, is_causal: bool
) -> tuple[QueryBlocks, Units]:
    """What openings of a whole sequence are decided from."""
    units = Units(unit_features(key, config), unit_documents(first, config))
    return surroundings(key, first, config=config, is_causal=is_causal), units


def in_stretches(
    query: Tensor,
    around: QueryBlocks,
    units: Units,
    *,
    past: int = 0,
    packed: bool,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
    run: Run,
) -> Tensor:
    """`openings` of query blocks that follow each other: (B, H, T, N), a stretch at a time.

    Args:
        query: (B, H, T·I, D) of the query blocks.
        around: these blocks.
        units: all N that there are.
        past: tokens from the first unit's first to the first query.
        packed: whether a row may hold several documents.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
        run: how to call `openings`.
    """
    rows, size = config.block_size
    blocks, count = query.shape[2] // rows, units.first.shape[1]
    per_unit = units.key.shape[2] // count
    together: list[Tensor] = []  # keys, those of `TOGETHER` units in each; not in a compiler

    def table(first: int, end: int, reach: int) -> Tensor:
        """Of the query blocks [first, end), and of `reach` units."""
        keys = 0 if together else reach * per_unit  # those together are weighed here
        some = Units(units.key[:, :, :keys], units.first[:, :reach])
        inputs = _copied(
            (query[:, :, first * rows : end * rows], around.of(slice(first, end)), some)
        )
        far = None
        if together:
            alike = in_matrices(query_features(inputs[0], scale, config), units.key.shape[1])
            best = [run(best_keys, alike, key) for key in together[: -(-reach // TOGETHER)]]
            far = torch.cat(best, -1)[..., :reach].reshape(*inputs[0].shape[:3], reach)
        made: Tensor = run(
            openings, *inputs, config=config, is_causal=is_causal, scale=scale, far=far
        )
        return made

    coarsens = is_causal and not all_fine(past + blocks * rows, config)
    if torch.compiler.is_compiling():
        if query.device.type != "cpu":
            alone = functools.partial(openings, config=config, is_causal=is_causal, scale=scale)
            return torch.cat([alone(*head) for head in each_head(query, around, units)], 1)
        made = table(0, blocks, count)
        # The kernel's mask captures it, and Inductor takes the result of a `cat` as it is.
        return torch.cat([made[:, :, :1], made[:, :, 1:]], 2)
    per_query = count
    if config.open_by == "exact":
        per_query = max(count, TOGETHER * size // 2)
        room = F.pad(units.key, (0, 0, 0, -count % TOGETHER * size))
        together += [by_place(some, size) for some in room.split(TOGETHER * size, 2)]
    whole = around.begin.new_full((*query.shape[:2], blocks, count), NEVER)
    if coarsens:
        assert config.coarse_beyond is not None
        least = (config.coarse_beyond // size + 1) * size  # tokens to open from
        blocks = min(max(-(-(least + config.window - 1 - past) // rows), 0), blocks)
        if query.shape[2] > blocks * rows:
            rest = slice(blocks, None)
            whole[:, :, rest] = _long_past(
                query[:, :, blocks * rows :], around.of(rest), units, end=past + query.shape[2],
                packed=packed, config=config, scale=scale, run=run,
            )  # fmt: skip
    held = scores_held(query.device.type)
    parts = min(query.shape[:2].numel() * blocks * rows * per_query // held, blocks // 2)
    parts = max(parts, min(blocks, 1))
    for first, end in itertools.pairwise(i * blocks // max(parts, 1) for i in range(parts + 1)):
        # Units that no block of the stretch can open are left out, in whole multiples of few.
        reach = min(-(-(past + end * rows) // size // 16) * 16, count) if is_causal else count
        whole[:, :, first:end, :reach] = table(first, end, reach)
    return whole


def each_head(
    query: Tensor, around: QueryBlocks, units: Units
) -> Iterator[tuple[Tensor, QueryBlocks, Units]]:
    """What `openings` takes, a KV head at a time."""
    kv_heads = units.key.shape[1]
    near_keys, keys = around.near_key.split(1, 1), units.key.split(1, 1)
    for mine, near_key, key in zip(query.split(query.shape[1] // kv_heads, 1), near_keys, keys):
        yield mine, around._replace(near_key=near_key), units._replace(key=key)


def _long_past(
    query: Tensor,
    around: QueryBlocks,
    units: Units,
    *,
    end: int,
    packed: bool,
    config: DGAConfig,
    scale: float,
    run: Run,
) -> Tensor:
    """`in_stretches` of query blocks with a long past."""
    (rows, size), blocks = config.block_size, around.begin.shape[0]
    coarse, document = coarse_units(units), around.document.amax(-1)

    def table(first: int, after: int, reach: int, chunks: bool) -> Tensor:
        """Of the query blocks [first, after), and of `reach` coarse units."""
        of = slice(first, after)
        before, here = around.before[of], document[:, :, of]
        some = Units(coarse.key[:, :, :reach], coarse.first[:, :reach])
        made = columns(before, here, units.first, some, config, chunks=chunks)
        inputs = _copied((query[:, :, first * rows : after * rows], around.of(of), units, made))
        since = run(
            openings, *inputs[:3], config=config, is_causal=True, scale=scale, columns=inputs[3]
        )
        return by_unit(since, before, here, units.first, config, chunks=chunks, packed=packed)

    every = coarse.first.shape[1]
    if blocks < 2 * CHUNK:
        return table(0, blocks, every, False)
    chunks = blocks // CHUNK
    each = width(config) + every
    held = scores_held(query.device.type)
    parts = max(min(query.shape[:3].numel() * each // held, chunks // 2), 1)
    starts = [i * chunks // parts * CHUNK for i in range(parts)]
    whole = around.begin.new_empty((*query.shape[:2], blocks, units.first.shape[1]))
    for first, after in itertools.pairwise([*starts, chunks * CHUNK]):
        # Coarse units that no block of the stretch can open are left out.
        reach = min((end - (blocks - after) * rows) // (size * COARSE) + 2, every)
        whole[:, :, first:after] = table(first, after, reach, True)
    if blocks % CHUNK:  # some are made again: two chunks, for one would be compiled for itself
        rest = 2 * CHUNK
        whole[:, :, -rest:] = table(blocks - rest, blocks, every, True)
    return whole


def _copied(inputs: Any) -> Any:
    """Copies of slices, which would be compiled for strides that differ with the stretch."""
    return torch.utils._pytree.tree_map_only(Tensor, torch.Tensor.contiguous, inputs)
