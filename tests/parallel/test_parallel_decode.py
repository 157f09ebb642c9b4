"""Decoding after a sharded prefill against one process, which other tests hold to the oracle."""

from __future__ import annotations

import dataclasses

import parallel_work
import pytest
import torch
from helpers import TOLERANCE, by_landmarks, small

from flexdga import DGAConfig
from flexdga.parallel import ShardedCache

DEFAULT = by_landmarks()
OPEN_GROUPS = small(
    scope="causal", unit_size=16, open_units=4, open_mass=0.01, open_by="landmarks",
    group_bias="mass", group_weights="importance",
)  # fmt: skip
STEPS = (1,) * 36 + (40, 1, 1)
"""New tokens at a time: past several handovers, and a stretch over several query blocks."""
WINDING = (1,) * 12 + (50, -60, 1, 20, [1, 0], 1, 1, 40, -30, [0, 0], 1, 1)
"""Poolings taken back with their tokens, sequences in another order, and one of them twice."""


def ended(length: int) -> torch.Tensor:
    """Documents that end before the prompt does, and padding on the left."""
    ids = torch.stack([torch.arange(length) // 170, torch.zeros(length, dtype=torch.long)])
    ids[1, :40] = -1
    return ids


@pytest.mark.parametrize(
    ("world", "config", "shape", "arguments", "opens"),
    [
        pytest.param(2, DEFAULT, (1, 6, 2, 500, 32), {}, True, id="default"),
        pytest.param(4, DEFAULT, (2, 2, 2, 501, 32), {"ids": ended(501)}, True, id="documents"),
        pytest.param(4, OPEN_GROUPS, (1, 6, 2, 333, 32), {}, True, id="open groups"),
        pytest.param(
            4, OPEN_GROUPS, (1, 6, 2, 400, 32), {"dtype": torch.bfloat16}, True, id="bfloat16"
        ),
        pytest.param(2, small(scope="causal"), (1, 6, 2, 333, 32), {}, False, id="groups"),
        pytest.param(
            2, small(scope="causal", group_weights="last_query"), (1, 2, 2, 333, 32),
            {"int8": True}, False, id="int8 slots",
        ),
        pytest.param(
            2, by_landmarks(dense_below=340), (1, 2, 2, 333, 32), {}, True, id="dense, then sparse"
        ),
        pytest.param(
            4, small(grouping="similarity", focal_ratio=0.1), (1, 6, 2, 333, 32), {}, False,
            id="focal, whole prompt",
        ),
        pytest.param(2, DGAConfig.dense(), (1, 2, 2, 333, 32), {}, False, id="dense"),
        pytest.param(
            4, DEFAULT, (2, 6, 2, 500, 32), {"steps": WINDING}, True, id="winding"
        ),
        pytest.param(
            2, dataclasses.replace(OPEN_GROUPS, keep_raw="int8"), (2, 2, 2, 500, 32),
            {"steps": WINDING, "ids": ended(500)}, True, id="winding, raw tokens in int8",
        ),
        pytest.param(
            4, by_landmarks(keep_raw="cpu"), (1, 6, 2, 333, 32), {}, True,
            id="raw tokens in host memory",
        ),
        pytest.param(
            4, dataclasses.replace(OPEN_GROUPS, keep_raw="none"), (1, 6, 2, 333, 32), {}, False,
            id="no raw tokens",
        ),
        pytest.param(
            2, by_landmarks(dense_below=340), (2, 2, 2, 333, 32), {"steps": WINDING}, True,
            id="winding, dense, then sparse",
        ),
    ],
)  # fmt: skip
def test_equals_one_process(ranks, world, config, shape, arguments, opens):
    names = {"steps": STEPS, "dtype": torch.float32, "ids": None, "int8": False}
    steps, dtype, *others = (names | arguments).values()
    found = ranks.results(parallel_work.decoded, world, config, shape, steps, dtype, *others)
    # Both sides differ from the oracle by at most the tolerance.
    limit = 2 * TOLERANCE[dtype]
    for errors, opened in found:
        assert max(errors) < limit, errors
        assert (opened > 0) == opens


def test_raw_tokens_are_spread_over_ranks(ranks):
    for (kept, dense, _), (alone, whole, _) in ranks.results(
        parallel_work.memory, DEFAULT, (1, 2, 2, 2000, 32)
    ):
        assert dense == whole
        # A quarter of the keys and values, 3/32 for features, what is open, window, room to grow.
        assert kept < 0.5 * alone, (kept, alone)


def test_ranks_that_open_different_units_are_found(ranks):
    for error, _ in ranks.run(parallel_work.decode_apart, DEFAULT, (1, 6, 2, 512, 32), 2):
        assert isinstance(error, RuntimeError)
        assert "ranks do not open the same units" in str(error)


def test_what_a_cache_refuses(ranks):
    with pytest.raises(ValueError, match="config: open_by='exact' estimates by all keys"):
        ShardedCache(DGAConfig(open_by="exact"), None)
    for *raised, of_mod in ranks.results(parallel_work.misused, DEFAULT, (1, 2, 2, 100, 32)):
        assert of_mod.startswith("score_mod: a sharded cache takes none")
        words = ("got 100 tokens", "record_past=True", "got DGAConfig(", "got LayerCache")
        assert len(raised) == len(words)
        for message, word in zip(raised, words):
            assert message.startswith("cache: expected") and word in message
