"""`flexdga-bench fidelity`: figures that are causal, prompts that are what they claim."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from flexdga_bench.cli import main
from flexdga_bench.errors import UsageError
from flexdga_bench.fidelity import Options, _check, _entries, add_arguments
from flexdga_bench.fidelity_methods import (
    METHODS,
    compare,
    fixed,
    logits_over_cache,
    next_token_logits,
    plan_cost,
    planned,
    prompt_cost,
    tail_log_probs,
    token_nll,
)
from flexdga_bench.fidelity_tasks import KEYS, VARIANTS, Example, Maker, answer
from flexdga_bench.workloads import default_text
from helpers import TOLERANCE, relative_error
from tiny_model import save_tiny_model

from flexdga import DGAConfig

transformers = pytest.importorskip("transformers")

BUDGETED = [name for name, method in METHODS.items() if method.budgeted and method.in_lm]
IN_LM = [name for name, method in METHODS.items() if method.in_lm]
LENGTH = 384
OPTIONS = [
    "--lengths", "128", "--budgets", ".3", "--methods", "streaming_llm,snapkv",
    "--task-lengths", "128", "--depths", ".2,.8", "--task-budgets", ".4",
]  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def model():
    """Smaller still: a forward pass is one of many."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


# Figures


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", IN_LM)
def test_nll_of_a_token_does_not_depend_on_later_ones(model, name):
    """Otherwise a method could look better than it is by reading what it predicts."""
    config = METHODS[name].at(0.4, LENGTH, "causal")
    if config.open_units is None:  # random keys would open all
        config = dataclasses.replace(config, open_units=1)
    ids = torch.randint(model.config.vocab_size, (1, LENGTH))
    with torch.no_grad(), planned(model, config) as plans:
        before = token_nll(next_token_logits(model, ids), ids)
        for position in (129, 200, 350):
            other = ids.clone()
            other[:, position + 1 :] = torch.randint(
                model.config.vocab_size, other[:, position + 1 :].shape
            )
            after = token_nll(next_token_logits(model, other), other)
            assert torch.equal(after[:position], before[:position])  # of tokens 1 to position
            assert not torch.equal(after[position:], before[position:])
    assert len(plans.costs) == 4 * model.config.num_hidden_layers
    assert plans.cost < 0.95


@pytest.mark.usefixtures("eager")
def test_a_plan_that_sees_ahead_would_be_noticed(model):
    """The test above can fail: `prompt` scope reads later tokens."""
    ids = torch.randint(model.config.vocab_size, (1, LENGTH))
    other = ids.clone()
    other[:, 200:] = torch.randint(model.config.vocab_size, (1, LENGTH - 200))
    config = DGAConfig.paper(scope="prompt")
    with torch.no_grad(), planned(model, config):
        nll, moved = (token_nll(next_token_logits(model, x), x) for x in (ids, other))
    assert not torch.equal(nll[:199], moved[:199])


def test_nll_and_comparison_are_what_they_say():
    logits, other = torch.randn(599, 50), torch.randn(599, 50)
    ids = torch.randint(50, (1, 600))
    logp, logq = logits.log_softmax(-1), other.log_softmax(-1)
    expected = -logp.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(token_nll(logits, ids), expected)
    dense = tail_log_probs(logits, 300)
    torch.testing.assert_close(dense, logp[300:])
    kl, top1 = compare(dense, other[300:])
    truth = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    assert kl == pytest.approx(truth[300:].mean().item(), rel=1e-5)
    same = logits.argmax(-1) == other.argmax(-1)
    assert top1 == pytest.approx(same[300:].float().mean().item())
    assert compare(dense, logits[300:]) == (0, 1)


@pytest.mark.usefixtures("eager")
def test_planned_gives_the_model_back(model):
    ids = torch.randint(model.config.vocab_size, (1, 200))
    with torch.no_grad():
        before = next_token_logits(model, ids)
        with planned(model, DGAConfig.paper(scope="causal")):
            assert not torch.equal(next_token_logits(model, ids), before)
        assert torch.equal(next_token_logits(model, ids), before)
        with planned(model, None) as plans:
            assert torch.equal(next_token_logits(model, ids), before)
    assert plans.cost == 1


