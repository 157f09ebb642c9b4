"""`flexdga-bench paper`: its measures are those of a slow definition, and the command runs."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from flexdga_bench import (
    paper,
    paper_convergence,
    paper_hessian,
    paper_latency,
    paper_noise,
    paper_sparsity,
)
from flexdga_bench.attended import capture
from flexdga_bench.cli import main
from flexdga_bench.workloads import QKV, open_model
from tiny_model import save_tiny_model

from flexdga import DGAConfig, make_plan, reference

pytest.importorskip("transformers")

SMALL = paper.Sizes(
    paper_sparsity.Settings((60, 200), 1),
    paper_noise.Settings(256, (4, 16), 1, 2, (0.5,)),
    paper_hessian.Settings((2, 4), 2),
    dataclasses.replace(
        paper_convergence.QUICK, seeds=1, steps=2, look=1, length=150, windows=1, vocabulary=64
    ),
    paper_latency.Settings((64, 200), 2),
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    return path


def layer(length=256, dim=16):
    query, key, value = (torch.randn(1, heads, length, dim) for heads in (4, 2, 2))
    return QKV(query, key, value)


def test_what_a_model_gives_its_attention_is_what_is_captured(model_path):
    """Attention computed from it by hand is what the model computes."""
    model, _ = open_model(model_path, torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, 70))
    found = capture(model, ids)
    outputs = []
    first = model.get_submodule("model.layers.0.self_attn.o_proj")
    handle = first.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    assert len(found) == model.config.num_hidden_layers
    want = reference.dense(found[0].query, found[0].key, found[0].value, scale=found[0].scale)
    # Two float32 attentions: a few hundred roundings.
    assert torch.allclose(outputs[0][0].double(), want[0].transpose(0, 1).flatten(1), atol=1e-5)


def test_sparsity_by_its_definition():
    x = layer()
    found = paper_sparsity.of_layer(x, 200, torch.Generator().manual_seed(0))
    sparse, holders = [], []
    for head in range(4):
        for at in range(200 - paper_sparsity.QUERIES, 200):
            score = x.query[0, head, at] @ x.key[0, head // 2, : at + 1].T / math.sqrt(16)
            weight = sorted(score.double().softmax(-1).tolist(), reverse=True)
            sparse.append(weight[0] >= 1 / (0.02 * (at + 1)))
            count = next(n for n in range(len(weight)) if sum(weight[: n + 1]) >= 0.9) + 1
            holders.append(count)
    assert found["sparse"] == pytest.approx(sum(sparse) / len(sparse))
    assert found["holders"] == pytest.approx(sum(holders) / len(holders))


def test_one_token_alone_is_sparse_and_equal_weights_are_not():
    context = torch.tensor([400])
    alone = torch.zeros(1, 400).index_fill(1, torch.tensor([7]), 1.0)
    assert paper_sparsity.is_sparse(alone, context).all()
    assert not paper_sparsity.is_sparse(torch.full((1, 400), 1 / 400), context).any()
    assert paper_sparsity.tokens_that_hold(alone, 0.9).tolist() == [1]
    assert paper_sparsity.tokens_that_hold(torch.full((1, 400), 1 / 400), 0.9).tolist() == [360]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("bias", ["none", "mass"])
def test_without_noise_attention_over_slots_is_the_oracles(bias):
    x = layer(300)
    config = DGAConfig.paper(group_bias=bias, probes=16)
    got = paper_noise.attention(x, config, 0.0, torch.Generator())
    plan = make_plan(x.query, x.key, x.value, config=config)
    want = reference.attend(x.query, x.key, x.value, plan, group_bias=bias)
    assert torch.allclose(got.double(), want, atol=1e-5)  # float32, a few hundred roundings
    exact = reference.dense(x.query, x.key, x.value)
    assert torch.allclose(paper_noise.attention(x, None, 0.0, torch.Generator()).double(), exact,
        atol=1e-5)  # fmt: skip


@pytest.mark.usefixtures("eager")
def test_equal_tokens_change_by_the_theorem():
    """Keys all alike: a group with equal shares weighs as one token, and its members 1/m of it."""
    x = layer(256)
    x = dataclasses.replace(x, key=torch.zeros_like(x.key))
    generator = torch.Generator().manual_seed(0)
    for m in (4, 16):
        config = DGAConfig.paper(group_size=m, group_weights="mean", probes=16)
        found = paper_noise.weight_changes(x, config, 50, generator)
        # There are fewer keys to share with, so a key weighs more than in dense attention.
        more = m * found["grouped_mass"] / found["dense_mass"]
        assert more > 1
        ratio = found["grouped_change"] / found["dense_change"]
        assert ratio == pytest.approx(more**2 / m**2, rel=0.1)  # of 50 draws of 64 queries


def test_noise_changes_weights_in_proportion():
    """In the linear range a weight w changes by about w·σ."""
    x = layer()
    found = paper_noise.weight_changes(
        x, DGAConfig.paper(probes=16), 50, torch.Generator().manual_seed(0)
    )
    for name in ("dense", "grouped"):
        ratio = found[f"{name}_change"] / found[f"{name}_square"]
        assert ratio == pytest.approx(paper_noise.SIGMA**2, rel=0.15)


def test_condition_numbers():
    rows = torch.diag(torch.tensor([4.0, 2.0, 1.0])).double()
    assert paper_hessian.condition(rows).item() == pytest.approx(16)
    assert paper_hessian.condition(torch.randn(5, 3).double()).item() == math.inf
    assert paper_hessian.condition(torch.ones(2, 3).double()).item() == math.inf
    value, shared, _ = paper_hessian.coded(layer(), 16, 4, 32)
    gram = value @ value.mT
    code = torch.block_diag(*[torch.full((1, 4), 0.5, dtype=torch.float64)] * 4)  # Gᵀ
    restricted = code @ gram @ code.T
    assert torch.allclose(shared @ shared.mT, restricted)
    for mine, hessian in ((value, gram), (shared, restricted)):
        want = torch.linalg.cond(hessian)
        assert torch.allclose(paper_hessian.condition(mine), want, rtol=1e-5)


def test_dgas_groups_are_the_librarys():
    """The rows that `coded` forms are the values of the groups that attention uses."""
    x = layer(256)
    config = DGAConfig.paper(focal_ratio=0.0)
    seen, plan, _ = paper_noise.slots(x, config, torch.arange(256))
    _, _, mine = paper_hessian.coded(x, 256, 16, 0)
    theirs = seen.value[:, plan.num_slots - plan.members.shape[2] :][:, :16]
    assert torch.allclose(mine.float(), theirs, atol=1e-5)


def test_rare_tokens_share_a_number():
    ids = torch.tensor([7, 7, 7, 3, 3, 9, 5])
    assert paper_convergence.common_tokens(ids, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_steps_that_a_loss_takes():
    curve = [(0, 6.0), (10, 5.0), (20, 5.5), (30, 4.0)]
    assert paper_convergence._steps_to(5.25, curve) == 7.5  # it need not stay there
    assert paper_convergence._steps_to(4.0, curve) == 30
    assert paper_convergence._steps_to(3.9, curve) is None
    assert paper_convergence._steps_to(6.0, curve) == 0


@pytest.mark.usefixtures("eager")
def test_methods_differ_in_attention_alone():
    """They start from the same weights, whatever the method, and end elsewhere."""
    ids = torch.randint(32, (3000,))
    chosen = dataclasses.replace(SMALL.convergence, vocabulary=32, length=140)
    dense = paper_convergence.train("dense", 0, ids, chosen, print)
    again = paper_convergence.train("dense", 0, ids, chosen, print)
    grouped = paper_convergence.train("DGA", 0, ids, chosen, print)
    assert dense == again
    assert [row["step"] for row in dense] == [0, 1, 2]
    assert grouped[0]["held_out"] == pytest.approx(dense[0]["held_out"], rel=1e-2)
    assert grouped[1]["training"] != dense[1]["training"]
    other = paper_convergence.train("dense", 1, ids, chosen, print)
    assert other[0]["held_out"] != dense[0]["held_out"]


def test_caches_hold_what_a_real_prompt_leaves(model_path):
    model, _ = open_model(model_path, torch.float32)
    caches = paper_latency.filled_caches(model, 150, 4)
    assert caches["dynamic"].get_seq_length() == 150
    layers = caches["DGA"].layers
    assert [layer.cache.seen for layer in layers] == [150] * model.config.num_hidden_layers
    assert 0 < layers[-1].cache.num_slots < 150
    assert layers[0].cache is not layers[1].cache


@pytest.mark.usefixtures("eager")
def test_paper(model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper, "sizes_of", lambda quick: SMALL)
    path = tmp_path / "out.json"
    argv = ["paper", "--model", str(model_path), "--json", str(path), "--plots", str(tmp_path)]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    report = json.loads(path.read_text())
    assert [claim["number"] for claim in report["claims"]] == ["1", "2", "3a", "3b", "4"]
    for claim in report["claims"]:
        assert f"{claim['number']}. {claim['title']}" in shown
        assert claim["findings"] and all(claim["rows"].values())
        picture = tmp_path / f"paper_{claim['number']}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    verdicts = [f["holds"] for claim in report["claims"] for f in claim["findings"]]
    assert shown.count("DOES NOT HOLD: ") == verdicts.count(False)
    assert shown.count("OPEN: ") == verdicts.count(None) == 2  # 64 and 200 tokens decide nothing


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--claims", "5"], "expected some of 1, 2, 3, 4"),
        (["--plots", "/no/such/folder"], "expected a folder that exists"),
        (["--json", "/no/such/folder/x.json"], "does not exist"),
    ],
)
def test_wrong_options(extra, says, model_path, capsys):
    assert main(["paper", "--model", str(model_path), *extra]) == 2
    assert says in capsys.readouterr().err
