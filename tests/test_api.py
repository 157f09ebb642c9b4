"""What users hand in, and what they are told; describing, drawing, saving; the layer."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from helpers import TOLERANCE, qkv, relative_error, small
from rich.console import Console

import flexdga
from flexdga import DGAConfig, DGAttention, Plan, dga_attention, make_plan, reference

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"group_size": 0}, ValueError, "group_size: expected an int from 1 to 4096, got 0"),
        ({"group_size": 2.5}, TypeError, "group_size: expected an int from 1 to 4096, got 2.5"),
        ({"focal_ratio": -0.1}, ValueError, r"focal_ratio: expected a float in \[0, 1\], got -0.1"),
        ({"focal_ratio": float("nan")}, ValueError, r"focal_ratio: .* \[0, 1\], got nan"),
        ({"focal_ratio": "a"}, TypeError, r"focal_ratio: .* got 'a'"),
        ({"focal_budget": -1}, ValueError, "focal_budget: expected an int ≥ 0, got -1"),
        ({"window": -1}, ValueError, "window: expected an int ≥ 0, got -1"),
        ({"sinks": True}, TypeError, "sinks: expected an int ≥ 0, got True"),
        ({"probes": 0}, ValueError, "probes: expected an int ≥ 1, got 0"),
        ({"scope": "future"}, ValueError, r"scope: expected one of \('prompt', 'causal'\)"),
        ({"importance": 3}, ValueError, "importance: expected one of"),
        ({"open_units": -1}, ValueError, "open_units: expected an int ≥ 0, got -1"),
        ({"open_units": 2, "unit_size": 64}, ValueError, r"unit_size: .* \(16\) .* got 64"),
        ({"rest": "group", "window": 0}, ValueError, "window: .* with open_units, got 0"),
        ({"open_mass": 1.0}, ValueError, r"open_mass: expected a float in \[0, 1\), got 1.0"),
        ({"open_units": 0, "window": 0}, ValueError, "window: with rest='drop'.* got 0"),
        ({"keep_raw": "gpu"}, ValueError, "keep_raw: expected one of"),
        ({"block_size": 128}, TypeError, r"block_size: expected a \(query, key\) tuple"),
        ({"block_size": (128, 100)}, ValueError, "block_size: expected powers of two"),
        ({"grouping": "similarity", "unit_size": 100}, ValueError, "unit_size: .* got 100"),
        ({"scope": "causal", "focal_budget": 5}, ValueError, "focal_budget: .* got 5"),
        ({"scope": "causal", "probe_placement": "tail"}, ValueError, "probe_placement: .* 'tail'"),
        ({"align": 1}, TypeError, "align: expected a bool, got 1"),
        ({"sinks": 500}, ValueError, "sinks: expected at most 32"),
    ],
)
def test_bad_config(changes, error, message):
    with pytest.raises(error, match=message):
        DGAConfig(**changes)


def test_config_is_frozen_and_hashable():
    config = DGAConfig.paper()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3
    assert config == DGAConfig.paper() and hash(config) == hash(DGAConfig.paper())
    assert DGAConfig.paper(window=7).window == 7
    assert DGAConfig.cca().focal_ratio == 0


Q, K, V = (torch.randn(2, h, 100, 32) for h in (4, 2, 2))


@pytest.mark.parametrize(
    ("inputs", "arguments", "error", "message"),
    [
        ((Q[0], K, V), {}, ValueError, r"query: expected 4 dimensions .* got \(4, 100, 32\)"),
        ((Q, None, V), {}, TypeError, "key: expected a tensor, got NoneType"),
        ((Q.int(), K, V), {}, TypeError, "query: expected float32, .* got torch.int32"),
        ((Q.double(), K, V), {}, TypeError, "key: expected torch.float64 like the query"),
        ((Q, K.half(), V), {}, TypeError, "key: expected torch.float32 like the query"),
        ((Q, K.to("meta"), V), {}, ValueError, "key: expected device cpu, got meta"),
        ((Q, K[:, :, :50], V), {}, ValueError, r"key: expected \(2, Hkv, 100, 32\)"),
        ((Q, K[:1], V), {}, ValueError, r"key: expected \(2, Hkv, 100, 32\)"),
        ((Q, K, V[:, :1]), {}, ValueError, r"value: expected \(2, 2, 100\)"),
        ((Q[:, :3], K, V), {}, ValueError, "key: expected a number of heads that divides"),
        ((Q[:, :, :0], K[:, :, :0], V[:, :, :0]), {}, ValueError, "length of at least 1"),
        ((Q, K, V), {"config": 3}, TypeError, "config: expected a DGAConfig, got int"),
        ((Q, K, V), {"scale": float("inf")}, ValueError, "scale: expected a finite number"),
        ((Q, K, V), {"score_mod": 3}, TypeError, "score_mod: expected a callable, got int"),
        ((Q, K, V), {"document_ids": [1]}, TypeError, "document_ids: expected a tensor"),
        ((Q, K, V), {"document_ids": torch.zeros(2, 100)}, TypeError, "expected integers"),
        ((Q, K, V), {"document_ids": torch.zeros(2, 9).long()}, ValueError, r"shape \(2, 100\)"),
        (
            (Q, K, V),
            {"document_ids": torch.arange(100).flip(0).expand(2, -1)},
            ValueError,
            "document_ids: expected ids that never decrease",
        ),
        (
            (Q, K, V),
            {"document_ids": torch.tensor([0] * 40 + [-1] + [0] * 59).expand(2, -1)},
            ValueError,
            "each a run of neighbours",
        ),
        ((Q, K, V), {"lengths": torch.tensor([5, 101])}, ValueError, r"0 to 100, got \[5, 101\]"),
        ((Q, K, V), {"lengths": torch.tensor([5])}, ValueError, r"lengths: expected shape \(2,\)"),
        (
            (Q, K, V),
            {"lengths": torch.tensor([5, 5]), "document_ids": torch.zeros(2, 100).long()},
            ValueError,
            "either document_ids or lengths",
        ),
        (
            (Q, K, V),
            {"config": DGAConfig(scope="causal"), "is_causal": False},
            ValueError,
            "is_causal: expected True",
        ),
        ((Q, K, V), {"plan": 3}, TypeError, "plan: expected a Plan, got int"),
    ],
)
def test_bad_input(inputs, arguments, error, message):
    with pytest.raises(error, match=message):
        dga_attention(*inputs, **arguments)


def test_a_plan_of_another_shape():
    plan = make_plan(Q, K, V, config=small())
    for inputs in (
        qkv(1, 4, 2, 100),
        qkv(2, 4, 4, 100),
        qkv(2, 4, 2, 300),
    ):
        with pytest.raises(ValueError, match="plan: expected one for"):
            dga_attention(*inputs, config=small(), plan=plan)
    with pytest.raises(ValueError, match="needs a plan made with it"):
        dga_attention(Q, K, V, config=small(group_weights="importance"), plan=plan)
    for extra in ({"lengths": torch.tensor([3, 4])}, {"is_causal": False}):
        with pytest.raises(ValueError, match="the plan holds"):
            dga_attention(Q, K, V, config=small(), plan=plan, **extra)


def test_describe_tells_the_cost():
    plan = make_plan(*qkv(length=400), config=small())
    mask = plan.visible(torch.arange(400))[..., : plan.num_slots]
    want = mask.sum().item() / (2 * 400 * 401 / 2)
    assert plan.cost() == pytest.approx(want)
    text = plan.describe()
    for word in ("raw", "focal", "group", f"cost {want:.3f}"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


def test_drawing(tmp_path):
    plan = make_plan(*qkv(length=400), config=small())
    console = Console(width=80, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(plan.draw(head=1))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > 20
    # Queries see raw tokens near the diagonal: early rows at the left, late rows at the right.
    first, last = lines[3], lines[-2]
    assert first.index("█") < last.index("█")
    path = tmp_path / "plan.png"
    plan.save_png(str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    with pytest.raises(ValueError, match="head: expected 0 to 1, got 2"):
        plan.draw(head=2)


def test_plans_are_saved_and_are_pytrees(tmp_path):
    plan = make_plan(*qkv(length=200), config=small())
    torch.save(plan, tmp_path / "plan.pt")
    again = torch.load(tmp_path / "plan.pt")
    assert isinstance(again, Plan) and torch.equal(again.start, plan.start)
    moved = torch.utils._pytree.tree_map(lambda t: t.clone(), plan)
    assert isinstance(moved, Plan) and torch.equal(moved.members, plan.members)


def test_the_layer_is_attention_between_projections():
    layer = DGAttention(64, 4, num_kv_heads=2, config=small(focal_ratio=1.0), bias=True).eval()
    hidden = torch.randn(2, 90, 64)
    rotary = lambda query, key: (query.roll(1, -1), -key.roll(1, -1))  # noqa: E731
    with torch.no_grad():
        got = layer(hidden, rotary=rotary, lengths=torch.tensor([90, 50]))
        query, key, value = (
            proj(hidden).view(2, 90, -1, 16).transpose(1, 2)
            for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        ids = torch.where(torch.arange(90) < torch.tensor([[90], [50]]), 0, -1)
        want = reference.dense(*rotary(query, key), value, document_ids=ids)
        want = layer.o_proj(want.float().transpose(1, 2).flatten(2))
    assert relative_error(got, want) < TOLERANCE[torch.float32]
    for bad in ({"num_kv_heads": 3}, {"num_kv_heads": 0}):
        with pytest.raises(ValueError, match="num_kv_heads: expected"):
            DGAttention(64, 4, **bad)
    with pytest.raises(ValueError, match="embed_dim: expected a multiple"):
        DGAttention(65, 4)
    with pytest.raises(ValueError, match="hidden_states: expected 3 dimensions"):
        layer(hidden[0])


def test_all_but_models_goes_without_transformers():
    """It is optional: the benchmark is installed without it, and a cache serves by itself."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, flexdga, flexdga.parallel\n"
        "from flexdga_bench.cli import main\n"
        "cache = flexdga.DGACache(flexdga.DGAConfig())\n"
        "query = torch.randn(1, 2, 100, 16)\n"
        "cache.update(query, query, 0)\n"
        "assert flexdga.dga_decode(query, cache, 0).shape == query.shape\n"
        "main(['--help'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and "usage: flexdga-bench" in ran.stdout, ran.stderr


