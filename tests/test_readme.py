"""Every Python block of the README, and every example, runs as it stands.

Those of many tokens are compiled, as users would run them; the others in the slow tests only, since
each compiles for shapes of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from tiny_model import save_tiny_model

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEED_A_MODEL = [path for path in EXAMPLES if '"--model", required=True' in path.read_text()]
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
UNCOMPILED = 8000
"""Tokens that uncompiled attention holds all scores of, in a few GB."""


def in_modes(codes: list[tuple[str, str]]) -> list:
    """Each code compiled, in a quick test or a slow one, and uncompiled where that is quicker."""
    found = []
    for name, code in codes:
        short = max(map(int, re.findall(r"\d+", code)), default=0) < UNCOMPILED
        if short and "flexdga.export(" not in code:  # that compiles in any mode
            found.append(pytest.param(code, False, id=f"{name}-eager"))
        marks = [pytest.mark.slow] if short else []
        found.append(pytest.param(code, True, id=f"{name}-compiled", marks=marks))
    return found


@pytest.mark.parametrize(
    ("block", "compiled"),
    in_modes([(block.strip().splitlines()[-1][:40], block) for block in BLOCKS]),
)
def test_readme_block(block, compiled, tmp_path, monkeypatch, request):
    if not compiled:
        request.getfixturevalue("eager")
    monkeypatch.chdir(tmp_path)
    if not block.startswith("# torchrun"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
        return
    for name, value in TORCHRUN.items():  # as in a process of one
        monkeypatch.setenv(name, value)
    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("code", "compiled"),
    in_modes([(path.stem, path.read_text()) for path in EXAMPLES if path not in NEED_A_MODEL]),
)
def test_example(code, compiled, tmp_path):
    (tmp_path / "example.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"TORCHDYNAMO_DISABLE": str(int(not compiled))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(run.stdout) > 100


def test_example_generate(tmp_path):
    save_tiny_model(tmp_path)
    command = [ROOT / "examples" / "generate.py", "--model", tmp_path, "--tokens", "200"]
    run = subprocess.run(
        [sys.executable, *command, "--answer", "5"], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "dense" in run.stdout and "DGA" in run.stdout and "each token" in run.stdout


@pytest.mark.slow
def test_example_context_parallel(tmp_path):
    save_tiny_model(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", ROOT / "examples" / "context_parallel.py"]
    run = subprocess.run(
        [*command, "--model", tmp_path, "--length", "400", "--dense-below", "0",
         "--new-tokens", "40"],
        capture_output=True, text=True, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "40 tokens generated" in run.stdout
    assert "second: 400 tokens" in run.stdout and "NLL" in run.stdout
    assert "chunk   0  1  2  3\nrank    0  1  1  0" in run.stdout


def table(lines):
    """Rows of a printed table by their first column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in rows}


def test_example_quantize_eager():
    command = [sys.executable, ROOT / "examples" / "quantize.py", "--length", "500"]
    run = subprocess.run(
        [*command, "--ways", "eager"], capture_output=True, text=True,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    weights, slots = (table(part.splitlines()) for part in run.stdout.split("\n\n"))
    # Weights of 8 bits are off by .3 %, of 4 by 10 %; random ones on random tokens lose little.
    bounds = (("int8", 0.6, 2e-3), ("int8-dynamic", 0.6, 2e-3), ("int4", 0.4, 1e-2))
    for name, size, most in bounds:
        assert float(weights[name][1]) < size * float(weights["float32"][1])  # MiB
        assert float(weights[name][2]) == pytest.approx(float(weights["float32"][2]), rel=most)
        assert weights[name][2] != weights["float32"][2]
    _, share, _, loss, _ = slots["int8"]
    assert 0.25 < float(share) <= 0.27
    assert float(loss) == pytest.approx(float(slots["float32"][3]), rel=2e-3)


def test_the_readme_names_both_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install -e . && flexdga-bench" in text
    assert 'pip install -e ".[test]" && pytest' in text


def test_example_finetune_goes_on_where_it_was_killed(tmp_path):
    """Killed after a checkpoint, started again, it ends as a run does that was left alone."""
    save_tiny_model(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics.topics[name] for name in sorted(topics.topics))[:200_000])
    command = [sys.executable, ROOT / "examples" / "finetune.py", "--model", tmp_path]
    command += ["--text", text, "--length", "100", "--lr", "1e-2", "--windows", "1"]
    command += ["--every", "2", "--look", "2", "--bfloat16"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}

    def start(name, steps):
        files = ["--checkpoint", tmp_path / f"{name}.pt", "--json", tmp_path / f"{name}.json"]
        return subprocess.Popen(
            [*command, *files, "--steps", str(steps)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def finish(run):
        out, error = run.communicate()
        assert run.returncode == 0, error
        return [line for line in out.splitlines() if "NLL" in line or "resumed" in line]

    whole = finish(start("whole", 4))
    dense, before, second, _, after = whole
    assert "after 4 steps" in after and second.startswith("step 2: ")
    killed = start("parts", 4)
    while not (tmp_path / "parts.json").exists():  # written with the first checkpoint
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    # Between its first checkpoint and the signal it may have come to the next.
    again = finish(start("parts", 4))
    assert again[0] in [f"resumed after step {n} of {tmp_path / 'parts.pt'}" for n in (2, 4)]
    assert again[-1] == after
    curves = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "parts")]
    assert curves[0]["curve"] == curves[1]["curve"] and curves[0]["losses"] == curves[1]["losses"]
    dense, before, after = (float(line.rpartition(" ")[2]) for line in (dense, before, after))
    assert after < before and dense > 0


def test_example_finetune_trains_the_dense_model_to_compare_with(tmp_path):
    save_tiny_model(tmp_path)
    command = [sys.executable, ROOT / "examples" / "finetune.py", "--model", tmp_path]
    command += ["--length", "200", "--windows", "1", "--steps", "1", "--attention", "dense"]
    command += ["--text", tmp_path / "text.txt", "--plot", tmp_path / "curve.png"]
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    command += ["--checkpoint", tmp_path / "dense.pt", "--bfloat16", "--recompute"]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "dense after 1 steps" in run.stdout and "closed" not in run.stdout
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
