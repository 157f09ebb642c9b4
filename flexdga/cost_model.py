"""From which length on DGA is expected to be faster than dense attention: counts of work, weighed.

The unit of time is one score entry of SDPA's causal kernel, at a head_dim of 64: at float32 on one
thread of a CPU, or in half precision on a GPU. `dense_time` counts such entries; `work` counts what
a call of DGA does, by kind, and `WEIGHTS` says how many entries each kind is worth. Only these
ratios matter, which differ less from machine to machine than times do.

Weights of a CPU were fitted to CPU time of one thread (Intel Xeon with AVX-512 and AMX, torch 2.13,
random tensors of 1024 to 8192 tokens), and what is another for CPUs without AMX to an AMD EPYC with
AVX-512: bench/NOTES.md has them beside what was measured. Those of a GPU come from an H100: what
SDPA and the kernel take was measured, what planning takes follows from the bytes that it moves, and
a call's own time from its launches. So DGA counts twice there (`DOUBT`), and waits too long rather
than not long enough.
"""

from __future__ import annotations

import bisect
import functools
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flexdga import cpu_kernel
from flexdga.estimates import LANDMARKS, NEAR, SEGMENT
from flexdga.scratch import scores_held

if TYPE_CHECKING:
    from flexdga.config import DGAConfig

WEIGHTS = {
    "cpu": {
        "entries": 1.2, "blocks": 110.0, "near": 5.2, "units": 0.6, "landmarks": 0.8,
        "keys": 0.48, "one_pass": 0.095, "probes": 7.0, "tokens": 53.0,
    },
    "cuda": {
        "entries": 6.5, "blocks": 0.0, "near": 19.0, "units": 6.5, "landmarks": 4.2,
        "keys": 2.5, "one_pass": 0.0, "probes": 4.0, "tokens": 1000.0,
    },
}  # fmt: skip
CALL = {"cpu": 1_000_000.0, "cuda": 3_600_000_000.0}
"""Entries of SDPA's that each kind of `work` takes as long as, and a call's own, on one thread
whatever there are: Python and small operations. An entry is 1.9 ns, on a GPU 0.53 ps. Other devices
than a CPU are taken for GPUs."""
WIDE = {"cpu": 0.9, "cuda": 0.72}
"""The part of an entry of SDPA's that grows with head_dim."""
NEAR_KEYS = 8
"""What a key too near to open counts in one pass (`cpu_planning.py`), in keys that are weighed."""
BOXED_KEYS = 0.3
"""What a key of a unit known by its box counts there."""
CAUSAL_PROBES, HIDING = 0.6, 2.4
"""What a probe's score takes in `causal` scope, and the kernel's where openings hide slots, over
those that `WEIGHTS` has."""
HALF = {
    "tiles": {"dense": 0.43, "DGA": 0.9},
    "bytes": {"dense": 1.0, "DGA": 1.15},
    "floats": {"dense": 1.0, "DGA": 1.15},
}
"""What half precision leaves of both times, by `cpu_kernel.products`: measured in bfloat16."""
ONE_PASS = {"tiles": 1.0, "bytes": 1.5, "floats": 6.2}
"""What a key in one pass takes, over `WEIGHTS`, by the same."""
DIAGONAL = 512
"""Keys in a block of SDPA's, of which it computes those on the diagonal whole."""
OPENED = {"landmarks": 0.24, "exact": 1.4}
"""Units that a query block opens of a long past, by `1 / open_mass - 1`; of one that is not much
longer than what that makes it opens less. `landmarks`: SmolLM2-135M reading English, 7 layers.
`exact`: numbers at random, so that DGA is chosen where it is faster even for these; text opens .2,
and gains from 1100 tokens on where these do from 3000."""
DOUBT = 2.0
"""DGA's weight on a GPU."""
STEPS_GAIN = 4096
"""Tokens below which decode steps over slots are slower than dense ones: about as many by the
default configuration, fewer by groups, some 8000 by `exact`."""
STEP, LONGEST = 32, 1 << 20
"""Lengths that are tried: multiples, and none longer."""