def test_few_public_names():
    assert sorted(flexdga.__all__) == [
        "DGACache", "DGAConfig", "DGAttention", "Plan", "applied", "dga_attention", "dga_decode",
        "export", "load", "lower", "make_plan", "report", "unwrap", "wrap",
    ]  # fmt: skip


@pytest.mark.parametrize(("open_by", "blocks"), [("landmarks", 32), ("exact", 16)])
def test_auto_opens_more_for_larger_budgets(open_by, blocks):
    budgets = (0.06, 0.08, 0.10, 0.12, 0.15, 0.2, 0.22)
    configs = [DGAConfig.auto(budget, open_by=open_by) for budget in budgets]
    masses = [config.open_mass for config in configs]
    assert masses == sorted(masses, reverse=True) and len(set(masses)) == len(budgets)
    assert {config.open_by for config in configs} == {open_by}
    assert {config.block_size for config in configs} == {(blocks, blocks)}
    assert DGAConfig.auto(0.1, open_by=open_by, window=128).window == 128


@pytest.mark.parametrize(
    ("budget", "open_by"), [(0.05, "landmarks"), (0.51, "landmarks"), (0.51, "exact")]
)
def test_auto_refuses_budgets_that_were_not_measured(budget, open_by):
    with pytest.raises(ValueError, match=rf"budget: expected 0.06 to .*, got {budget}"):
        DGAConfig.auto(budget, open_by=open_by)


def test_auto_names_an_unknown_way_to_open():
    with pytest.raises(ValueError, match=r"open_by: expected one of .*, got 'guess'"):
        DGAConfig.auto(0.1, open_by="guess")