@pytest.mark.usefixtures("eager")
def test_a_text_over_a_cache_is_read_as_at_once_but_for_the_slots(model):
    ids = torch.randint(model.config.vocab_size, (1, LENGTH))
    config = DGAConfig(
        rest="group", focal_ratio=1 / 16, open_units=0, window=64, scope="causal", dense_below=0,
        unit_size=32, block_size=(32, 32),
    )  # fmt: skip
    with torch.no_grad():
        with planned(model, config):
            want = next_token_logits(model, ids)
        got, rounded = (logits_over_cache(model, ids, config, kind) for kind in (None, "int8"))
    assert relative_error(got, want) < TOLERANCE[torch.float32]
    assert 1e-4 < relative_error(rounded, want) < 0.02


# Methods


@pytest.mark.parametrize("scope", ["causal", "prompt"])
@pytest.mark.parametrize("name", [name for name in BUDGETED if name not in ("auto", "landmarks")])
def test_rivals_cost_what_the_budget_allows(name, scope):
    config = METHODS[name].at(0.18, 2048, scope)
    assert config.scope == scope and config.dense_below == 0
    assert plan_cost(config, 2048) == pytest.approx(0.18, abs=0.012)


def test_budget_of_snapkv_is_what_decoding_sees():
    config = METHODS["snapkv"].at(0.2, 2048, "prompt")
    assert config.focal_ratio * 2048 + config.window == pytest.approx(0.2 * 2048)
    assert plan_cost(config, 2048) == 1


@pytest.mark.usefixtures("eager")
def test_cost_of_a_prompt_is_read_off_the_model_where_data_decide(model):
    prompt = torch.randint(model.config.vocab_size, (200,)).tolist()
    few, most = (DGAConfig(open_mass=mass, dense_below=0) for mass in (0.9, 0.001))
    with torch.no_grad():
        costs = [prompt_cost(model, prompt, config) for config in (few, most)]
        assert 0 < costs[0] < costs[1] <= 1.2
        paper = DGAConfig.paper()
        assert prompt_cost(model, prompt, paper) == plan_cost(paper, 200) < 1
        assert prompt_cost(model, prompt, None) == 1


def test_a_fixed_method_takes_the_scope():
    method = fixed("config", DGAConfig(window=32), "")
    assert method.at(0.5, 100, "causal") == DGAConfig(window=32, scope="causal")


# Tasks


def letters(text):
    return [ord(letter) for letter in text]


def spell(ids):
    return "".join(map(chr, ids))


FILLER = letters("The quick brown fox jumps over the lazy dog. " * 60)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_needle(variant, depth):
    example = Maker(letters, FILLER, [7, 8]).needle(variant, 1500, depth)
    assert len(example.prompt) == 1500 and example.prompt[:2] == (7, 8)
    answer = spell(example.answer)
    assert answer.isdecimal() and len(answer) == (12 if variant == "long" else 5)
    text = spell(example.prompt)
    assert text.endswith(" is ") and answer not in text[-60:]
    (place,) = [at for at, ids in example.places if answer in spell(ids)]
    needle = next(ids for at, ids in example.places if at == place)
    assert example.prompt[place : place + len(needle)] == needle
    assert len(example.places) == (KEYS if variant == "keys" else 1)
    city = text.rsplit("secret code of ", 1)[1].removesuffix(" is ")
    assert f"The secret code of {city} is {answer}." in spell(needle)
    others = sum(len(ids) for at, ids in example.places if at < place)
    rest = sum(len(ids) for _, ids in example.places)
    filler = 1500 - 2 - rest - len(text.rsplit("\n\n", 1)[1]) - 2
    assert abs((place - 2 - others) / filler - depth) <= 1 / filler


def test_tracking():
    example = Maker(letters, FILLER).tracking(1500)
    text = spell(example.prompt)
    assert len(text) == 1500
    values = {}
    for line in text.splitlines():
        if line.startswith("VAR "):
            name, what = line.removeprefix("VAR ").removesuffix(".").split(" = ")
            values[name] = values[what.removeprefix("VAR ")] if "VAR" in what else what
    asked = text.rsplit("VAR ", 1)[1].removesuffix(" is ")
    assert values[asked] == spell(example.answer)
    assert len(values) == 6 and len(set(values.values())) == 2
    assert all(
        spell(example.prompt[at : at + len(ids)]) == spell(ids) for at, ids in example.places
    )


