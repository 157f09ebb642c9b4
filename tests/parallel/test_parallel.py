"""Attention over shards against one process, which other tests hold against the oracle."""

from __future__ import annotations

import parallel_work
import pytest
import torch
from flexdga_bench.parallel_model import Open, bytes_sent
from flexdga_bench.workloads import Shape
from helpers import TOLERANCE, by_landmarks, small

from flexdga import DGAConfig
from flexdga.parallel import Shards, parallel_attention


def packed(length: int) -> torch.Tensor:
    """Documents that end inside chunks and inside units, and padding at either end and between."""
    ids = torch.stack([torch.arange(length) // 170, torch.arange(length) // 333])
    ids[1, :40] = -1
    ids[1, 333:360] = -1
    ids[0, -100:] = -1
    return ids


DEFAULT = by_landmarks()
CAUSAL = by_landmarks(scope="causal")
OPEN_GROUPS = small(
    scope="causal", unit_size=16, open_units=None, open_mass=0.01, open_by="landmarks",
    group_bias="mass", group_weights="importance",
)  # fmt: skip
PLAIN, GROUPED = (2, 2, 2), (1, 6, 2)


@pytest.mark.parametrize(
    ("config", "shape", "arguments"),
    [
        pytest.param(DEFAULT, (*GROUPED, 1000, 32), {}, id="default"),
        pytest.param(DGAConfig(dense_below=0), (*GROUPED, 500, 32), {}, id="exact"),
        pytest.param(DEFAULT, (*PLAIN, 1000, 32), {"ids": packed(1000)}, id="packed"),
        pytest.param(CAUSAL, (*PLAIN, 1000, 32), {"ids": packed(1000)}, id="packed, causal"),
        pytest.param(
            small(scope="causal", sinks=6), (*PLAIN, 500, 32), {"ids": packed(500)},
            id="more sinks than focal slots",
        ),
        pytest.param(
            small(scope="causal"), (1, 9, 3, 777, 40), {"dtype": torch.bfloat16}, id="bfloat16"
        ),
        pytest.param(DEFAULT, (*GROUPED, 500, 32), {"dtype": torch.bfloat16}, id="open, bfloat16"),
        pytest.param(DGAConfig.streaming_llm(window=64), (*PLAIN, 500, 32), {}, id="streaming"),
        pytest.param(DGAConfig.paper(scope="causal"), (*PLAIN, 900, 32), {}, id="paper"),
        pytest.param(
            DGAConfig.cca(scope="causal", window=100), (*PLAIN, 700, 32), {}, id="cca"
        ),
        pytest.param(
            small(scope="causal", grouping="similarity"), (*PLAIN, 500, 32), {}, id="similarity"
        ),
        pytest.param(DGAConfig.block_selection(open_units=3), (*GROUPED, 500, 32), {}, id="blocks"),
        pytest.param(
            DGAConfig.h2o(window=64), (*GROUPED, 1000, 32), {}, id="focal, whole prompt"
        ),
        pytest.param(
            small(grouping="similarity", group_weights="importance", sinks=6),
            (*PLAIN, 700, 32), {"ids": packed(700)}, id="focal tokens of whole documents",
        ),
        pytest.param(
            small(unit_size=16, open_units=2, importance="peak", probe_placement="tail"),
            (*GROUPED, 500, 32), {}, id="focal tokens beside open units",
        ),
        pytest.param(DEFAULT, (*PLAIN, 33, 32), {}, id="shorter than its ranks"),
        pytest.param(
            DGAConfig.streaming_llm(window=40, sinks=0), (*PLAIN, 500, 32), {}, id="no slots"
        ),
        pytest.param(
            by_landmarks(dense_below=None), (*PLAIN, 500, 32), {"ids": packed(500)}, id="dense"
        ),
    ],
)  # fmt: skip
def test_equals_one_process(ranks, config, shape, arguments):
    check(ranks, config, shape, **arguments)


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "in order"])
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process_however_it_is_cut(ranks, world, balanced):
    check(ranks, OPEN_GROUPS, (*GROUPED, 500, 32), world=world, balanced=balanced)


