"""The subcommand `export`: a model as a package that needs torch alone, checked and timed.

One text of random tokens is read and continued by every way to run the model: as a prompt, then
token by token. The numbers of the package come from a process that imports torch alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flexdga
from flexdga import DGAConfig
from flexdga.config import BY_LANDMARKS
from flexdga.static_layout import Layout

from . import hardware, options
from .errors import UsageError
from .export_report import ExportReport, ExportRow, Made
from .export_ways import Way, compiled, eager, exported
from .progress import Stages

LENGTHS = (512, 1024, 2048)
QUICK_LENGTHS = (65, 130, 200)
EXAMPLE = (2, 100)
"""Batch and length of the example at export; no other call has them."""
BATCHES = (1, 3)
TOKENS, QUICK_TOKENS = 32, 4
PROMPTS = 3
"""Timed prompts of each length and method."""
TOLERANCE = 1e-4
"""Relative error allowed of float32 logits: a few hundred units of 6e-8, for sums of thousands of
products through all layers. An opening that is close and falls the other way is more, in the tokens
that it reaches: so half of them have to be within,"""
OWN = 4
"""or within so many times what Python's own answers move by if embeddings do by their last bit."""
DGA, DENSE = "dga", "dense"
SHOWN = {DGA: "DGA", DENSE: "dense"}
CPU = torch.device("cpu")
CHECK = """
import sys, torch
from torch._inductor.package import load_package
prefill, decode = (load_package(sys.argv[1], name) for name in ("prefill", "decode"))
answers = []
for tokens, following in torch.load(sys.argv[2]):
    logits, *state = prefill(tokens)
    steps = [decode(token.contiguous(), *state) for token in following.split(1, 1)]
    answers.append(torch.cat([logits, *steps], 1))
torch.save(answers, sys.argv[3])
assert not {"flexdga", "transformers", "score_mods"} & set(sys.modules)
"""

