"""A sharded call that is not dense: exchange, decide, ask, attend; a few KV heads at a time.

Before anything is decided, ranks send for all KV heads what each needs of the others in any case.
While the units that some heads open are asked for, the next heads are decided on.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexdga.attention import run_kernel
from flexdga.by_blocks import Choices
from flexdga.compress import Slots
from flexdga.config import DGAConfig
from flexdga.cpu_backward import wants_gradient
from flexdga.folding import folded, parts_of, unfolded
from flexdga.indexing import put
from flexdga.kernel import attend_slots
from flexdga.parallel.decoding import Prefilled, ShardedCache
from flexdga.parallel.focal import whole_focal
from flexdga.parallel.gradient import attend_given_on_cpu, joined_slots
from flexdga.parallel.local_plan import Held, held_units, local_plan
from flexdga.parallel.opened import (
    Fetched,
    features_of,
    fetch,
    needed,
    open_units,
    requests,
    start_features,
    start_requests,
)
from flexdga.parallel.shards import Shards
from flexdga.parallel.sinks import sinks_asked
from flexdga.parallel.slots import Gathered, gather_slots
from flexdga.parallel.surroundings import Ends, around, ends_of, plan_around, start_ends
from flexdga.plan import Documents, Plan


class _Sent(NamedTuple):
    """What ranks send of all KV heads before anything is decided: rows as those of `folded`.

    Attributes:
        ends: of the neighbours' chunks.
        features: of all units (rows, 1, N, ·), or None.
        sinks: the units with them, where no other slots are made; or None.
    """

    ends: Ends
    features: Tensor | None
    sinks: Fetched | None

    def of(self, part: slice) -> _Sent:
        """Those of some rows."""
        return _Sent(self.ends.of(part), *_some((self.features, self.sinks), part))


class _Decided(NamedTuple):
    """What is known of some rows while others are asked for the units that these open."""

    query: Tensor
    key: Tensor
    value: Tensor
    docs: Documents
    sent: _Sent
    plan: Plan
    slots: Gathered | None
    held: Held
    since: Tensor | None
    asked: Tensor | None


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ids: Tensor | None,
    docs: Documents,
    shards: Shards,
    config: DGAConfig,
    scale: float,
    cache: ShardedCache | None,
) -> Tensor:
    """`parallel_attention` of a sequence that is not too short, with KV heads as rows of a batch.

    Args:
        query: (B, H, C·n, D).
        key: (B, Hkv, C·n, D).
        value: (B, Hkv, C·n, Dv).
        ids: (B, L) of the whole sequence, or None.
        docs: of it, with its padding.
        shards: how it is cut.
        config: the choices.
        scale: of the scores.
        cache: to fill, or None.
    """
    kv_heads = key.shape[1]
    rows = folded(query, key, value, docs, None)[:4]
    sent = _exchanged(rows[0], rows[1], rows[2], docs, shards, config)

    def decided(part: slice) -> _Decided:
        query, key, value, docs = _some(rows, part)
        return _decided(query, key, value, docs, sent.of(part), shards, config, scale)

    if cache is not None or wants_gradient(None, query, key, value):
        job = decided(slice(None))
        out = _attended(job, shards, config, scale)
        if cache is not None:
            made = unfolded(_for_a_cache(job, shards, config, scale), kv_heads)
            cache.begin(query, key, value, ids, shards, made, scale)
        return out.view(*query.shape[:3], -1)
    blocks = shards.local_length // config.block_size[0]
    table = blocks * (shards.total // config.block_size[1])
    parts = list(parts_of(query, kv_heads, table))
    out = query.new_empty(*rows[0].shape[:3], value.shape[-1])
    coming = decided(parts[0])
    for part, following in itertools.zip_longest(parts, parts[1:]):
        job = coming
        if following is not None:
            coming = decided(following)
        _attended(job, shards, config, scale, out[part])
    return out.view(*query.shape[:3], -1)


def _exchanged(
    query: Tensor, key: Tensor, value: Tensor, docs: Documents, shards: Shards, config: DGAConfig
) -> _Sent:
    """Of rows as `folded` makes them, and the documents of the batch."""
    features = start_features(key, shards, config) if config.opens else None
    ends = start_ends(query, key, value, shards, config)
    sinks = None
    if config.only_sinks:
        asked = sinks_asked(docs, shards, config)
        asked = asked.repeat_interleave(key.shape[0] // docs.first.shape[0], 1)[:, :, None]
        sinks = fetch(key, value, asked, shards, config, "sinks")
    if features is not None:
        features = features_of(features, shards)
    return _Sent(ends_of(ends, shards), features, sinks)


def _decided(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents,
    sent: _Sent,
    shards: Shards,
    config: DGAConfig,
    scale: float,
) -> _Decided:
    """Plan some rows, exchange their slots, and ask for what they open."""
    made = not config.only_sinks
    chunks = around(query, key, value, sent.ends, docs, shards, config, slots=made)
    whole = slots = since = asked = None
    if config.scope == "prompt" and config.needs_importance:
        whole = whole_focal(query, key, value, docs, shards, config, scale)
    plan = plan_around(chunks, docs, shards, config, scale, whole, slots=made)
    if made:
        slots = gather_slots(chunks, plan, docs, shards, config, scale, whole)
        chunks = chunks._replace(query=query[:, :, :0], value=value[:, :, :0])  # read no more
    held = held_units(shards, chunks.head, config.block_size[1], key).and_fetched(sent.sinks)
    if sent.features is not None:
        since = open_units(query, chunks, sent.features, docs, shards, config, scale)
        need = needed(since, key.shape[1])
        home = put(torch.zeros_like(need, dtype=torch.bool), held.find(), held.alone)
        asked = start_requests(need & ~home, shards)
    return _Decided(query, key, value, docs, sent, plan, slots, held, since, asked)


def _attended(
    job: _Decided, shards: Shards, config: DGAConfig, scale: float, out: Tensor | None = None
) -> Tensor:
    """Attention of some rows, when what they open has come; to `out` if there is one."""
    fetched = [] if job.sent.sinks is None else [job.sent.sinks]
    held = job.held
    if job.asked is not None:
        opened = fetch(job.key, job.value, requests(job.asked), shards, config, "opened units")
        held = held.and_fetched(opened)
        fetched.append(opened)
    ends = _by_rank(job.sent.ends.head)
    head = ends.shape[2] // shards.count
    plan = local_plan(job.plan, job.slots, held, job.since, job.docs, shards, config, head)
    head_keys, head_values = ends.split([job.key.shape[-1], job.value.shape[-1]], -1)
    keys = [job.key, head_keys, *(some.key for some in fetched)]
    values = [job.value, head_values, *(some.value for some in fetched)]
    return _attend(job.query, keys, values, job.slots, plan, config, scale, out)


def _for_a_cache(job: _Decided, shards: Shards, config: DGAConfig, scale: float) -> Prefilled:
    """What a cache begins with: it has slots for sinks too."""
    plan, slots, head = job.plan, job.slots, job.sent.ends.head.shape[3]
    if slots is None:
        chunks = around(
            job.query, job.key, job.value, job.sent.ends, job.docs, shards, config, slots=True
        )
        plan = plan_around(chunks, job.docs, shards, config, scale, slots=True)
        slots = gather_slots(chunks, plan, job.docs, shards, config, scale)
    return Prefilled(head, plan, slots, job.sent.features, job.since)


def _attend(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    slots: Gathered | None,
    plan: Plan,
    config: DGAConfig,
    scale: float,
    out: Tensor | None,
) -> Tensor:
    """The kernel over raw keys and values, in parts, and then the gathered slots."""

    def kernel(query: Tensor, made: Slots, plan: Plan) -> Tensor:
        return run_kernel(
            attend_slots, query, made, plan,
            block_size=config.block_size, scale=scale, score_mod=None, kernel_options=None,
        )  # fmt: skip

    if slots is None:
        made = [keys[0][:, :, :0], values[0][:, :, :0]]
    else:
        made = [slots.key, slots.value, *([] if slots.bias is None else [slots.bias])]
    on_cpu = query.device.type == "cpu"
    gradient = wants_gradient(None, query, *keys, *values, *made)
    if on_cpu and (query.dtype == torch.float64 or gradient):
        choices = Choices(
            config.group_weights, config.group_bias == "mass", config.block_size, scale, None
        )
        key, value = torch.cat(keys, 2), torch.cat(values, 2)
        whole = attend_given_on_cpu(kernel, query, key, value, made, plan, choices)
        return whole if out is None else out.copy_(whole)
    if gradient:
        return kernel(query, joined_slots(keys, values, made), plan)
    out = query.new_empty(*query.shape[:3], values[0].shape[-1]) if out is None else out
    # On CPU a row at a time: its copies of keys and values are most of what a call holds.
    count = 1 if on_cpu else len(query)
    with torch.no_grad():  # one compilation, whoever calls
        for first in range(0, len(query), count):
            some = _some((query.detach(), keys, values, made, plan), slice(first, first + count))
            out[first : first + count] = kernel(some[0], joined_slots(*some[1:4]), some[4])
    return out


def _by_rank(x: Tensor) -> Tensor:
    """(C, B, H, n, D) to (B, H, C·n, D)."""
    return x.movedim(0, 2).flatten(2, 3)


def _some(tree: Any, rows: slice) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, operator.itemgetter(rows), tree)
