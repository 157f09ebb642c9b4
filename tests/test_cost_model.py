"""What the cost model counts is what plans have, and what it says is what is called."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import qkv, small
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import flexdga
from flexdga import DGAConfig, cpu_kernel, dga_attention, make_plan
from flexdga.block_mask import visible_blocks
from flexdga.cost_model import (
    LONGEST,
    STEP,
    STEPS_GAIN,
    Case,
    break_even,
    case_of,
    dense_below,
    dense_time,
    dga_time,
    keys_seen,
)
from flexdga.decode import LayerCache

CPU = Case(8, 8, 64, torch.float32, "cpu", 2)
EXACT = {"open_by": "exact", "unit_size": 16, "block_size": (16, 16)}
CONFIGS = {
    "default": DGAConfig(),
    "causal": DGAConfig(scope="causal"),
    "exact": DGAConfig(**EXACT),
    "groups": DGAConfig(rest="group", focal_ratio=0.1),
    "units": DGAConfig.block_selection(),
    "all units": DGAConfig(open_mass=0.0),
    "window": DGAConfig.streaming_llm(),
    "h2o": DGAConfig.h2o(),
    "budget": DGAConfig.h2o(focal_ratio=0.0, focal_budget=512),
    "paper": DGAConfig.paper(),
    "cca": DGAConfig.cca(),
}
cases = st.builds(
    Case,
    heads=st.sampled_from([1, 2, 9, 32]),
    kv_heads=st.just(1),
    head_dim=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    device=st.sampled_from(["cpu", "cuda", "mps"]),
    threads=st.sampled_from([1, 2, 64]),
    products=st.sampled_from(["tiles", "bytes", "floats"]),
)


@given(st.sampled_from(list(CONFIGS.values())), cases)
def test_break_even_is_a_length_at_which_the_faster_one_changes(config, case):
    found = break_even(config, case)
    assert type(found) is int and found % STEP == 0 and STEP <= found <= LONGEST

    def gains(length):
        return dga_time(config, case, length) < dense_time(case, length)

    for length in (1, STEP, found // 2, found - STEP):
        assert not (0 < length < found and gains(length))
    for length in (found, found + STEP, 2 * found, 10 * found):
        assert length >= LONGEST or gains(length)


@given(st.sampled_from(list(CONFIGS.values())), cases, st.integers(1, 1 << 20))
def test_times_grow_with_the_length(config, case, length):
    for time in (
        lambda length: dense_time(case, length),
        lambda length: dga_time(config, case, length),
    ):
        assert 0 < time(length) <= time(length + 1) < float("inf")


def test_what_costs_more_is_dense_for_longer():
    def at(case=CPU, **fields):
        return break_even(DGAConfig(**fields), case)

    assert at(window=64) < at(window=256) < at(window=1024)
    assert at(open_mass=0.4) < at() < at(open_mass=0.01)
    assert at() < at(**EXACT)
    assert at(CPU._replace(heads=32, kv_heads=32)) < at() < at(CPU._replace(heads=2, kv_heads=2))
    assert at() < at(CPU._replace(threads=16))
    assert at(CPU._replace(threads=1)) < at(CPU._replace(device="cuda", threads=1))


@pytest.mark.parametrize(
    "config",
    [
        DGAConfig.streaming_llm(window=256), DGAConfig.streaming_llm(window=100, sinks=0),
        DGAConfig.h2o(window=128), DGAConfig.h2o(scope="causal"), DGAConfig.paper(),
        DGAConfig.cca(window=256, block_size=(32, 32), unit_size=32),
        small(scope="causal", block_size=(32, 32)), DGAConfig(open_mass=0.9),
        DGAConfig(**EXACT, open_mass=0.9), DGAConfig.block_selection(open_units=4),
    ],
    ids=lambda config: None,
)  # fmt: skip
def test_keys_are_those_of_a_plan(config, eager):
    """Of units that open by their mass alone they are a text's, not those of random numbers."""
    length = 2048
    inputs = qkv(1, 2, 2, length, 16)
    blocks = sum(
        x.sum().item() for x in visible_blocks(make_plan(*inputs, config=config), config.block_size)
    )
    rows, columns = config.block_size
    seen = keys_seen(config, length)
    want = blocks * rows * columns / 2 / length
    assert sum(seen.values()) - seen["far"] == pytest.approx(want, rel=0.15)


