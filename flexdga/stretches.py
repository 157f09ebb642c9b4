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
from flexdga.cpu_planning import decides, openings_on_cpu
from flexdga.estimates import (
    LANDMARKS,
    NEAR,
    SEGMENT,
    Units,
    box_of,
    landmarks_of,
    near_log_scores,
    products,
    unit_documents,
    unit_features,
    units_beyond,
)
from flexdga.opening import QueryBlocks, openings, surroundings
from flexdga.plan import NEVER, Documents
from flexdga.saying import warn_once
from flexdga.scratch import scores_held

Run = Callable[..., Any]


def open_table(
    query: Tensor,
    key: Tensor,
    docs: Documents,
    *,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
    run: Run,
    alone: bool = False,
) -> Tensor:
    """`openings` of a whole sequence, a stretch of queries at a time: (B, H, L / I, L / U).

    Inside a compiler it is one stretch, whose scores of units take B·H·L·N numbers (of keys, by
    `exact`, B·H·L²); on a GPU, one for each KV head, of B·(H / Hkv)·L·N: thousands of tokens are
    enough to keep it busy.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        docs: the documents.
        config: the choices.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
        run: how to call `openings`.
        alone: whether what is made here has to run without flexdga, and so without its operators.
    """
    if not alone and decides(query, config):
        home = unit_documents(docs.first, config)
        made = openings_on_cpu(
            query, key, docs, home, near=(NEAR["exact"], SEGMENT), config=config,
            is_causal=is_causal, scale=scale,
        )  # fmt: skip
        return _as_cat(made) if torch.compiler.is_compiling() else made
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
    pieces: _Features | None = None
    beyond: list[int] = []  # units that each query block weighs by their boxes alone

    def table(first: int, end: int, reach: int) -> Tensor:
        """Of the query blocks [first, end), and of `reach` units."""
        keys = reach * per_unit if pieces is None else 0  # those in pieces are weighed here
        some = Units(units.key[:, :, :keys], units.first[:, :reach])
        inputs = _copied(
            (query[:, :, first * rows : end * rows], around.of(slice(first, end)), some)
        )
        far = None
        if pieces is not None:
            far = pieces.weighed(inputs[0], beyond[first], reach, scale)
        made: Tensor = run(
            openings, *inputs, config=config, is_causal=is_causal, scale=scale, far=far
        )
        return made

    coarsens = is_causal and not all_fine(past + blocks * rows, config)
    if torch.compiler.is_compiling():
        if config.open_by == "exact":
            _say_at_once()
        if query.device.type != "cpu":
            alone = functools.partial(openings, config=config, is_causal=is_causal, scale=scale)
            return torch.cat([alone(*head) for head in each_head(query, around, units)], 1)
        made = table(0, blocks, count)
        return _as_cat(made)
    per_query, beyond = units.key.shape[2] if config.open_by == "exact" else count, [0] * blocks
    if config.open_by == "landmarks" and query.device.type == "cpu":
        pieces = _Features(units, config, run)
        beyond = units_beyond(around.before, config).tolist() if is_causal else beyond
    each = 16 if pieces is None else pieces.each
    if pieces is not None:
        per_query = max(count, pieces.scores)
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
    per_block = query.shape[:2].numel() * rows * per_query
    for begin, after in itertools.pairwise(_where_it_changes(beyond[:blocks])):
        number = min((after - begin) * per_block // held, (after - begin) // 2)
        number = max(number, 1)
        cuts = (begin + i * (after - begin) // number for i in range(number + 1))
        for first, end in itertools.pairwise(cuts):
            # Units that no block of the stretch can open are left out, in whole multiples.
            reach = min(-(-(past + end * rows) // size // each) * each, count)
            reach = reach if is_causal else count
            whole[:, :, first:end, :reach] = table(first, end, reach)
    return whole


def _as_cat(table: Tensor) -> Tensor:
    """The kernel's mask captures it, and Inductor takes the result of a `cat` as it is."""
    return torch.cat([table[:, :, :1], table[:, :, 1:]], 2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say_at_once() -> None:
    warn_once(
        "flexdga: a program compiled ahead, or not for CPU, holds the scores of all queries and "
        "keys of a layer at once with open_by='exact', two bytes each; over long texts "
        "DGAConfig.auto(..., open_by='landmarks') takes a fraction of that, and is faster there"
    )


def _where_it_changes(values: list[int]) -> list[int]:
    """The indices from which on the value is another, and the end of all."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return [*starts, len(values)]


class _Features:
    """Units by their features, for `landmarks`.

    Args:
        units: all that there are.
        config: the choices.
        run: how to call `near_log_scores`.
    """

    def __init__(self, units: Units, config: DGAConfig, run: Run) -> None:
        self.run = run
        self._features, self._dim = units.key, units.key.shape[3] // (2 + LANDMARKS)
        self._near: tuple[int, int] = (0, 0)  # the units that these are of:
        self._box = self._landmarks = units.key
        size = config.block_size[1]
        self.each = SEGMENT // size
        near = (NEAR["landmarks"] + SEGMENT) // size
        self.scores = LANDMARKS * min(units.first.shape[1], near) // 2

    def weighed(self, query: Tensor, beyond: int, reach: int, scale: float) -> Tensor:
        """`far_log_mass` of queries (B, H, C, D), and of the first `reach` units: in bfloat16."""
        if self._near != (beyond, reach):
            near = self._features[:, :, beyond:reach]
            self._box = box_of(near, self._dim).contiguous()
            self._landmarks = landmarks_of(near, self._dim)
            self._near = (beyond, reach)
        far, rows = self.run(near_log_scores, query, self._box, self._landmarks, scale=scale)
        if beyond:
            old = products(rows, box_of(self._features[:, :, :beyond], self._dim))
            far = torch.cat([old, far], -1)
        return far.view(*query.shape[:3], reach)


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
