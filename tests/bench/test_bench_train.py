"""`flexdga-bench train` runs, and its figures make sense."""

from __future__ import annotations

import json

import pytest
from flexdga_bench.cli import main


@pytest.mark.usefixtures("eager")
def test_train(tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["train", "--lengths", "300,200", "--repeats", "2", "--device", "cpu", "--kv-heads", "2"]
    config = ["--config", "open_units=0", "window=32"]
    assert main([*argv, *config, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    for word in ("hardware:", "L = 200", "L = 300", "scope=causal", "of SDPA", "Hkv=2"):
        assert word in shown
    rows = json.loads(path.read_text())["rows"]
    assert [(row["length"], row["method"]) for row in rows] == [
        (length, method) for length in (200, 300) for method in ("SDPA", "DGA")
    ]
    for row in rows:
        assert row["runs"] == 2
        assert 0 < row["step_min_ms"] <= row["step_ms"] <= row["step_max_ms"]
        assert row["forward_ms"] > 0 and row["peak_mib"] > 0
    for row in rows[::2]:
        assert row["speedup"] == row["peak_of_sdpa"] == 1


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--kv-heads", "3"], "expected a divisor"),
        (["--config", "window=-1"], "--config: window"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
        (["--lengths", "0"], "at least 1"),
    ],
)
def test_wrong_options(extra, says, capsys):
    assert main(["train", *extra]) == 2
    assert says in capsys.readouterr().err