@pytest.fixture
def from_200_on(monkeypatch):
    monkeypatch.setattr("flexdga.cost_model.break_even", lambda config, case: 200)


def test_attention_is_dense_below_and_planned_from_there_on(from_200_on, eager):
    config = small(dense_below=None)
    for length, dense in ((199, True), (200, False)):
        query, key, value = inputs = qkv(1, 4, 2, length)
        out = dga_attention(*inputs, config=config)
        exact = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert torch.equal(out, exact) == dense
        assert torch.equal(out, dga_attention(*inputs, config=small())) != dense
        plan = dga_attention(*inputs, config=config, return_plan=True)[1]
        assert (plan.num_stand_ins == 0) == dense
        # What is given is heard, and counts are not asked.
        for below in (0, 199, 200, 201):
            given = dga_attention(*inputs, config=small(dense_below=below))
            assert torch.equal(given, exact) == (length < below)


def test_a_compiler_finds_a_number(from_200_on):
    config = small(dense_below=None)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(
        lambda *inputs: dga_attention(*inputs, config=config),
        fullgraph=True, dynamic=True, backend="eager",
    )  # fmt: skip
    seen = []
    with torch.no_grad():
        for length in (100, 150, 333, 300, 411):
            inputs = qkv(1, 4, 2, length)
            got = compiled(*inputs)
            with torch.compiler.set_stance("force_eager"):
                assert torch.allclose(got, dga_attention(*inputs, config=config), atol=1e-5)
            seen.append(counters["stats"]["unique_graphs"])
    assert seen == [1, 1, 2, 2, 2] and not counters["graph_break"]


def test_a_compiler_takes_the_default_config():
    compiled = torch.compile(dga_attention, fullgraph=True, dynamic=True, backend="eager")
    inputs = qkv(1, 4, 2, 100)
    want = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert torch.equal(compiled(*inputs), want)


def test_lowering_knows_what_is_short():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return dga_attention(query, key, value)

    program = flexdga.lower(torch.export.export(Attention(), tuple(qkv(1, 4, 2, 100))))
    called = {str(node.target) for node in program.graph.nodes}
    assert any("scaled_dot_product" in name for name in called)
    assert not any("flex_attention" in name for name in called)


def test_a_cache_keeps_texts_whole_for_longer(from_200_on, eager):
    inputs = qkv(1, 4, 2, 300)
    for below, want in ((None, STEPS_GAIN), (0, 0), (250, 250), (301, 301)):
        config = small(dense_below=below, scope="causal")
        cache = LayerCache(config)
        out = cache.attend(*(x[:, :, :-1] for x in inputs))
        step = cache.attend(*(x[:, :, -1:] for x in inputs))
        assert cache.below == want == dense_below(config, *inputs[:2], decodes=True)
        same = dataclasses.replace(config, dense_below=want)  # prompt and steps agree
        whole = dga_attention(*inputs, config=same)
        assert torch.allclose(torch.cat([out, step], 2), whole, atol=1e-5)


def test_cases_are_of_heads_dtype_device_and_threads():
    query, key, _ = qkv(3, 9, 3, 50, 64, dtype=torch.bfloat16)
    here = torch.get_num_threads(), cpu_kernel.products()
    assert case_of(query, key) == Case(9, 3, 64, torch.bfloat16, "cpu", *here)


@pytest.mark.parametrize(
    ("below", "error"),
    [(-1, ValueError), (True, TypeError), (1.5, TypeError), ("auto", TypeError)],
)
def test_wrong_lengths_are_refused(below, error):
    with pytest.raises(error, match=r"dense_below: expected an int ≥ 0, got"):
        DGAConfig(dense_below=below)
