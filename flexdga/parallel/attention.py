"""`parallel_attention`: each rank's queries over its own raw tokens and everybody's slots.

One plan for one call of the kernel: its raw section is this rank's tokens, the raw window before
each of its chunks, and the units of other ranks that its queries open; its other slots are those of
the whole sequence. Its queries are the first raw tokens, numbered as the rank holds them.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from flexdga.attention import _as_autocast, _without_autocast
from flexdga.checks import check_documents, check_inputs
from flexdga.config import BY_LANDMARKS, DGAConfig
from flexdga.cost_model import dense_below
from flexdga.cpu_backward import wants_gradient
from flexdga.parallel.decoding import ShardedCache
from flexdga.parallel.failures import watched
from flexdga.parallel.shards import Shards, before, beyond, whole_step
from flexdga.parallel.sparse import sparse_attention
from flexdga.parallel.surroundings import (
    by_chunk,
    whole_documents,
)
from flexdga.plan import Documents
from flexdga.spelling import spell


def parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shards: Shards,
    *,
    config: DGAConfig | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    cache: ShardedCache | None = None,
) -> Tensor:
    """Causal `dga_attention` of a sequence that is sharded over ranks; what it returns, sharded.

    Ranks exchange slots and what estimates need of units, the raw window before each chunk, and
    the raw units that their queries open: not the keys and values. Every rank of the group must
    call it, with the same arguments but for the shards. A sequence shorter than
    `config.dense_below` takes exact dense attention over gathered keys and values, as it does in
    `dga_attention`. Gradients flow through the collectives.

    Args:
        query: (B, H, shards.local_length, D), this rank's shard.
        key: (B, Hkv, shards.local_length, D).
        value: (B, Hkv, shards.local_length, Dv).
        shards: how the sequence is cut, and over which ranks.
        config: the choices; None = `DGAConfig.auto(0.15, open_by="landmarks")`, for by `exact` the
            keys of all would travel. Groups must end at a unit: those of `sequence` do in `causal`
            scope, or where units open.
        scale: of the scores; None = 1/√D.
        document_ids: (B, shards.length) of the whole sequence, as `dga_attention` takes them.
        cache: an empty one of this config and these ranks, to go on with: `cache.attend`.

    Returns:
        (B, H, shards.local_length, Dv); 0 for padding.

    Raises:
        ValueError: shapes or arguments do not fit together, the config plans over the whole
            prompt, or it is not the same on all ranks (found where a `Shards` first meets it).
            Or the cache is not empty, or not of this config and these ranks.
        TypeError: an argument is of the wrong type or dtype.
        RankError: a rank did not answer within the timeout of its process group.
    """
    if not isinstance(shards, Shards):
        raise TypeError(f"shards: expected Shards, got {type(shards).__name__}")
    config = BY_LANDMARKS if config is None else config
    if not isinstance(config, DGAConfig):
        raise TypeError(f"config: expected a DGAConfig, got {type(config).__name__}")
    query, key, value = _as_autocast(query, key, value)
    check_inputs(query, key, value, config, True, scale, None, None, None)
    below = dense_below(config, query, key, decodes=cache is not None)
    _check(query, document_ids, shards, config, shards.length < below)
    _check_cache(cache, shards, config)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    with watched(shards.group, "flexdga, parallel_attention"), _without_autocast(query.device.type):
        _agree(query, key, value, document_ids, shards, config, scale, cache, below)
        docs = whole_documents(document_ids, query.shape[0], shards, query.device)
        if shards.length < below:
            return _dense(query, key, value, document_ids, docs, shards, scale, cache)
        return sparse_attention(query, key, value, document_ids, docs, shards, config, scale, cache)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ids: Tensor | None,
    docs: Documents,
    shards: Shards,
    scale: float,
    cache: ShardedCache | None,
) -> Tensor:
    """Exact attention to everybody's keys and values."""
    both = by_chunk(torch.cat([key, value], -1), shards)
    every = funcol.wait_tensor(shards.gathered(both, "keys and values"))
    every = every.permute(1, 2, 0, 3, 4).flatten(2, 3)
    keys, values = every.split([key.shape[-1], value.shape[-1]], -1)
    if cache is not None:
        asked = query[:, :, :0]
        if cache.keeps_queries:
            asked = shards.gathered(by_chunk(query.detach(), shards), "queries")
            asked = funcol.wait_tensor(asked).permute(1, 2, 0, 3, 4).flatten(2, 3)
        whole = slice(shards.length)
        cache.begin_dense(asked[:, :, whole], keys[:, :, whole], values[:, :, whole], ids, scale)
    at = shards.positions(query.device)
    index = torch.arange(shards.total, device=query.device)
    first, after = docs.first[:, None], docs.after[:, None]
    start = torch.maximum(index.to(first), first)  # of the queries that see a key
    seen = (start <= at[:, None]) & (at[:, None] < after)
    # A row of padding sees itself, so that no backend has to divide by nothing; then it is zeroed.
    seen = seen | (at[:, None] == index)
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=seen[:, None], scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.masked_fill((docs.after[:, at] == 0)[:, None, :, None], 0)


