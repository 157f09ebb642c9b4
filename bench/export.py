"""The subcommand `export`: a model as a package, checked without flexdga, and timed."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import flexdga
from flexdga import DGAConfig

from . import hardware, measure, options
from .errors import UsageError
from .progress import Stages
from .report import number, spell, spell_range, table, wrap, write_json

LENGTHS = (512, 1024, 2048)
QUICK_LENGTHS = (65, 130, 200)
EXAMPLE = (2, 100)
"""Batch and length of the example at export; no other call has them."""
BATCHES = (1, 3)
BUDGET = 10.0
"""Seconds of timed calls for each length."""
TOLERANCE = 1e-4
"""Relative error allowed of float32 logits: a few hundred units of 6e-8, for sums of thousands of
products through all layers. An opening that falls the other way is more, and is then reported."""
EXPORTED, EAGER, COMPILED, DENSE = "DGA exported", "DGA eager", "DGA compiled", "dense exported"
LEGEND = {
    "ms": "a prompt of one row to the logits of all its tokens, median of calls in turn, ± half "
    "the distance from the fastest to the slowest.",
    "error": "|exported - eager| / |eager| (Frobenius norms) of the wrapped model's logits, of a "
    "process that imports torch alone; the worse of batch 1 and 3.",
    "made in s": "export and compilation; for compiled: the first call at the first length.",
}
CHECK = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([model(x) for x in torch.load(sys.argv[2])], sys.argv[3])
assert not {"flexdga", "transformers", "score_mods"} & set(sys.modules)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options."""

    model: Path
    lengths: tuple[int, ...]
    layers: int | None
    compiled: bool
    threads: int | None
    repeats: int | None
    seed: int
    config: DGAConfig
    tolerance: float
    json: str | None


@dataclasses.dataclass(frozen=True)
class Made:
    """How long a method took to make, and its bytes on disk if it has any."""

    method: str
    seconds: float
    mib: float | None


