"""Sinks where nothing else has slots: raw, as in one process, sent to whoever sees them later.

A document's first tokens are seen by all of it. Documents alone say which ranks that concerns, so
nobody has to ask. Where other tokens have slots, sinks have them too (`slots.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.focal import is_sink
from flexdga.indexing import take
from flexdga.parallel.shards import Shards, before
from flexdga.parallel.slots import queries_before
from flexdga.plan import NEVER, Documents


def sinks_asked(docs: Documents, shards: Shards, config: DGAConfig) -> Tensor:
    """(W, B, N) bool: the units with sinks that each rank's queries see, and it does not hold."""
    size, head = config.block_size[1], before(config)
    row, at = is_sink(docs, config).nonzero().unbind(1)
    after = docs.after[row, at]
    asked = torch.zeros(
        shards.world, docs.first.shape[0], shards.total // size, dtype=torch.bool, device=at.device
    )
    for rank in range(shards.world):
        seen = queries_before(after, shards, rank) > queries_before(at, shards, rank)
        for number in shards.numbers_of(rank):
            begin = number * shards.size
            seen = seen & ((at < begin - head) | (at >= begin + shards.size))
        asked[rank, row[seen], at[seen] // size] = True
    return asked


def with_sinks(
    start: Tensor, end: Tensor, at: Tensor, alone: Tensor, docs: Documents, shards: Shards,
    config: DGAConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Intervals in which all of a document sees its sinks, each in one place.

    Args:
        start: (B, Hkv, R) int32, the first of this rank's queries that sees each raw token.
        end: (B, Hkv, R) int32, the first that does not any more.
        at: (B, Hkv, R) int32, where the tokens stand in the sequence; negative for none.
        alone: (B, Hkv, R) bool, whether the token is no second copy.
        docs: of the whole sequence.
        shards: how it is cut.
        config: the choices.
    """
    sink, after = (
        take(t[:, None].expand(-1, at.shape[1], -1), at)
        for t in (is_sink(docs, config), docs.after)
    )
    sink = sink & (at >= 0)
    first, stop = queries_before(at, shards), queries_before(after, shards)
    seen = alone & (first < stop)
    return (
        torch.where(sink, torch.where(seen, first, NEVER), start),
        torch.where(sink, torch.where(seen, stop, 0), end),
    )
