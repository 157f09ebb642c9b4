"""The benchmark runs, says what it found in numbers that make sense, and refuses clearly."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flexdga_bench import measure, options, report
from flexdga_bench.baselines import DGA, MATH_LIMIT, Bound, Method, methods
from flexdga_bench.cli import COMMANDS, main
from flexdga_bench.dispatch import DispatchRow
from flexdga_bench.errors import UsageError
from flexdga_bench.roofline import RooflineRow
from flexdga_bench.session import Row, Session
from flexdga_bench.workloads import QKV, Shape, random_qkv
from tiny_model import save_tiny_model
from torch import Tensor

from flexdga import DGAConfig

CPU = torch.device("cpu")


def check_rows(rows: list[dict[str, Any]], lengths: list[int]) -> None:
    assert list(dict.fromkeys(row["length"] for row in rows)) == lengths
    for length in lengths:
        here = {row["method"]: row for row in rows if row["length"] == length}
        assert {"SDPA flash", "SDPA math", "flex dense", DGA} <= set(here)
        for name, row in here.items():
            for field, value in row.items():
                assert value is None or isinstance(value, str) or math.isfinite(value), field
            assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
            assert row["speedup"] > 0 and row["peak_mib"] > 0
            assert 0 <= row["error"] <= row["error_max"] + 1e-12
            assert row["error"] < (1.5 if name == DGA else 1e-5)
            assert (row["planner_ms"] is not None) == (name == DGA)
        assert here["SDPA flash"]["computed"] == 1
        assert 1 <= here["flex dense"]["computed"] < 1.6
        assert max(row["speedup"] for name, row in here.items() if "SDPA" in name) == 1


def check_roofline(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    assert [(r["length"], r["method"]) for r in found] == [(r["length"], r["method"]) for r in rows]
    for line, row in zip(found, rows):
        entries = row["computed"] * 8 * row["length"] * (row["length"] + 1) / 2  # 8 heads
        assert line["gflop"] == pytest.approx(entries * 4 * 64 / 1e9)
        assert line["gflops"] == pytest.approx(line["gflop"] / row["median_ms"] * 1e3)
        assert line["gflops"] > 0 and 0 < line["share"] < 1.5
        if line["kernel_gflops"] is not None:
            assert line["gflops"] <= line["kernel_gflops"]


def check_dispatch(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    assert [row["length"] for row in found] == sorted({row["length"] for row in rows})
    for line in found:
        here = {row["method"]: row for row in rows if row["length"] == line["length"]}
        assert line["picks"] == "dense" and line["length"] < line["dense_below"]
        assert here["dispatched"]["error"] < 1e-5  # as it says
        dense_ms = min(row["median_ms"] for name, row in here.items() if "SDPA" in name)
        assert line["measured"] == pytest.approx(dense_ms / here[DGA]["median_ms"])
        assert line["faster"] == ("dense" if line["measured"] <= 1 else DGA)
        assert line["overhead"] == pytest.approx(here["dispatched"]["median_ms"] / dense_ms)
        assert 0 < line["expected"] < 1


def check_width(text: str) -> None:
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_default_command_measures_and_writes_all_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    argv = ["--lengths", "512,256", "--repeats", "2", "--threads", "2", "--device", "cpu"]
    trace = tmp_path / "trace.json"
    outputs = ["--json", str(paths["json"]), "--csv", str(paths["csv"]), "--profile", str(trace)]
    assert main([*argv, *outputs, "--plot", str(paths["png"])]) == 0
    shown = capsys.readouterr().out
    check_width(shown)
    for word in ("hardware:", "L = 256", "L = 512", "Left out", "computed", "needs CUDA", DGA):
        assert word in shown
    found = json.loads(paths["json"].read_text())
    check_rows(found["rows"], [256, 512])
    by_length = {row["length"]: row for row in found["rows"] if row["method"] == DGA}
    assert 0 < by_length[512]["computed"] < 1.5
    assert by_length[512]["runs"] == 2
    assert found["header"]["DGAConfig"] == {"dense_below": 0}
    with paths["csv"].open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [
            row["method"] for row in found["rows"]
        ]
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    check_roofline(found["roofline"], found["rows"])
    check_dispatch(found["dispatch"], found["rows"])
    assert "dense below" in shown and "overhead" in shown
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("Torch-Compiled Region" in event["name"] for event in events)


def test_json_alone_on_stdout_and_dense_below_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--lengths", "256", "--repeats", "1", "--config", "dense_below=1024", "--json", "-"]
    assert main(["attention", *argv, "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    check_width(shown.err)
    (row,) = [row for row in json.loads(shown.out)["rows"] if row["method"] == DGA]
    assert row["error"] < 1e-5 and row["computed"] == 1 and row["planner_ms"] is None
    (line,) = json.loads(shown.out)["dispatch"]
    assert (line["dense_below"], line["picks"]) == (1024, "dense")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config", "windoww=3"], "key of: preset, group_size"),
        (["--config", "window"], "key=value"),
        (["--config", "window=many"], "expected int"),
        (["--config", "block_size=128,x"], "comma-separated ints"),
        (["--config", "align=perhaps"], "true or false"),
        (["--config", "grouping=random"], "expected one of"),
        (["--config", "preset=best"], "paper, cca"),
        (["--lengths", "1024,abc"], "at least 1"),
        (["--lengths", "0"], "at least 1"),
        (["--kv-heads", "3"], "divisor"),
        (["--text", "no_such_file.txt"], "expected --model"),
        (["--layers", "0,x"], "indices"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
        (["--plot", "picture.pdf"], ".png"),
        (["--model", "no_such_folder"], "config.json"),
        (["--model", "no_such_folder", "--heads", "4"], "the model decides"),
        (["--model", "no_such_folder", "--text", "no_such_file.txt"], "no_such_file.txt"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_options_end_with_status_2_and_a_message(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_cuda_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


def test_config_values_are_read_as_their_fields_types() -> None:
    pairs = ["focal_ratio=0.25", "focal_budget=none", "align=no", "block_size=64,128", "window=7"]
    pairs += ["open_units=0"]
    assert options.parse_config(pairs, dense_below=0) == DGAConfig(
        focal_ratio=0.25, align=False, block_size=(64, 128), window=7, open_units=0, dense_below=0
    )
    assert options.parse_config(["preset=paper", "group_size=8"]) == DGAConfig.paper(group_size=8)
    assert options.non_default_fields(DGAConfig(sinks=1)) == {"sinks": 1}
    with pytest.raises(UsageError, match="focal_ratio"):
        options.parse_config(["focal_ratio=2"])


def test_rounds_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def fake(call: measure.Call, _: torch.device) -> float:
        call()
        return float(len(order))

    monkeypatch.setattr(measure, "timed", fake)
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = measure.interleave(calls, CPU, rounds=None, budget=0)
    assert "".join(order) == "abcbcacab"
    assert found["b"].seconds == (2.0, 4.0, 9.0)
    assert (found["b"].low, found["b"].median, found["b"].high) == (2.0, 4.0, 9.0)
    order.clear()
    measure.interleave(calls, CPU, rounds=2, budget=0)
    assert "".join(order) == "abcbca"


def test_slow_baselines_are_called_once_unless_rounds_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.0)
    x = tiny(256)
    calls: list[str] = []

    def method(name: str) -> Method:
        def call() -> Tensor:
            calls.append(name)
            return x.query

        return Method(name, lambda _: Bound(call))

    names = ["SDPA flash", "flex dense", DGA]
    many = 1 + measure.MIN_ROUNDS
    for rounds, expected in ((None, [many, 1, many]), (2, [3, 3, 3])):
        calls.clear()
        session = Session([method(name) for name in names], CPU, rounds, 0.0)
        sample, compiled, refused = session.sample(x, lambda _: None)
        assert (compiled, refused) == ([], {})
        assert [calls.count(name) for name in names] == expected
        assert [row.runs for row in session.rows([sample])] == [
            len(sample.measured[name].timing.seconds) for name in names
        ]


def test_peak_memory_counts_what_a_call_holds_at_once() -> None:
    def call() -> Tensor:
        first = torch.ones(1 << 20)
        second = first + 1
        del first
        return second + 1

    found = measure.first_call(call, CPU)
    assert found.peak_bytes == pytest.approx(2 * 4 * (1 << 20), rel=0.01)
    assert found.graphs == 0 and found.output[0] == 3


def test_math_backend_is_left_out_where_its_scores_do_not_fit() -> None:
    (math_method,) = [
        m for m in methods(DGAConfig(), DGAConfig(), tiny(64))[0] if m.name == "SDPA math"
    ]
    large = torch.empty(1, 2, 16384, 1)
    assert MATH_LIMIT < 4 * 2 * 16384**2
    assert "MiB of scores" in str(math_method.refuses(QKV(large, large, large)))
    assert math_method.refuses(tiny(64)) is None


def tiny(length: int) -> QKV:
    return random_qkv(
        Shape(heads=2, kv_heads=1, head_dim=8), length, dtype=torch.float32, device=CPU, seed=0
    )


def test_widest_numbers_fit_80_columns() -> None:
    widest = Row(
        length=1048576, method="SDPA flash", layers=1, runs=1, median_ms=98765.4, min_ms=1.0,
        max_ms=99999.0, planner_ms=9876.5, planner_share=1.0, speedup=123.45, computed=1.994,
        error=1.234e-07, error_max=1.2e-07, peak_mib=98765.0,
    )  # fmt: skip
    line = RooflineRow(1048576, "SDPA flash", 123456.7, 12345.6, 1.0, 12345.6, 1.0)
    picked = DispatchRow(1048576, 1048576, 123.45, 123.45, "dense", "dense", 1234.5)
    check_width(report.Report({}, [widest], [], [], {}, {}, [line], [picked]).text(""))
    layer = report.LayerRow(1048576, 29, 12345.6, 0.01, 1.5, 0.1)
    check_width(report.Report({}, [widest], [layer], [], {}, {}, [], []).text(""))


@pytest.mark.usefixtures("eager")
def test_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path)
    argv = ["--model", str(tmp_path), "--device", "cpu", "--repeats", "1", "--json", "-"]
    assert main([*argv, "--lengths", "256", "--layers", "0,2"]) == 0
    shown = capsys.readouterr()
    check_width("\n".join(line for line in shown.err.splitlines() if line.startswith("|")))
    found = json.loads(shown.out)
    check_rows(found["rows"], [256])
    assert {row["layers"] for row in found["rows"]} == {2}
    assert "Hkv=2" in found["header"]["shapes"]
    assert [row["layer"] for row in found["layers"]] == [0, 2]
    for extra, said in (
        (["--lengths", "1024"], "512 tokens at most"),
        (["--layers", "3"], "layers 0 to 2"),
        (["--layers", "0", "--text", str(tmp_path)], "--text"),
    ):
        assert main([*argv, *extra]) == 2
        assert said in capsys.readouterr().err