@dataclasses.dataclass(frozen=True)
class ExportRow:
    """One method at one length; times in ms."""

    length: int
    method: str
    runs: int
    median_ms: float
    min_ms: float
    max_ms: float
    error: float | None


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """A measurement: facts about it, what was made, and its rows."""

    header: dict[str, Any]
    made: list[Made]
    rows: list[ExportRow]

    def text(self) -> str:
        """Header, tables and legend."""
        parts = ["\n".join(wrap(f"{key}: {spell(value)}") for key, value in self.header.items())]
        parts.append(table([_made_line(made) for made in self.made]))
        for length, rows in groupby(self.rows, key=lambda row: row.length):
            parts.append(f"L = {length}\n{table([_line(row) for row in rows])}")
        parts.append("\n".join(wrap(f"{key}: {text}") for key, text in LEGEND.items()))
        return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench export`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a local Hugging Face model")
    add("--layers", type=options.positive_int, metavar="N", help="its first N layers alone")
    add(
        "--lengths", type=options.lengths, metavar="L,L,...",
        help=f"tokens (default {','.join(map(str, LENGTHS))})",
    )  # fmt: skip
    quick = ",".join(map(str, QUICK_LENGTHS))
    add("--quick", action="store_true", help=f"short texts ({quick}), and without torch.compile")
    add("--threads", type=options.positive_int, metavar="N", help="CPU threads (default torch's)")
    options.add_repeats(parser, BUDGET)
    add("--seed", type=int, default=0)
    add(
        "--config", nargs="+", default=[], metavar="KEY=VALUE",
        help="fields of DGAConfig, or preset=NAME. Without them DGAConfig's defaults, but "
        "dense_below=0",
    )  # fmt: skip
    add("--tolerance", type=float, default=TOLERANCE, metavar="X",
        help=f"relative error beyond which the command fails (default {TOLERANCE})")  # fmt: skip
    add("--json", metavar="PATH", help="all numbers as JSON; - for stdout (tables go to stderr)")


def run(arguments: argparse.Namespace) -> int:
    """Export, check, measure, print the tables, write the file; 1 if a number is off."""
    begin = time.perf_counter()
    chosen = _check(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    model = _open(chosen)
    with Stages(4) as stages, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made, rows = _measure(model, chosen, Path(folder), stages)
    report = ExportReport(
        {
            "hardware": hardware.device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "versions": hardware.versions(),
            "model": f"{chosen.model.name}, {model.config.num_hidden_layers} layers, float32",
            "DGAConfig": options.non_default_fields(chosen.config),
            "exported at": f"batch {EXAMPLE[0]}, {EXAMPLE[1]} tokens; random tokens, seed "
            f"{chosen.seed}",
            "rounds": spell_range(row.runs for row in rows),
            "wall time": f"{time.perf_counter() - begin:.0f} s",
        },
        made,
        rows,
    )
    print(report.text(), file=sys.stderr if chosen.json == "-" else sys.stdout)
    if chosen.json is not None:
        write_json(report, chosen.json)
    worst = max(row.error or 0.0 for row in rows)
    if not worst <= chosen.tolerance:
        print(f"error: {worst:.1e} is more than --tolerance {chosen.tolerance}", file=sys.stderr)
        return 1
    return 0


def _check(a: argparse.Namespace) -> Options:
    """Everything that can be wrong, found before anything runs."""
    options.check_model_folder(a.model)
    options.check_outputs(a.json, None, None)
    lengths = a.lengths or (QUICK_LENGTHS if a.quick else LENGTHS)
    if EXAMPLE[1] in lengths or min(lengths) < 2:
        raise UsageError(
            f"--lengths: expected at least 2 and not {EXAMPLE[1]}, the length at export, got "
            f"{','.join(map(str, lengths))}"
        )
    return Options(
        model=a.model, lengths=lengths, layers=a.layers, compiled=not a.quick, threads=a.threads,
        repeats=a.repeats, seed=a.seed, config=options.parse_config(a.config, dense_below=0),
        tolerance=a.tolerance, json=a.json,
    )  # fmt: skip


def _open(chosen: Options) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(chosen.model)
    if chosen.layers is not None:
        config.num_hidden_layers = min(chosen.layers, config.num_hidden_layers)
    model: Any = AutoModelForCausalLM.from_pretrained(
        chosen.model, config=config, dtype=torch.float32
    )
    return model.eval()


def _measure(
    model: Any, chosen: Options, folder: Path, stages: Stages
) -> tuple[list[Made], list[ExportRow]]:
    torch.manual_seed(chosen.seed)
    shapes = [(batch, length) for length in chosen.lengths for batch in BATCHES]
    tokens = {shape: torch.randint(model.config.vocab_size, shape) for shape in shapes}
    example = torch.randint(model.config.vocab_size, EXAMPLE)

    stages.begin(DENSE)
    dense, dense_made = _export(DENSE, folder / "dense.pt2", _dense(model, example))
    stages.end()
    flexdga.wrap(model, chosen.config)
    stages.begin(EXPORTED)
    path = folder / "dga.pt2"
    exported, exported_made = _export(
        EXPORTED, path, lambda target: flexdga.export(model, example, target)
    )
    stages.end()
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        EXPORTED: exported, EAGER: lambda x: _logits(model, x), DENSE: dense,
    }  # fmt: skip
    made = [exported_made, dense_made]
    stages.begin("check")
    errors = _errors(path, tokens, calls[EAGER])
    if chosen.compiled:
        compiled: Any = torch.compile(_logits, dynamic=True)
        began = time.perf_counter()
        compiled(model, tokens[BATCHES[0], chosen.lengths[0]])
        made.append(Made(COMPILED, time.perf_counter() - began, None))
        calls[COMPILED] = lambda x: compiled(model, x)
    stages.end()
    stages.begin("timing")
    rows: list[ExportRow] = []
    for length in chosen.lengths:
        rows += _at_length(length, tokens[BATCHES[0], length], calls, errors, chosen)
    stages.end()
    return made, rows


class _Logits(nn.Module):
    """A model without a cache, as one input and one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) tokens to (B, L, vocabulary) logits."""
        return _logits(self.model, tokens)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    out = model(tokens, use_cache=False, return_dict=False)
    logits: Tensor = out[0]
    return logits


def _dense(model: nn.Module, example: Tensor) -> Callable[[Path], object]:
    """The model as it is, as a package."""

    def export(target: Path) -> object:
        shapes = ({0: Dim("batch", min=1), 1: Dim("length", min=2)},)
        program = torch.export.export(_Logits(model), (example,), dynamic_shapes=shapes)
        return torch._inductor.aoti_compile_and_package(program, package_path=str(target))

    return export


def _export(
    method: str, path: Path, export: Callable[[Path], object]
) -> tuple[Callable[[Tensor], Tensor], Made]:
    began = time.perf_counter()
    export(path)
    seconds = time.perf_counter() - began
    return flexdga.load(path), Made(method, seconds, path.stat().st_size / 2**20)


def _errors(
    path: Path, tokens: dict[tuple[int, int], Tensor], eager: Callable[[Tensor], Tensor]
) -> dict[int, float]:
    """By length, of a new process: the worst batch's relative error."""
    asked, answered = path.with_name("asked.pt"), path.with_name("answered.pt")
    torch.save(list(tokens.values()), asked)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, path, asked, answered], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the package does not run with torch alone:\n{done.stderr}")
    errors: dict[int, float] = {}
    for (_, length), x, got in zip(tokens, tokens.values(), torch.load(answered)):
        want = eager(x)
        error = float((got - want).norm() / want.norm())
        errors[length] = max(errors.get(length, 0.0), error)
    return errors


def _at_length(
    length: int, tokens: Tensor, calls: dict[str, Callable[[Tensor], Tensor]],
    errors: dict[int, float], chosen: Options,
) -> list[ExportRow]:  # fmt: skip
    def bound(call: Callable[[Tensor], Tensor]) -> measure.Call:
        return lambda: call(tokens)

    every = {name: bound(call) for name, call in calls.items()}
    for call in every.values():
        call()
    device = torch.device("cpu")
    found = measure.interleave(every, device, rounds=chosen.repeats, budget=BUDGET)
    return [
        ExportRow(
            length=length,
            method=name,
            runs=len(timing.seconds),
            median_ms=1e3 * timing.median,
            min_ms=1e3 * timing.low,
            max_ms=1e3 * timing.high,
            error=errors[length] if name == EXPORTED else None,
        )
        for name, timing in found.items()
    ]


def _made_line(made: Made) -> dict[str, str]:
    return {
        "method": made.method,
        "made in s": number(made.seconds),
        "MiB on disk": "" if made.mib is None else number(made.mib, 4),
    }


def _line(row: ExportRow) -> dict[str, str]:
    spread = number((row.max_ms - row.min_ms) / 2, 2)
    return {
        "method": row.method,
        "ms": f"{number(row.median_ms)} ± {spread}",
        "error": "" if row.error is None else f"{row.error:.0e}",
    }