def test_words():
    example = Maker(letters, FILLER).words(2000)
    text = spell(example.prompt)
    assert len(text) == 2000
    counts = {}
    for word in text.split("\n")[0].split():
        counts[word] = counts.get(word, 0) + 1
    first, second = sorted(counts.values())[-2:][::-1]
    assert counts[spell(example.answer)] == first > 2 * second


def test_examples_are_those_of_their_seed():
    one, same, other = (Maker(letters, FILLER, seed=seed) for seed in (0, 0, 1))
    for make in (lambda m: m.needle("single", 900, 0.5), lambda m: m.words(900)):
        assert make(one) == make(same) != make(other)


def test_prompts_too_short_and_filler_too_short():
    with pytest.raises(UsageError, match=r"--task-lengths: 50 tokens are too few.* at least 1"):
        Maker(letters, FILLER).needle("single", 50, 0.5)
    with pytest.raises(UsageError, match="--task-lengths: 50 tokens are too few"):
        Maker(letters, FILLER).words(50)
    with pytest.raises(UsageError, match=r"needs .* tokens of filler, got 100"):
        Maker(letters, FILLER[:100]).needle("single", 500, 0.5)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (None, True),
        (DGAConfig(window=300, dense_below=0), True),  # nothing has left the window
        (DGAConfig.streaming_llm(window=16, unit_size=1, align=False), False),
    ],
)
def test_answering(model, config, exact):
    ids = torch.randint(model.config.vocab_size, (1, 200))
    with torch.no_grad():
        for _ in range(6):  # what the model itself would say
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        prompt, truth = tuple(ids[0, :200].tolist()), tuple(ids[0, 200:].tolist())
        nll = token_nll(next_token_logits(model, ids), ids)[-6:].mean().item()
        good = answer(model, Example("", None, prompt, truth, ()), config)
        wrong = (*truth[:3], (truth[3] + 1) % 64, *truth[4:])
        bad = answer(model, Example("", None, prompt, wrong, ()), config)
    assert not bad.exact and bad.right < 1
    if exact:
        assert good.exact and good.right == 1 and good.seen == 1
        assert good.nll == pytest.approx(nll, abs=1e-4) and good.nll < bad.nll
    else:
        assert good.seen == pytest.approx((16 + 4) / 200, abs=0.02)
        assert abs(good.nll - nll) > 1e-3


# The command