def _check(
    query: Tensor, document_ids: Tensor | None, shards: Shards, config: DGAConfig, short: bool
) -> None:
    if query.shape[2] != shards.local_length:
        raise ValueError(
            f"query: expected a shard of {shards.local_length} tokens (Shards.shard makes it), got "
            f"{tuple(query.shape)}"
        )
    if document_ids is not None:
        check_documents(document_ids, (query.shape[0], shards.length))
    if not short and config.prefill == "dense":
        raise ValueError(
            "config: prefill='dense' needs all keys and values on every rank; expected 'sparse'"
        )
    if not short and config.groups and config.whole_sequence:
        raise ValueError(
            "config: in scope='prompt' groups in sequence, where no units open, run over the whole "
            f"prompt, which no rank has; expected scope='causal', got {config!r}"
        )
    need = max(before(config), beyond(config))
    if shards.size % whole_step(config) or shards.size < need:
        raise ValueError(
            f"config: its chunks are multiples of {whole_step(config)} of at least {need} tokens, "
            f"those of shards have {shards.size}; expected a config that Shards was made for"
        )


def _check_cache(cache: ShardedCache | None, shards: Shards, config: DGAConfig) -> None:
    if cache is None:
        return
    if not isinstance(cache, ShardedCache):
        raise TypeError(f"cache: expected a ShardedCache, got {type(cache).__name__}")
    if cache.seen or cache.record_past:
        raise ValueError(
            f"cache: expected an empty one that does not record its past (set record_past after "
            f"the prompt), got {cache.seen} tokens, record_past={cache.record_past}"
        )
    if cache.config != config or cache.group != shards.group:
        raise ValueError(
            f"cache: expected one of {config!r} and the ranks of the shards, got {cache.config!r}"
        )


def _agree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_ids: Tensor | None,
    shards: Shards,
    config: DGAConfig,
    scale: float,
    cache: ShardedCache | None,
    below: int,
) -> None:
    """Raise on every rank, the first time, if ranks do not call with the same things."""
    mine = {
        "config": spell(config),
        "dense_below": below,
        "length": shards.length,
        "chunk": shards.size,
        "balanced": shards.balanced,
        "query": [*query.shape],
        "key": [*key.shape],
        "value": [*value.shape],
        "dtype": str(query.dtype),
        "scale": scale,
        "document_ids": document_ids is not None,
        "cache": None if cache is None else [cache.int8, cache.max_length],
        "gradient": [wants_gradient(None, t) for t in (query, key, value)],
    }
    text = json.dumps(mine)
    if text in shards.agreed:
        return
    every: list[Any] = [None] * shards.world
    dist.all_gather_object(every, text, shards.group)
    for rank, other in enumerate(every):
        if other != every[0]:
            ours, theirs = json.loads(every[0]), json.loads(other)
            name = next(n for n in mine if ours[n] != theirs[n])
            raise ValueError(
                f"{name}: expected the same on all ranks, got {ours[name]} on rank "
                f"{dist.get_global_rank(shards.group, 0)} and {theirs[name]} on rank "
                f"{dist.get_global_rank(shards.group, rank)}"
            )
    shards.agreed.add(text)
