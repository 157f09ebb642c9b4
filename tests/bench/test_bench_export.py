"""`flexdga-bench export` runs, and its figures make sense."""

from __future__ import annotations

import json
import math

import pytest
import torch
from flexdga_bench.cli import main
from flexdga_bench.export import token_errors, verdict
from flexdga_bench.export_report import ExportRow
from tiny_model import save_tiny_model

CONFIG = ["--config", "preset=streaming_llm", "window=32", "scope=causal"]


def export(folder, capsys, *more):
    """Of the tiny model: what was shown, and the file."""
    save_tiny_model(folder)
    path = folder / "out.json"
    argv = ["export", "--model", str(folder), "--layers", "2", *more, "--json", str(path)]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    return shown, json.loads(path.read_text())


@pytest.mark.slow
def test_export(tmp_path, capsys):
    """The dense model alone: its package is made, loaded elsewhere and timed."""
    shown, found = export(
        tmp_path, capsys, "--quick", "--attention", "dense", "--lengths", "65,130", "--compiled"
    )
    for word in ("hardware:", "2 layers", "L = 65", "L = 130", "room for 160", "MiB on disk"):
        assert word in shown
    exported, compiled = found["made"]
    assert exported["method"] == "dense exported" and exported["mib"] > 1
    assert compiled["method"] == "dense compiled" and compiled["mib"] is None
    assert all(made["seconds"] > 0 and made["cpu_seconds"] > 0 for made in found["made"])
    check_rows(found["rows"], ("dense exported", "dense eager", "dense compiled"), (65, 130))


@pytest.mark.slow
def test_export_of_dga_beside_dense(tmp_path, capsys):
    more = ["--tokens", "6", "--lengths", "65,130,200", *CONFIG]
    shown, found = export(tmp_path, capsys, *more)
    assert "window=32" in shown and "L = 200" in shown
    made = [row["method"] for row in found["made"]]
    assert made == ["DGA exported", "dense exported"]
    names = ("DGA exported", "DGA eager", "dense exported", "dense eager")
    check_rows(found["rows"], names, (65, 130, 200))


def check_rows(rows, names, lengths):
    assert [(row["length"], row["method"]) for row in rows] == [
        (length, name) for length in lengths for name in names
    ]
    for row in rows:
        assert 0 < row["prompt_min_ms"] <= row["prompt_ms"] <= row["prompt_max_ms"]
        assert 0 < row["token_min_ms"] <= row["token_ms"] <= row["token_max_ms"]
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["token_ms"])
        # Another order of sums in float32, and no bit more: the bar of the command itself.
        assert 0 < row["error"] <= row["worst"] < 1e-4


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--lengths", "100,200"], "not 100, the length at export"),
        (["--config", "window=-1"], "--config: window"),
        (["--config", "preset=h2o"], "scope='causal'"),
        (["--capacity", "2000"], "room for the longest"),
        (["--capacity", "4001"], "--capacity: decode: expected"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
    ],
)
def test_wrong_options(extra, says, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["export", "--model", str(tmp_path), *extra]) == 2
    assert says in capsys.readouterr().err


def test_what_is_no_number_is_the_worst_error():
    want = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    got = want + torch.tensor([0.0, 0.5])
    assert token_errors(got, want) == pytest.approx([0.1, 0.5])
    assert token_errors(got * torch.tensor([[1.0], [math.nan]]), want)[1] == math.inf


@pytest.mark.parametrize(
    ("own", "error", "code"), [(5e-7, 9e-5, 0), (5e-7, 2e-4, 1), (1e-3, 3e-3, 0), (1e-3, 5e-3, 1)]
)
def test_what_the_last_bit_does_to_python_is_allowed(own, error, code, capsys):
    times = (1.0,) * 7
    rows = [
        ExportRow(512, f"DGA {way}", *times, off, off)
        for way, off in (("exported", error), ("eager", own))
    ]
    assert verdict(rows, 1e-4) == code
    assert ("DGA exported, 512 tokens" in capsys.readouterr().err) == bool(code)


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["export", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
