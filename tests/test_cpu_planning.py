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

from flexdga import DGAConfig, cpp, cpu_planning, estimates, make_plan, stretches
from flexdga.plan import NEVER

pytestmark = pytest.mark.usefixtures("eager")

STOCK = cpp.library


@functools.cache
def portable(name):
    """The same source for CPUs that have nothing of what it asks for."""
    from torch._inductor.codecache import CppCodeCache

    without = "#undef __AMX_BF16__\n#undef __AVX512VNNI__\n"
    return CppCodeCache.load(without + cpp.source(name))


def opened(monkeypatch, library, *inputs, **arguments) -> torch.Tensor:
    monkeypatch.setattr(cpp, "library", library)
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
        rule = opened(monkeypatch, lambda name: None, *inputs, **arguments)
        for library in (STOCK, portable):
            table = opened(monkeypatch, library, *inputs, **arguments)
            wrong = (table != rule).sum().item()
            assert wrong <= 1e-3 * (rule < NEVER).sum(), library  # ties after float32 sums


@pytest.mark.parametrize("blocks", [(32, 16), (16, 64)])
@pytest.mark.parametrize("head_dim", [48, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_opens_old_units_by_their_boxes_as_the_rule_does(blocks, head_dim, packed, monkeypatch):
    monkeypatch.setitem(estimates.NEAR, "exact", 256)
    for module in (estimates, stretches):
        monkeypatch.setattr(module, "SEGMENT", 128)
    config = DGAConfig(block_size=blocks, unit_size=blocks[1], dense_below=0)
    query, key, value = qkv(2, 4, 2, 1300, head_dim)
    inputs = [(2 * query).round(), key.round(), value]
    arguments = {"config": config, "scale": 1 / 8}
    if packed:  # a document that begins among old units, and padding; the other row is whole
        documents = torch.zeros(2, 1300, dtype=torch.long)
        documents[0, 420:], documents[0, 1150:] = 1, -1
        arguments["document_ids"] = documents
    rule = opened(monkeypatch, lambda name: None, *inputs, **arguments)
    old = rule[:, :, -128 // blocks[0] :, : 512 // blocks[1]] < NEVER
    assert old.any() and not old.all()
    for library in (STOCK, portable):
        table = opened(monkeypatch, library, *inputs, **arguments)
        assert (table != rule).sum() <= 1e-3 * (rule < NEVER).sum(), library
    monkeypatch.setitem(estimates.NEAR, "exact", 4096)
    assert (opened(monkeypatch, STOCK, *inputs, **arguments) != rule).any()


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_weighs_sixteen_old_units_together_where_none_is_worth_opening(
    head_dim, packed, monkeypatch
):
    """They then count as so many of their mean, less than they hold: a few more units open."""
    monkeypatch.setitem(estimates.NEAR, "exact", 256)
    for module in (estimates, stretches):
        monkeypatch.setattr(module, "SEGMENT", 128)
    length, config = 6000, DGAConfig(dense_below=0)
    query, key, value = qkv(1, 2, 1, length, head_dim)
    for unit, looks in enumerate(range(5000, length, 20)):  # what this query will look for
        key[:, :, 80 * unit : 80 * unit + 16] += 1.5 * query[:, :1, looks : looks + 1]
    inputs, arguments = [query, key, value], {"config": config, "scale": head_dim**-0.5}
    if packed:  # 600 and 3000 are within a unit, and within sixteen of them
        documents = torch.zeros(1, length, dtype=torch.long)
        documents[:, 600:], documents[:, 3000:], documents[:, 5900:] = 1, 2, 3
        arguments["document_ids"] = documents
    rule = opened(monkeypatch, lambda name: None, *inputs, **arguments)
    assert (rule[:, 0, 5000 // 32 :, : 4000 // 16] < NEVER).sum() > 30
    for library in (STOCK, portable):
        table = opened(monkeypatch, library, *inputs, **arguments)
        assert (table > rule).sum() <= 1e-3 * (rule < NEVER).sum(), library
        assert (table < rule).sum() <= 0.03 * (rule < NEVER).sum(), library


def test_who_decides(monkeypatch):
    query = torch.randn(1, 2, 64, 64)
    exact = DGAConfig(open_by="exact")
    assert cpu_planning.decides(query, exact)
    assert not cpu_planning.decides(query, DGAConfig(open_by="landmarks"))
    assert not cpu_planning.decides(query, DGAConfig(open_by="exact", open_units=2))
    assert not cpu_planning.decides(query.to("meta"), exact)
    monkeypatch.setenv("FLEXDGA_STOCK_CPU_KERNEL", "1")
    cpp.library.cache_clear()
    assert not cpu_planning.decides(query, exact)
    monkeypatch.undo()
    cpp.library.cache_clear()


def test_what_does_not_compile_is_said_once_and_done_in_pytorch(monkeypatch, tmp_path, caplog):
    for name in ("cpu_planning.cpp", "cpu_tables.cpp"):
        tmp_path.joinpath(name).write_text("not C++")
    monkeypatch.setattr(cpp, "FOLDER", tmp_path)
    monkeypatch.setattr("flexdga.saying._said", set())
    inputs, config = qkv(1, 2, 2, 200), DGAConfig(dense_below=0)
    want = make_plan(*inputs, config=config).open
    cpp.library.cache_clear()
    try:
        assert torch.equal(make_plan(*inputs, config=config).open, want)
        assert not cpp.available(cpu_planning.NAME)
    finally:
        monkeypatch.undo()
        cpp.library.cache_clear()
    assert sum("did not compile" in record.message for record in caplog.records) == 1


def test_numbers_that_are_none_open_nothing_and_stay_where_they_are():
    """A row of a batch that holds NaN does not reach another one."""
    config = DGAConfig(open_by="exact", dense_below=0, open_mass=0.02)
    inputs = qkv(2, 2, 2, 300, 32)
    clean = make_plan(*inputs, config=config).open
    inputs[0][1], inputs[1][1] = math.nan, math.nan
    assert torch.equal(make_plan(*inputs, config=config).open[0], clean[0])
