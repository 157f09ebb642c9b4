"""What a sharded attention call sends and takes: formulas, to be checked and then carried further.

Bytes follow from the configuration, but for the opened units, whose share is measured; seconds are
arithmetic over speed plus bytes over bandwidth, nothing overlapping.
"""

from __future__ import annotations

import dataclasses

from flexdga import DGAConfig
from flexdga.estimates import LANDMARKS
from flexdga.focal import focal_capacity
from flexdga.parallel.shards import before, beyond, chunk_size
from flexdga.planner import group_slots_per_unit

from .workloads import Shape

ASSUMPTIONS = (
    "One document; two chunks for each rank. Queries ask other ranks for the same share of their "
    "units at any length and any number of ranks as measured, and open the same share of the past.",
    "Arithmetic: estimates of units (4·D for each query, KV unit and query head), and the kernel "
    "(4·D for each entry of the window, of slots and of what is open). Pooling, masks and copies "
    "count as nothing; the speed that is achieved pays for them.",
    "A call takes its arithmetic over the speed, and then its bytes over the bandwidth: nothing "
    "overlaps, and latencies count as nothing.",
)


@dataclasses.dataclass(frozen=True)
class Open:
    """What was seen to be opened.

    Attributes:
        units: bytes of units that a rank sent, as a share of what all-gathered keys and values
            would have cost it.
        entries: score entries of open units, as a share of dense causal attention's.
    """

    units: float
    entries: float


def all_gathered(shape: Shape, length: int, world: int, itemsize: int) -> float:
    """Bytes that a rank sends if all keys and values go everywhere; ring attention sends as many.

    In a ring each block is passed on world - 1 times, which is what an all-gather does.
    """
    tokens = length / world
    return (world - 1) * tokens * shape.batch * shape.kv_heads * 2 * shape.head_dim * itemsize


def bytes_sent(
    shape: Shape, length: int, world: int, itemsize: int, config: DGAConfig, opened: Open
) -> dict[str, float]:
    """Bytes that a rank sends for a call, by what they are (as `parallel.traffic`).

    Of each kind as many as the rank that sends most of it: with more than two ranks, the one that
    sends sinks sends less of the raw window.

    Raises:
        ValueError: the whole prompt chooses focal tokens, and the text how they spread over chunks.
    """
    if config.scope == "prompt" and config.needs_importance:
        raise ValueError(
            f"config: focal slots of a chunk depend on the text where the whole prompt chooses; "
            f"expected scope='causal', got {config!r}"
        )
    chunk = chunk_size(length, 2 * world, [config])
    tokens, heads = 2 * chunk, shape.batch * shape.kv_heads
    token = 2 * shape.head_dim * itemsize  # a key and a value
    slots = 2 * slots_of(chunk, config)
    # The first and the last rank send one end of their chunks to others: what follows the other is
    # nothing, or their own.
    ends = 1 if world == 2 else 2
    sent: dict[str, float] = {"raw window": ends * before(config) * heads * token}
    if config.only_sinks:  # raw, and all of them the first rank's
        size = config.block_size[1]
        ranks = world - 1 - (before(config) >= chunk)  # the second chunk may stand right behind
        sent["sinks"] = ranks * -(-config.sinks // size) * size * heads * token
    else:
        sent["intervals"] = (world - 1) * slots * heads * 12.0
        sent["slots"] = (world - 1) * slots * heads * token
    if beyond(config):
        rows = shape.batch * (shape.heads + shape.kv_heads) * shape.head_dim * itemsize
        sent["lookahead"] = ends * beyond(config) * rows
    if config.group_bias == "mass":
        sent["bias"] = (world - 1) * slots * heads * 4.0
    if config.opens:
        units = tokens // config.block_size[1]
        numbers = 2 + LANDMARKS if config.open_by == "landmarks" else config.block_size[1]
        feature = numbers * shape.head_dim * 2.0  # in bfloat16
        sent["features of units"] = (world - 1) * units * heads * feature
        sent["requests"] = (world - 1) * world * units * heads
        sent["opened units"] = opened.units * all_gathered(shape, length, world, itemsize)
    return sent


def slots_of(tokens: int, config: DGAConfig) -> int:
    """Slots, dead ones included, that a chunk is sent as."""
    groups = tokens // config.unit_size * group_slots_per_unit(config)
    return focal_capacity(tokens // config.step, config) + groups


def arithmetic(shape: Shape, length: int, config: DGAConfig, opened: Open) -> float:
    """Floating-point operations of a call over the whole sequence."""
    past = length / 2
    entries = config.window + sum(config.block_size) / 2
    entries += past * (slots_of(length, config) / length + opened.entries)
    estimates = past / config.block_size[1] if config.opens else 0.0
    return 4 * shape.head_dim * shape.batch * shape.heads * length * (entries + estimates)
