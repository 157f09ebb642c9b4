"""`flexdga-bench decode` runs on a model, and its figures make sense."""

from __future__ import annotations

import csv
import json

import pytest
from flexdga_bench.cli import main
from tiny_model import save_tiny_model

CONFIG = ["dense_below=100", "window=16", "unit_size=16", "block_size=16,16", "open_units=0"]


@pytest.mark.usefixtures("eager")
def test_decode(tmp_path, capsys):
    save_tiny_model(tmp_path)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    argv = ["decode", "--model", str(tmp_path), "--lengths", "64,400", "--tokens", "3"]
    outputs = ["--json", str(files["json"]), "--csv", str(files["csv"])]
    assert main([*argv, "--config", *CONFIG, *outputs, "--plot", str(files["png"])]) == 0
    shown = capsys.readouterr().out
    assert "64 tokens of context" in shown and "400 tokens of context" in shown
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    rows = json.loads(files["json"].read_text())["rows"]
    assert [row["length"] for row in rows] == [64] * 3 + [400] * 3
    for row in rows:
        assert 0 < row["token_min_ms"] <= row["token_ms"] <= row["token_max_ms"]
        assert row["speedup"] > 0 and row["cache_mib"] > 0
        assert (row["attention_ms"] is None) == (row["method"] == "static")
    short, long = ({r["method"]: r for r in rows if r["length"] == n} for n in (64, 400))
    assert short["DGA"]["keys"] >= 64  # below dense_below all tokens are there
    assert long["DGA"]["keys"] < 200 and long["DGA"]["of_dense"] < 0.7
    assert len(list(csv.DictReader(files["csv"].open()))) == 6
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--lengths", "100000000"], "--text: expected at least"),
        (["--config", "window=-1"], "--config: window"),
        (["--text", "/nowhere"], "--text /nowhere"),
    ],
)
def test_wrong_options(extra, says, tmp_path, capsys):
    save_tiny_model(tmp_path)
    assert main(["decode", "--model", str(tmp_path), *extra]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path, capsys):
    assert main(["decode", "--model", str(tmp_path)]) == 2
    assert "expected a model's folder" in capsys.readouterr().err
