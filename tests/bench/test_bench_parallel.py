"""`flexdga-bench parallel` runs, and its cost model says what the collectives count."""

from __future__ import annotations

import json

import pytest
from flexdga_bench.cli import main


@pytest.mark.slow  # three sets of processes that compile
def test_parallel(tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["parallel", "--length", "2048", "--ranks", "2,4", "--repeats", "2", "--kv-heads", "2"]
    config = ["--config", "scope=causal", "rest=group", "window=32", "dense_below=0"]
    assert main([*argv, *config, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    report = json.loads(path.read_text())
    rows = report["rows"]
    assert [row["ranks"] for row in rows] == [1, 2, 4]
    assert rows[0]["sent_mib"] == 0 and rows[0]["speedup"] == 1
    for row in rows[1:]:
        # The busiest rank serves more units than the mean that the model is given.
        opened = row["sent_by_kind"].pop("opened units")
        fixed = sum(row["sent_by_kind"].values())
        assert fixed < row["modelled_mib"] < fixed + opened + 1e-9
        assert row["fewer"] == pytest.approx(row["kv_mib"] / row["sent_mib"])
        assert row["ms"] > 0 and row["peak_of_one"] < 1
    assert report["carried"][-1]["ranks"] == 64 and report["carried"][-1]["length"] == 1 << 20


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--length", "100", "--config", "dense_below=101"], "dense_below"),
        (["--ranks", "1"], "expected at least 2"),
        (["--speed", "0"], "--speed: expected more than 0"),
        (["--kv-heads", "3"], "expected a divisor"),
    ],
)
def test_wrong_options(extra, says, capsys):
    assert main(["parallel", *extra]) == 2
    assert says in capsys.readouterr().err
