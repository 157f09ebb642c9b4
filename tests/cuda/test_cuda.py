"""flexdga on CUDA, seen from a machine without a GPU: what lowers, what fits, what comes out.

Each architecture, and the interpreter, have a process of their own: pretending is global.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from flexdga_bench import cuda_check
from flexdga_bench.cli import main
from flexdga_bench.cuda_cases import Case, all_cases
from flexdga_bench.cuda_pretend import ARCHITECTURES, build_shim, why_not
from flexdga_bench.cuda_worker import Kernel, Outcome

from flexdga import kernel

REASON = why_not()
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SPILL = 512
"""Bytes of spills that a kernel of flex_attention may have: the largest seen is 212, of tiles that
are too large tens of thousands."""
TOLERANCE = 3e-3
"""Relative error of float16 against the float64 oracle: pooled keys, weights and probabilities are
rounded to 2^-11, about 5e-4, each. Seen forward: 2.5e-4; with a mask off by one, 2e-2."""


def well(outcome: Outcome) -> None:
    assert outcome.problems == []
    for made in outcome.kernels:
        assert made.fits, made
        if made.part != "other":
            assert made.spill_bytes <= SPILL, made


@needs_triton
def test_compiles_for_h100():
    """The default config in a caller's graph, with 1:3 heads and gradients; and called as it is."""
    cases = [Case("graph", "opens", ratio=3, backward=True), Case("call", "opens")]
    graph, call = cuda_check.check("sm_90", cases)
    for outcome in (graph, call):
        well(outcome)
        tiles = [k for k in outcome.kernels if k.part != "other"]
        assert all(0 < k.registers <= 255 and k.shared_bytes > 10_000 for k in tiles)
    assert {made.part for made in graph.kernels} == {"forward", "backward", "other"}
    # A launch takes Python tens of microseconds: stretches of a CPU's size were 100 here.
    assert call.launches <= 36


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_compiles(architecture):
    cases = all_cases()
    found = list(cuda_check.check(architecture, cases))
    assert [outcome.case for outcome in found] == [str(case) for case in cases]
    for outcome in found:
        well(outcome)


@pytest.mark.slow
@needs_triton
def test_what_does_not_fit_is_said():
    """128 × 128 tiles take more shared memory than an A100 has."""
    options = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_stages": 3, "fwd_num_warps": 4}
    case = Case("attend", "opens", head_dim=128, backward=True, kernel_options=options)
    (outcome,) = cuda_check.check("sm_80", [case])
    assert any("bytes of shared memory" in problem for problem in outcome.problems)


@cache
def interpreted(direction: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("interpreted.py")
        command = [sys.executable, script, build_shim(folder), direction]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


DIRECTIONS = ["forward", pytest.param("backward", marks=pytest.mark.slow)]


@needs_triton
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_numbers_equal_the_oracle(direction):
    found = interpreted(direction)
    assert any("flex_attention" in name for name in found["launched"])
    assert ("slope" in found["errors"]["right"]) == (direction == "backward")
    for name, error in found["errors"]["right"].items():
        assert error < TOLERANCE, name


@needs_triton
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("wrong", ["late", "shut"])
def test_a_mask_that_is_off_by_one_shows(direction, wrong):
    """The control: against an oracle one query off, the same output fails."""
    for name, error in interpreted(direction)["errors"][wrong].items():
        assert error > 3 * TOLERANCE, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("block_size", list(product((16, 32, 64, 128, 512), repeat=2)))
def test_tiles_divide_the_blocks_of_the_mask(block_size, head_dim, dtype):
    """What flex_attention's two templates assert of their tiles."""
    query = torch.empty(1, 1, 1, head_dim, dtype=dtype)
    tables = kernel._backward_blocks(block_size, dtype) or block_size
    assert all(size % small == 0 for size, small in zip(tables, block_size))
    if dtype != torch.float32:  # whose own choices are of 16
        assert min(tables) >= 128
    for rows, columns in (block_size, tables):
        tiles = kernel._triton_options((rows, columns), query)
        assert all(n >= 16 for name, n in tiles.items() if "BLOCK_" in name)
        for name in ("fwd_BLOCK_M", "bwd_BLOCK_M1", "bwd_BLOCK_M2"):
            assert rows % tiles[name] == 0
        for name in ("fwd_BLOCK_N", "bwd_BLOCK_N1", "bwd_BLOCK_N2"):
            assert columns % tiles[name] == 0
        assert tiles["bwd_BLOCK_N1"] % tiles["bwd_BLOCK_M1"] == 0
        assert tiles["bwd_BLOCK_M2"] % tiles["bwd_BLOCK_N2"] == 0


def test_callers_options_go_first():
    ours = kernel._triton_options((128, 128), torch.empty(1, 1, 1, 64))
    both = kernel._merged(ours, {"num_warps": 2, "fwd_BLOCK_M": 16, "BLOCK_N1": 32})
    assert both["num_warps"] == 2 and "fwd_num_warps" not in both and "bwd_num_warps" not in both
    assert both["fwd_BLOCK_M"] == 16 and both["BLOCK_N1"] == 32 and "bwd_BLOCK_N1" not in both
    assert both["fwd_BLOCK_N"] == ours["fwd_BLOCK_N"] and both["BACKEND"] == "TRITON"
    assert kernel._merged(ours, {"BACKEND": "AUTO"})["BACKEND"] == "AUTO"
    assert "BACKEND" not in kernel._merged(ours, {"FORCE_USE_FLEX_ATTENTION": True})


def test_without_triton_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["cuda-check", "--quick"]) == 2
    said = capsys.readouterr().err
    assert "cuda-check: error: triton is not installed" in said and "flexdga[cuda-check]" in said


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--arch", "sm_70"], "expected some of sm_80"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
    ],
)
def test_wrong_options(extra, says, capsys):
    assert main(["cuda-check", *extra]) == 2
    assert says in capsys.readouterr().err


def test_the_report_holds_in_80_columns():
    flex = Kernel("triton_tem_fused_flex_attention_1", "forward", 255, 24, 117760, True, 8, 2)
    other = Kernel("triton_poi_fused_add_0", "other", 12, 0, 0, True, 4, 1)
    problem = ["too large: " + "x " * 60]
    found = [
        Outcome(str(case), [flex, other], 24, ["bmm"], problem * case.backward, 123.0)
        for case in all_cases()
    ]
    report = cuda_check.CheckReport({"versions": "v"}, {"sm_80": found, "sm_100": []})
    shown = report.text()
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    for word in ("sm_80 (A100", "Problems on sm_80", "attend opens 1:3 D=128 bf16", "115"):
        assert word in shown
    assert report.failed and "cases have problems" in shown
    well = [outcome for outcome in found if not outcome.problems]
    report = cuda_check.CheckReport({}, {"sm_80": well})
    assert not report.failed
    assert f"All {len(well)} cases lower fully" in report.text()