class Case(NamedTuple):
    """What times depend on besides the config and the length.

    Of a batch it is one row: more rows share what a call costs once, and may stay dense a little
    too long.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    threads: int
    products: str = "tiles"


def dense_below(config: DGAConfig, query: Tensor, key: Tensor, *, decodes: bool = False) -> int:
    """`config.dense_below`, or what is expected to be right where that is None.

    A compiler that traces it finds a constant: lengths may be symbols, and the comparison with it
    stays one of a length and a number.

    Args:
        config: the choices.
        query: (B, H, L, D); L plays no part.
        key: (B, Hkv, L, D).
        decodes: whether the text goes on token by token, whose steps gain later than a prompt.
    """
    given = _given(config)
    if given is not None:
        return given
    found = _expected(config, *_parts(query, key))
    return max(found, STEPS_GAIN) if decodes else found


def case_of(query: Tensor, key: Tensor) -> Case:
    """That of (B, H, L, D) queries and (B, Hkv, L, D) keys, here and now."""
    return _here(_parts(query, key))


def _parts(query: Tensor, key: Tensor) -> tuple[Any, ...]:
    # Compilers take heads for symbols too: here they are numbers.
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    sizes = operator.index(heads), operator.index(kv_heads), operator.index(head_dim)
    return *sizes, query.dtype, query.device.type


def _here(parts: tuple[Any, ...]) -> Case:
    heads, kv_heads, head_dim, dtype, device = parts
    sizes = heads, kv_heads, head_dim
    return Case(*sizes, dtype, device, torch.get_num_threads(), cpu_kernel.products())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _given(config: DGAConfig) -> int | None:
    return config.dense_below


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _expected(config: DGAConfig, *parts: Any) -> int:
    return break_even(config, _here(parts))


@functools.lru_cache(4096)
def break_even(config: DGAConfig, case: Case) -> int:
    """The length from which on `dga_time` is less than `dense_time`; `LONGEST` if it is not."""
    tried = range(STEP, LONGEST, STEP)
    slower = bisect.bisect_left(
        tried, True, key=lambda length: dga_time(config, case, length) < dense_time(case, length)
    )
    return STEP * (slower + 1)


def dense_time(case: Case, length: int) -> float:
    """Of SDPA over a causal sequence, in entries of one thread."""
    entries, wide = case.heads * length * (length + DIAGONAL) / 2, WIDE[_kind(case)]
    each = 1 - wide + wide * case.head_dim / 64
    return entries * each * _half(case)["dense"] / _threads(case)


def dga_time(config: DGAConfig, case: Case, length: int) -> float:
    """Of `dga_attention` planning and attending, in the same unit."""
    counts = work(config, case, length)
    device = _kind(case)
    total = sum(WEIGHTS[device][kind] * count for kind, count in counts.items())
    total = CALL[device] + total * _half(case)["DGA"] / _threads(case)
    return total if device == "cpu" else DOUBT * total


def work(config: DGAConfig, case: Case, length: int) -> dict[str, float]:
    """What a call of `dga_attention` does, by kind.

    - entries, blocks: that the kernel computes and visits.
    - near: scores of keys too near to open. units: that queries weigh; landmarks, keys: of these.
    - one_pass: keys that `cpu_planning.py` weighs, as long as AMX takes for one.
    - probes: scores of the probes.
    - tokens: rows of 64 numbers of query, key and value, that are copied.
    """
    rows, columns = config.block_size
    seen = keys_seen(config, length)
    del seen["far"]
    queries, wide = case.heads * length, (1 + case.head_dim / 64) / 2
    keys = queries * sum(seen.values())
    exact = config.open_by == "exact"
    one_pass = exact and case.device == "cpu" and config.open_units is None
    # Of queries, weighed together:
    stretch = scores_held(case.device) / queries * (1 if exact else columns)
    weighed = queries * (length + min(stretch, length)) / 2 * wide * config.opens
    known = NEAR[config.open_by] + SEGMENT / 2  # tokens before a query known by more than boxes
    near = length / 2 if length < known else known - known**2 / (2 * length)
    unread = queries * (length / 2 - near) * (1 - BOXED_KEYS) * wide * config.opens
    probed = float(config.probes)
    if config.scope == "causal":  # each unit has its own, which look at it and what is near
        probed *= CAUSAL_PROBES * (1 + config.window / config.unit_size)
    # Slots of open units hide, which the kernel has to find out entry by entry.
    hiding = HIDING if config.opens and not config.only_sinks else 1.0
    too_near = queries * (rows + config.window) * wide * config.opens
    return {
        "entries": keys * wide * hiding,
        "blocks": keys / (rows * columns),
        "near": too_near * (not one_pass),
        "units": weighed / columns * (not one_pass),
        "landmarks": queries * near * wide * config.opens * (not exact) / columns * LANDMARKS,
        "keys": weighed * (exact and not one_pass),
        "one_pass": (weighed - unread + NEAR_KEYS * too_near) * one_pass * ONE_PASS[case.products],
        "probes": queries * probed * config.needs_importance,
        "tokens": (case.heads + 2 * case.kv_heads) * length * case.head_dim / 64,
    }


def keys_seen(config: DGAConfig, length: int) -> dict[str, float]:
    """Keys in the blocks that a query's kernel visits, by section: the mean over the queries.

    `far` are those that lie behind the raw window, of which the sections after it are made.
    """
    rows, columns = config.block_size
    by_unit = config.opens or config.scope == "causal"
    behind = max(config.window - 1, 0)
    if config.groups and not by_unit:
        behind += config.group_size
    whole = max(columns, config.unit_size) if by_unit else columns
    near = rows + -(-behind // whole) * whole
    far = _past(length, near)
    focal, groups = config.focal_ratio, 0.0
    if config.focal_budget is not None:
        focal = min(config.focal_budget / length, 1.0)
    if config.groups:
        groups = (1 - focal) / config.group_size
    opened = 0.0
    if config.opens:
        units = OPENED[config.open_by] * (1 / max(config.open_mass, 1e-6) - 1)
        most = columns * min(units, config.open_units or units)
        opened = most * far / (most + far)
    # Over a prompt importance prefers what is old, which all queries see.
    old = far - _past(length, near + focal * length)
    return {
        "far": far,
        "near": (length + rows) / 2 - _past(length, near - rows / 2),
        "sinks": min(columns, far) * (config.only_sinks and config.sinks > 0),
        "focal": (focal * far if config.scope == "causal" else old) + columns / 2 * (focal > 0),
        "groups": groups * far + columns / 2 * (groups > 0),
        "opened": opened,
    }


def _past(length: int, gap: float) -> float:
    """Keys that lie more than `gap` tokens before a query, the mean over a sequence's queries."""
    return max(length - gap, 0) ** 2 / (2 * length)


def _half(case: Case) -> dict[str, float]:
    half = case.dtype.itemsize == 2 and case.device == "cpu"
    return HALF[case.products] if half else {"dense": 1.0, "DGA": 1.0}


def _threads(case: Case) -> int:
    return case.threads if case.device == "cpu" else 1


def _kind(case: Case) -> str:
    return "cpu" if case.device == "cpu" else "cuda"
