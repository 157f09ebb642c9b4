"""Openings in one pass on CPU, with tiles and without, beside those of `opening.py`."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers import qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import layout_arguments

from flexdga import DGAConfig, cpu_planning, make_plan
from flexdga.plan import NEVER

pytestmark = pytest.mark.usefixtures("eager")

STOCK = cpu_planning._library


@functools.cache
def portable():
    """The same source without tiles."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load("#undef __AMX_BF16__\n" + cpu_planning.SOURCE.read_text())


def opened(monkeypatch, library, *inputs, **arguments) -> torch.Tensor:
    monkeypatch.setattr(cpu_planning, "_library", library)
    return make_plan(*inputs, **arguments).open


@settings(max_examples=40)
@given(
    blocks=st.sampled_from([(16, 16), (32, 16), (32, 32), (16, 64), (128, 32)]),
    shape=st.sampled_from([(2, 2), (6, 2), (7, 1)]),
    head_dim=st.sampled_from([16, 64, 80]),
    length=st.sampled_from([1, 40, 97, 333, 700]),
    layout=st.sampled_from(["plain", "lengths", "left", "packed"]),
    choices=st.fixed_dictionaries(
        {
            "window": st.sampled_from([1, 20, 64]),
            "open_mass": st.sampled_from([0.0, 0.01, 0.05]),
            "scope": st.sampled_from(["prompt", "causal"]),
        }
    ),
    is_causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_opens_what_the_rule_opens(
    blocks, shape, head_dim, length, layout, choices, is_causal, dtype
):
    is_causal = is_causal or choices["scope"] == "causal"
    config = DGAConfig(
        open_by="exact", block_size=blocks, unit_size=blocks[1], dense_below=0, **choices
    )
    # Over integers, whose products are exact in whatever order they are summed up.
    inputs = [t.round().to(dtype) for t in qkv(2, *shape, length, head_dim)]
    given_layout, _ = layout_arguments(layout, 2, length)
    arguments = {"config": config, "is_causal": is_causal, "scale": 1 / 8} | given_layout
    with pytest.MonkeyPatch.context() as monkeypatch:
        rule = opened(monkeypatch, lambda: None, *inputs, **arguments)
        for library in (STOCK, portable):
            table = opened(monkeypatch, library, *inputs, **arguments)
            wrong = (table != rule).sum().item()
            assert wrong <= 1e-3 * (rule < NEVER).sum(), library  # ties after float32 sums


def test_who_decides(monkeypatch):
    query = torch.randn(1, 2, 64, 64)
    exact = DGAConfig(open_by="exact")
    assert cpu_planning.decides(query, exact)
    assert not cpu_planning.decides(query, DGAConfig(open_by="landmarks"))
    assert not cpu_planning.decides(query, DGAConfig(open_by="exact", open_units=2))
    assert not cpu_planning.decides(query.to("meta"), exact)
    monkeypatch.setenv("FLEXDGA_STOCK_CPU_KERNEL", "1")
    cpu_planning._library.cache_clear()
    assert not cpu_planning.decides(query, exact)
    monkeypatch.undo()
    cpu_planning._library.cache_clear()


def test_what_does_not_compile_is_said_once_and_done_in_pytorch(monkeypatch, tmp_path, caplog):
    source = tmp_path / "cpu_planning.cpp"
    source.write_text("not C++")
    monkeypatch.setattr(cpu_planning, "SOURCE", source)
    monkeypatch.setattr("flexdga.saying._said", set())
    inputs, config = qkv(1, 2, 2, 200), DGAConfig(dense_below=0)
    want = make_plan(*inputs, config=config).open
    cpu_planning._library.cache_clear()
    try:
        assert torch.equal(make_plan(*inputs, config=config).open, want)
        assert not cpu_planning.available()
    finally:
        monkeypatch.undo()
        cpu_planning._library.cache_clear()
    assert sum("did not compile" in record.message for record in caplog.records) == 1


def test_numbers_that_are_none_open_nothing_and_stay_where_they_are():
    """A row of a batch that holds NaN does not reach another one."""
    config = DGAConfig(open_by="exact", dense_below=0, open_mass=0.02)
    inputs = qkv(2, 2, 2, 300, 32)
    clean = make_plan(*inputs, config=config).open
    inputs[0][1], inputs[1][1] = math.nan, math.nan
    assert torch.equal(make_plan(*inputs, config=config).open[0], clean[0])
