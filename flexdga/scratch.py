"""How much a call holds at a time of what it needs only on the way: it depends on the device.

A CPU is fastest while that stays in its cache. A GPU is to be kept busy while Python launches what
comes next: a stretch of 2²² scores took an H100 0.1 ms and Python more than one.
"""

from __future__ import annotations

SCORES = {"cpu": 1 << 22}
"""Scores of units, or of keys, two bytes each."""
BLOCKS = {"cpu": 1 << 20}
"""Entries of a table of blocks, some twenty bytes each on the way to it. On CPU tensors of more
than 32 MiB come fresh from the system at every call, and empty."""
SCORES_ELSEWHERE, BLOCKS_ELSEWHERE = 1 << 28, 1 << 24


def scores_held(device: str) -> int:
    """Of `SCORES`, on a type of device."""
    return SCORES.get(device, SCORES_ELSEWHERE)


def blocks_held(device: str) -> int:
    """Of `BLOCKS`, on a type of device."""
    return BLOCKS.get(device, BLOCKS_ELSEWHERE)