@pytest.mark.usefixtures("eager")
def test_the_command(model_path, tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    outputs = ["--json", str(files["json"]), "--csv", str(files["csv"])]
    argv = ["fidelity", "--model", str(model_path), *OPTIONS, "--windows", "2", *outputs]
    texts = ["--text", *(str(tmp_path / f"{name}.txt") for name in ("one", "two"))]
    for name in texts[1:]:
        Path(name).write_text(default_text()[:20_000])
    extra = [
        "--config",
        "preset=cca",
        "window=16",
        "unit_size=16",
        "--plot",
        str(files["png"]),
        *texts,
    ]
    assert main([*argv, *extra]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    for part in (
        "one.txt, 128 tokens",
        "two.txt, 128 tokens",
        "needle keys, 128 tokens",
        "tracking",
    ):
        assert part in shown
    found = json.loads(files["json"].read_text())
    for fact in ("hardware", "versions", "model", "lengths", "seed", "measured", "compiling"):
        assert found["header"][fact] not in ("", None)
    lm, tasks = found["lm"], found["tasks"]
    names = ["dense", "streaming_llm", "config"]
    assert [row["method"] for row in lm] == names * 4  # two windows of two texts
    for row in lm:
        if row["method"] == "dense":
            assert abs(row["kl"]) < 1e-6 and row["top1"] == 1 and row["cost"] == 1
        else:
            assert 0 < row["kl"] < 10 and 0 <= row["top1"] <= 1 and 0 < row["cost"] < 1
        assert row["nll"] > 0 and row["tail_nll"] > 0 and row["seconds"] > row["plan_s"] >= 0
    (stream, *_) = [row for row in lm if row["method"] == "streaming_llm"]
    assert stream["budget"] == 0.3 and stream["cost"] == pytest.approx(0.3, abs=0.01)
    assert stream["config"]["scope"] == "causal"
    assert len({row["offset"] for row in lm if row["text"] == "two.txt"}) == 2
    names = ["dense", "streaming_llm", "snapkv", "config"]
    assert list(dict.fromkeys(row["method"] for row in tasks)) == names
    assert len(tasks) == len(names) * (3 * 2 + 2)
    for row in tasks:
        dense = row["method"] == "dense"
        assert row["nll"] > 0 and 0 <= row["right"] <= 1 and row["answer_tokens"] > 0
        assert row["seen"] == row["kept"] == 1 if dense else row["seen"] > 0 and row["kept"] > 0
        assert row["exact"] == (row["right"] == 1)
        assert (row["cost"] == 1) == (row["method"] in ("dense", "snapkv"))
        assert dense or row["config"].get("scope", "prompt") == "prompt"
    written = list(csv.DictReader(files["csv"].open()))
    assert len(written) == len(lm) + len(tasks) and written[0]["task"] == "lm"
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("eager")
def test_quick_takes_options_and_json_goes_to_stdout(model_path, capsys):
    argv = [
        "fidelity",
        "--model",
        str(model_path),
        "--quick",
        *OPTIONS,
        "--json",
        "-",
        "--slots",
        "int8",
    ]
    assert main(argv) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert {row["text"] for row in found["lm"]} == {"English"}
    assert {row["task"] for row in found["tasks"]} == {"needle single"}
    assert found["header"]["slots"] == "int8"
    assert [line for line in shown.err.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--methods", "paper,magic"], "--methods magic: expected some of: auto, landmarks"),
        (["--tasks", "chess"], "--tasks chess: expected some of: lm"),
        (["--budgets", "0"], "expected a share above 0 and up to 1, got '0'"),
        (["--budgets", "ten"], "expected a share above 0 and up to 1, got 'ten'"),
        (["--lengths", "100000000"], "--lengths: the model has 512 positions, got 100000000"),
        (["--task-lengths", "1024"], "--task-lengths: the model has 512 positions, got 1024"),
        (["--windows", "500000"], "English has"),
        (["--config", "window=-1"], "--config: window"),
        (["--text", "/nowhere"], "--text /nowhere"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: the folder"),
        (["--tasks", "needle", "--plot", "x.png"], "--plot shows language modelling"),
        (
            ["--config", "focal_budget=4", "--methods", "paper"],
            "config, causal scope: focal_budget",
        ),
        (["--task-lengths", "8"], "--task-lengths: 8 tokens are too few"),
    ],
)
def test_wrong_options(extra, says, model_path, capsys):
    argv = ["fidelity", "--model", str(model_path), *OPTIONS, *extra]
    assert main(argv) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path, capsys):
    assert main(["fidelity", "--model", str(tmp_path)]) == 2
    assert "expected a model's folder" in capsys.readouterr().err


def parsed(*argv: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return _check(parser.parse_args(argv))


def test_greater_lengths_have_fewer_methods_unless_they_are_named(model_path):
    model = ["--model", str(model_path)]
    full = parsed(*model)
    first, beyond = (
        {(e.method, e.budget) for e in _entries(full, length, "causal")} for length in full.lengths
    )
    assert (
        {"dense", "cca", "auto", "landmarks"} < {name for name, _ in first} > {n for n, _ in beyond}
    )
    assert ("auto", 0.15) in first and {budget for _, budget in beyond} == {None, 0.10}
    named = parsed(*model, "--methods", "cca,auto", "--budgets", ".2,.3")
    for length in named.lengths:
        found = [(e.method, e.budget) for e in _entries(named, length, "causal")]
        assert found == [("dense", None), *((m, b) for m in ("cca", "auto") for b in (0.2, 0.3))]


def test_a_budget_is_of_the_length_at_hand():
    of = {n: METHODS["auto"].at(0.10, n, "causal") for n in (1024, 4096, 8192)}
    assert of[1024] == of[4096] == DGAConfig.auto(0.10, scope="causal", dense_below=0)
    assert of[8192] == DGAConfig.auto(0.10 * 2**0.8, scope="causal", dense_below=0)
    assert METHODS["landmarks"].at(0.4, 8192, "causal").open_mass > 0  # no more than auto allows