@pytest.mark.parametrize(
    ("config", "shape", "arguments"),
    [
        pytest.param(OPEN_GROUPS, (*GROUPED, 400, 32), {}, id="open groups"),
        pytest.param(OPEN_GROUPS, (*GROUPED, 400, 32), {"balanced": False}, id="in order"),
        pytest.param(CAUSAL, (*PLAIN, 500, 32), {"ids": packed(500)}, id="open"),
        pytest.param(
            small(scope="causal"), (*GROUPED, 400, 32), {"dtype": torch.bfloat16}, id="bfloat16"
        ),
        pytest.param(CAUSAL, (*PLAIN, 300, 32), {"dtype": torch.float64}, id="float64"),
        pytest.param(by_landmarks(dense_below=None), (*GROUPED, 300, 32), {}, id="dense"),
    ],
)  # fmt: skip
def test_gradients_equal_one_process(ranks, config, shape, arguments):
    check(ranks, config, shape, gradient=True, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("config", [CAUSAL, small(scope="causal")], ids=["open", "groups"])
def test_equals_one_process_compiled(ranks, config, gradient):
    for length in (700, 1500):
        check(ranks, config, (*GROUPED, length, 32), world=2, eager=False, gradient=gradient)


def check(ranks, config, shape, *, world=4, dtype=torch.float32, **arguments) -> None:
    found = ranks.results(
        parallel_work.equals_one_process, world, config, shape, dtype, *pairs(arguments)
    )
    # Both sides differ from the oracle by at most the tolerance; gradients are sums of as many
    # products again, of numbers that were rounded before.
    limit = 4 * TOLERANCE[torch.float32 if dtype == torch.float64 else dtype]
    for errors, _ in found:
        assert max(errors) < limit, errors


def pairs(arguments):
    names = {"ids": None, "balanced": True, "gradient": False, "eager": True}
    return (names | arguments).values()


def test_ranks_send_less_than_keys_and_values(ranks):
    shape = (1, 4, 2, 2000, 32)
    config = small(scope="causal", focal_ratio=0.0)
    for _, sent in ranks.results(parallel_work.equals_one_process, 4, config, shape, torch.float32):
        keys_and_values = 3 * 500 * 2 * 2 * 32 * 4  # to 3 ranks, 500 tokens of 2 heads
        assert 0 < sum(sent.values()) < keys_and_values / 4
        # Two chunks of 256 tokens, each with a slot for 8 of them and room for 4 sinks.
        slots = 3 * 2 * (256 // 8 + 4) * 2  # to 3 ranks, of 2 heads
        assert sent["slots"] == slots * 2 * 32 * 4 and sent["intervals"] == slots * 3 * 4


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "in order"])
@pytest.mark.parametrize("length", [1, 31, 1000, 1024])
def test_shards_hold_every_token_once(ranks, length, balanced):
    found = ranks.results(parallel_work.round_trip, length, small(), balanced)
    tokens = sorted(token for at, _, _ in found for token in at)
    assert tokens == list(range(len(tokens))) and len(tokens) >= length
    assert all(right and size % 32 == 0 for _, right, size in found)


def test_configs_that_differ_are_found_at_the_first_call(ranks):
    other = small(scope="causal", group_size=4)
    found = ranks.run(
        parallel_work.call_strangely, small(scope="causal"), {2: other}, (1, 2, 2, 300, 32)
    )
    for error, _ in found:
        assert isinstance(error, ValueError)
        assert str(error).startswith("config: expected the same on all ranks")
        assert '"group_size": 4' in str(error) and "on rank 2" in str(error)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small(), "expected scope='causal'"),
        (DGAConfig(open_units=0, rest="group", dense_below=0), "expected scope='causal'"),
        (DGAConfig.snapkv(), "expected 'sparse'"),
        (small(scope="causal", window=600), "expected a config that Shards was made for"),
    ],
    ids=["focal", "groups", "dense prefill", "another window"],
)
def test_what_cannot_be_sharded_is_refused(ranks, config, message):
    for error, _ in ranks.run(parallel_work.refused, config, (1, 2, 2, 300, 32)):
        assert isinstance(error, ValueError) and message in str(error)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="shards: expected Shards"):
        parallel_attention(*[torch.randn(1, 2, 64, 32)] * 3, None)
    with pytest.raises(TypeError, match="mesh: expected a DeviceMesh or a ProcessGroup, got int"):
        Shards(100, 2)
    with pytest.raises(ValueError, match="length: expected at least 1"):
        Shards(0, None)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "config", [DEFAULT, small(scope="causal", group_bias="mass")], ids=["open", "groups"]
)
def test_the_cost_model_says_what_is_sent(ranks, config, world):
    shape = (1, 4, 2, 500, 32)
    found = ranks.results(parallel_work.equals_one_process, world, config, shape)
    kinds = bytes_sent(Shape(1, 4, 2, 32), 500, world, 4, config, Open(0.0, 0.0))
    for kind, size in kinds.items():
        if kind != "opened units":  # these are measured
            assert max(sent[kind] for _, sent in found) == size, kind
    assert all(sent.keys() == kinds.keys() for _, sent in found)
