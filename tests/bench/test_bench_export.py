"""`flexdga-bench export` runs, and its figures make sense."""

from __future__ import annotations

import json

import pytest
from flexdga_bench.cli import main
from tiny_model import save_tiny_model


@pytest.mark.slow
def test_export(tmp_path, capsys):
    model, path = tmp_path / "model", tmp_path / "out.json"
    save_tiny_model(model)
    config = ["--config", "preset=streaming_llm", "window=32"]
    argv = ["export", "--model", str(model), "--quick", "--layers", "1", "--repeats", "2", *config]
    assert main([*argv, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    for word in ("hardware:", "1 layers", "L = 65", "L = 200", "window=32", "MiB on disk"):
        assert word in shown
    found = json.loads(path.read_text())
    made = {row["method"]: row for row in found["made"]}
    assert made["DGA exported"]["mib"] > 1 and made["dense exported"]["seconds"] > 0
    assert [(row["length"], row["method"]) for row in found["rows"]] == [
        (length, method)
        for length in (65, 130, 200)
        for method in ("DGA exported", "DGA eager", "dense exported")
    ]
    for row in found["rows"]:
        assert row["runs"] == 2
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["method"] != "DGA exported" or 0 < row["error"] < 1e-4


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--lengths", "100,200"], "not 100, the length at export"),
        (["--config", "window=-1"], "--config: window"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
    ],
)
def test_wrong_options(extra, says, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["export", "--model", str(tmp_path), *extra]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["export", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