Asked = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""By length and batch: a prompt (B, L), and the tokens (B, T) that follow it."""
Answers = dict[tuple[int, int], Tensor]
"""By length and batch: logits (B, 1 + T, vocabulary)."""
Errors = dict[tuple[str, int], list[float]]
"""By method and length: of each token of all batches."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options."""

    model: Path
    attention: tuple[str, ...]
    compiled: bool
    lengths: tuple[int, ...]
    tokens: int
    capacity: int
    layers: int | None
    threads: int | None
    seed: int
    config: DGAConfig
    tolerance: float
    json: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench export`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a local Hugging Face model")
    add(
        "--attention", nargs="+", choices=list(SHOWN), default=list(SHOWN),
        help="what is exported (default both)",
    )  # fmt: skip
    add("--compiled", action="store_true",
        help="time the same under torch.compile too, which takes as long to make")  # fmt: skip
    add("--layers", type=options.positive_int, metavar="N", help="its first N layers alone")
    add(
        "--lengths", type=options.lengths, metavar="L,L,...",
        help=f"tokens of a prompt (default {','.join(map(str, LENGTHS))})",
    )  # fmt: skip
    add("--tokens", type=options.positive_int, metavar="N",
        help=f"decoded after each prompt (default {TOKENS})")  # fmt: skip
    add("--capacity", type=options.positive_int, metavar="N",
        help="tokens that the package has room for (default as many as are needed)")  # fmt: skip
    quick = ",".join(map(str, QUICK_LENGTHS))
    add("--quick", action="store_true",
        help=f"short prompts ({quick}), {QUICK_TOKENS} tokens")  # fmt: skip
    add("--threads", type=options.positive_int, metavar="N", help="CPU threads (default torch's)")
    add("--seed", type=int, default=0)
    add(
        "--config", nargs="+", default=[], metavar="KEY=VALUE",
        help="fields of DGAConfig, or preset=NAME. Without a preset those of "
        "auto(.15, open_by='landmarks'), but dense_below=0",
    )  # fmt: skip
    add("--tolerance", type=float, default=TOLERANCE, metavar="X",
        help="relative error of half of the tokens beyond which the command fails (default "
        f"{TOLERANCE})")  # fmt: skip
    add("--json", metavar="FILE", help="everything with full digits; - for stdout")


def run(arguments: argparse.Namespace) -> int:
    """Export, check, measure, print the tables, write the file; 1 if a number is off."""
    begin = time.perf_counter()
    chosen = _check(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    model = _open(chosen)
    stages = Stages((2 + chosen.compiled) * len(chosen.attention) + len(chosen.lengths))
    with stages, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made, rows = _measure(model, chosen, Path(folder), stages)
    report = ExportReport(
        {
            "hardware": hardware.device_name(CPU),
            "threads": torch.get_num_threads(),
            "versions": hardware.versions(),
            "model": f"{chosen.model.name}, {model.config.num_hidden_layers} layers, float32",
            "DGAConfig": options.non_default_fields(chosen.config),
            "exported at": f"batch {EXAMPLE[0]}, {EXAMPLE[1]} tokens, with room for "
            f"{chosen.capacity}",
            "read": f"random tokens, seed {chosen.seed}; {PROMPTS} prompts, then {chosen.tokens} "
            "tokens, methods in turn",
            "wall time": f"{time.perf_counter() - begin:.0f} s",
        },
        made,
        rows,
    )
    print(report.text(), file=sys.stderr if chosen.json == "-" else sys.stdout)
    report.write(chosen.json)
    return verdict(rows, chosen.tolerance)


def verdict(rows: list[ExportRow], tolerance: float) -> int:
    """1, and a line that says why, if a number is off."""
    own = {(row.length, row.method.split()[0]): row.error for row in rows if "eager" in row.method}
    for row in rows:
        if not row.error <= max(tolerance, OWN * own[row.length, row.method.split()[0]]):
            print(
                f"error: {row.method}, {row.length} tokens: {row.error:.1e} is more than "
                f"--tolerance {tolerance}, and than {OWN} times what the last bit does to Python",
                file=sys.stderr,
            )
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
    tokens = a.tokens or (QUICK_TOKENS if a.quick else TOKENS)
    config = options.parse_config(a.config, BY_LANDMARKS, dense_below=0)
    return Options(
        model=a.model, attention=tuple(dict.fromkeys(a.attention)), compiled=a.compiled,
        lengths=lengths, tokens=tokens,
        capacity=_capacity(a.capacity, lengths[-1] + tokens, config), layers=a.layers,
        threads=a.threads, seed=a.seed, config=config,
        tolerance=a.tolerance, json=a.json,
    )  # fmt: skip


def _capacity(asked: int | None, need: int, config: DGAConfig) -> int:
    """Room for `need` tokens in whole steps of the plan, or what was asked for if it is that."""
    step = math.lcm(config.step, dataclasses.replace(config, scope="causal").step)
    capacity = max(-(-max(need, EXAMPLE[1]) // step), 2) * step if asked is None else asked
    if capacity < need:
        raise UsageError(
            f"--capacity {capacity}: expected room for the longest of --lengths and --tokens, "
            f"{need}"
        )
    try:
        Layout(config, capacity)
    except NotImplementedError as error:
        raise UsageError(f"--config: {error}") from error
    except ValueError as error:
        raise UsageError(f"--capacity: {error}") from error
    return capacity


def _open(chosen: Options) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(chosen.model, local_files_only=True)
    if chosen.layers is not None:
        config.num_hidden_layers = min(chosen.layers, config.num_hidden_layers)
    model: Any = AutoModelForCausalLM.from_pretrained(
        chosen.model, config=config, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def _measure(
    model: Any, chosen: Options, folder: Path, stages: Stages
) -> tuple[list[Made], list[ExportRow]]:
    torch.manual_seed(chosen.seed)
    asked = {
        (length, batch): (_tokens(model, batch, length), _tokens(model, batch, chosen.tokens))
        for length in chosen.lengths
        for batch in BATCHES
    }
    ways: list[Way] = []
    made: list[Made] = []
    errors: Errors = {}
    for attention in chosen.attention:
        config = chosen.config if attention == DGA else DGAConfig.dense()
        name, path = SHOWN[attention], folder / f"{attention}.pt2"
        python = eager(f"{name} eager", model, config)
        with flexdga.applied(model, config):
            stages.begin(f"{name}: export")
            example = _tokens(model, *EXAMPLE)
            package, of_export = exported(
                f"{name} exported", model, example, path, chosen.capacity, stages
            )
            made.append(of_export)
            stages.end()
        stages.begin(f"{name}: check")
        want = _answers(python, asked)
        _note(errors, package.name, _answers_elsewhere(path, asked), want)
        with _last_bit(model):
            _note(errors, python.name, _answers(python, asked), want)
        stages.end()
        ways += [package, python]
        if chosen.compiled:
            stages.begin(f"{name}: torch.compile")
            first = asked[chosen.lengths[0], BATCHES[0]][0]
            way, of_compile = compiled(f"{name} compiled", model, config, first, chosen.capacity)
            made.append(of_compile)
            # Of one row alone: more would be compiled anew.
            rows_of_one = {at: asked[at] for at in asked if at[1] == BATCHES[0]}
            _note(errors, way.name, _answers(way, rows_of_one), want)
            stages.end()
            ways.append(way)
    rows: list[ExportRow] = []
    for length in chosen.lengths:
        stages.begin(f"L = {length}: timing")
        rows += _at_length(length, *asked[length, BATCHES[0]], ways, errors)
        stages.end()
    return made, rows


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length))


# What they say, and how fast


@contextmanager
def _last_bit(model: Any) -> Iterator[None]:
    """A model whose embeddings are moved by the last bit of float32, up or down, or not."""
    weight = model.get_input_embeddings().weight
    saved = weight.detach().clone()
    weight.data.mul_(1 + 2**-23 * torch.randint(-1, 2, weight.shape))
    try:
        yield
    finally:
        weight.data.copy_(saved)


def _answers_elsewhere(path: Path, asked: Asked) -> Answers:
    """Of the package, in a new process."""
    question, answer = path.with_name("asked.pt"), path.with_name("answered.pt")
    torch.save(list(asked.values()), question)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, path, question, answer], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the package does not run with torch alone:\n{done.stderr}")
    return dict(zip(asked, torch.load(answer)))


def _answers(way: Way, asked: Asked) -> Answers:
    found: Answers = {}
    with way.ready():
        for at, (tokens, following) in asked.items():
            logits, state = way.prompt(tokens)
            steps = [way.step(token, state) for token in following.split(1, 1)]
            found[at] = torch.cat([logits, *steps], 1)
    return found


def _note(errors: Errors, name: str, got: Answers, want: Answers) -> None:
    for (length, batch), answer in got.items():
        of_tokens = token_errors(answer, want[length, batch])
        errors.setdefault((name, length), []).extend(of_tokens)


def token_errors(got: Tensor, want: Tensor) -> list[float]:
    """Relative errors (Frobenius norms) of the logits (B, T, vocabulary) of each token.

    Infinite where something is no number, so that it exceeds any other.
    """
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    found: list[float] = error.nan_to_num(nan=math.inf).flatten().tolist()
    return found


def _at_length(
    length: int, tokens: Tensor, following: Tensor, ways: list[Way],
    errors: Errors,
) -> list[ExportRow]:  # fmt: skip
    """Prompts in turn, then the tokens that follow in turn; the first of each is not counted."""
    states: dict[str, Any] = {}
    prompt_ms: dict[str, list[float]] = {way.name: [] for way in ways}
    token_ms: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(PROMPTS + 1):
        for way in ways:
            with way.ready():
                began = time.perf_counter()
                _, states[way.name] = way.prompt(tokens)
                prompt_ms[way.name].append(1e3 * (time.perf_counter() - began))
    for token in following.split(1, 1):
        for way in ways:
            with way.ready():
                began = time.perf_counter()
                way.step(token, states[way.name])
                token_ms[way.name].append(1e3 * (time.perf_counter() - began))
    rows = []
    for way in ways:
        off = errors[way.name, length]
        prompts, steps = prompt_ms[way.name][1:], token_ms[way.name][1:] or token_ms[way.name]
        rows.append(
            ExportRow(
                length=length,
                method=way.name,
                prompt_ms=statistics.median(prompts),
                prompt_min_ms=min(prompts),
                prompt_max_ms=max(prompts),
                token_ms=statistics.median(steps),
                token_min_ms=min(steps),
                token_max_ms=max(steps),
                tokens_per_s=1e3 / statistics.median(steps),
                error=statistics.median(off),
                worst=max(off),
            )
        )
    return rows
