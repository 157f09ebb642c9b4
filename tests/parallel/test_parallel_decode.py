"""Decoding after a sharded prefill against one process, which other tests hold to the oracle."""

from __future__ import annotations

import parallel_work
import pytest
import torch
from helpers import TOLERANCE, small

from flexdga import DGAConfig

DEFAULT = DGAConfig(dense_below=0)
OPEN_GROUPS = small(
    scope="causal", unit_size=16, open_units=4, open_mass=0.01, group_bias="mass",
    group_weights="importance",
)  # fmt: skip
STEPS = (1,) * 36 + (40, 1, 1)
"""New tokens at a time: past several handovers, and a stretch over several query blocks."""


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
            2, DGAConfig(dense_below=340), (1, 2, 2, 333, 32), {}, True, id="dense, then sparse"
        ),
        pytest.param(2, DGAConfig.dense(), (1, 2, 2, 333, 32), {}, False, id="dense"),
    ],
)  # fmt: skip
def test_equals_one_process(ranks, world, config, shape, arguments, opens):
    names = {"dtype": torch.float32, "ids": None, "int8": False}
    dtype, *others = (names | arguments).values()
    found = ranks.results(parallel_work.decoded, world, config, shape, STEPS, dtype, *others)
    # Both sides differ from the oracle by at most the tolerance.
    limit = 2 * TOLERANCE[dtype]
    for errors, opened, _ in found:
        assert max(errors) < limit, errors
        assert (opened > 0) == opens
