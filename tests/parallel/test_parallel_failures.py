"""A rank that stalls or dies gives the others an error that names it, and in time."""

from __future__ import annotations

import parallel_work
import pytest
from helpers import by_landmarks, small
from ranks import Ranks

SHAPE = (1, 2, 2, 300, 32)
TIMEOUT = 4.0
LATE = 1
"""The rank that is missing."""


@pytest.mark.parametrize(
    ("config", "decode"),
    [(small(scope="causal"), False), (by_landmarks(), True)],
    ids=["attention", "decoding"],
)
def test_a_rank_that_stalls_is_named(ranks, config, decode):
    found = ranks.run(parallel_work.stall, config, SHAPE, LATE, TIMEOUT, False, decode)
    check(found)
    # When it comes at last, it is told that the others gave up.
    missing, message, _ = found[LATE][0]
    assert missing == [] and "every other rank gave up on this call" in message


def test_a_rank_that_dies_is_named():
    pool = Ranks(3)
    try:
        arguments = (small(scope="causal"), SHAPE, LATE, TIMEOUT, True, False)
        check(pool.run(parallel_work.stall, *arguments, lost=[LATE]))
    finally:
        pool.stop()


def check(found) -> None:
    for rank, reply in enumerate(found):
        if rank == LATE:
            continue
        result, error = reply
        assert error is None, error
        missing, message, seconds = result
        assert missing == [LATE] and f"rank {LATE} never came to it" in message
        assert seconds < TIMEOUT + 3.5  # the grace of `failures.py`, and a busy machine
