"""The subcommand `fidelity`: what a model loses under each method at a given budget.

A model reads texts with every layer under a method, and is compared with itself under dense
attention: language modelling in `causal` scope. Then it answers questions about prompts of known
content (`fidelity_tasks`) in `prompt` scope, with the method in prompt and decode cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from flexdga import DGAConfig
from flexdga.config import Scope

from . import hardware, options
from .errors import UsageError
from .fidelity_methods import (
    METHODS,
    Entry,
    compare,
    compile_kernel,
    entries,
    fixed,
    keep_memory,
    logits_over_cache,
    next_token_logits,
    planned,
    prompt_cost,
    tail_log_probs,
    token_nll,
)  # fmt: skip
from .fidelity_report import FidelityReport, LmRow, TaskRow
from .fidelity_tasks import VARIANTS, Encode, Example, Maker, Variant, answer
from .progress import Stages
from .workloads import default_text, open_model

TASKS = ("lm", "needle", "tracking", "words")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is measured unless an option says otherwise.

    Attributes:
        beyond: methods at lengths beyond the first, unless methods are named.
        beyond_budgets: budgets there of what is read, unless budgets are named.
        compiled: whether openings are planned by compiled code, which pays over several windows.
    """

    tasks: tuple[str, ...]
    texts: int
    lengths: tuple[int, ...]
    windows: int
    methods: tuple[str, ...]
    beyond: tuple[str, ...]
    budgets: tuple[float, ...]
    beyond_budgets: tuple[float, ...]
    needles: tuple[Variant, ...]
    task_lengths: tuple[int, ...]
    task_budgets: tuple[float, ...]
    depths: tuple[float, ...]
    compiled: bool


BEST = ("auto", "default", "landmarks", "streaming_llm", "h2o", "block_selection")
FULL = Defaults(
    TASKS, 2, (4096, 8192), 3, tuple(METHODS), BEST,
    (0.10, 0.15, 0.22), (0.10,), VARIANTS, (1024, 4096), (0.15,), (0.1, 0.5, 0.9), True,
)  # fmt: skip
FEW = ("auto", "paper", "streaming_llm", "h2o")
QUICK = Defaults(
    ("lm", "needle"), 1, (2048,), 1, FEW, FEW, (0.15,), (0.15,), ("single",), (1024,), (0.15,),
    (0.5,), False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options(Defaults):
    """Checked options; `texts` counts those of `read`."""

    model: Path
    read: dict[str, str]
    examples: int
    seed: int
    dtype: torch.dtype
    device: torch.device
    threads: int | None
    config: DGAConfig | None
    slots: str | None
    json: str | None
    csv: str | None
    plot: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench fidelity`."""
    add = parser.add_argument
    shares, ints, names = _list_of(_share), options.lengths, _list_of(str)
    add("--model", type=Path, required=True, metavar="FOLDER", help="a local Hugging Face model")
    add("--text", type=Path, nargs="+", metavar="FILE",
        help="what it reads; tasks take their filler from the first (default: Python's help, and "
        "the source of typing.py)")  # fmt: skip
    add("--quick", action="store_true", help="less of everything: minutes, not an hour")
    add("--tasks", type=names, metavar="T,...", help=f"of {', '.join(TASKS)} (default all)")
    add("--methods", type=names, metavar="M,...",
        help=f"of {', '.join(METHODS)} (default all, but some for greater lengths); dense always "
        "comes first")  # fmt: skip
    add("--budgets", type=shares, metavar="B,...",
        help="shares of dense (default .10,.15,.22; beyond the first length .10)")  # fmt: skip
    add("--config", nargs="+", metavar="KEY=VALUE",
        help="one more method, called config: fields of DGAConfig, or a preset=")  # fmt: skip
    add("--slots", choices=("float", "int8"),
        help="of DGACache; texts are then read over one too, 64 tokens at a time")  # fmt: skip
    add("--lengths", type=ints, metavar="L,...", help="tokens to read (default 4096,8192)")
    add("--windows", type=options.positive_int, metavar="N",
        help="stretches of each text, spread over it (default 3)")  # fmt: skip
    add("--task-lengths", type=ints, metavar="L,...", help="of prompts (default 1024,4096)")
    add("--task-budgets", type=shares, metavar="B,...", help="of the tasks (default .15)")
    add("--needles", type=names, metavar="N,...", help=f"of {', '.join(VARIANTS)} (default all)")
    add("--depths", type=shares, metavar="D,...", help="of the needle (default .1,.5,.9)")
    add("--examples", type=options.positive_int, default=1, metavar="N",
        help="of each task, length and depth (default 1)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the tasks (default 0)")
    options.add_machine(parser)
    add("--json", metavar="FILE", help="everything with full digits; - for stdout")
    add("--csv", metavar="FILE", help="the rows")
    add("--plot", metavar="FILE.png", help="KL over cost (needs the `plot` extra)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    begin = time.perf_counter()
    chosen = _check(arguments)
    keep_memory()
    torch.manual_seed(chosen.seed)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    model, encode, prefix = _open(chosen)
    lm = {n: _entries(chosen, n, "causal") for n in chosen.lengths if "lm" in chosen.tasks}
    windows = _windows(chosen, encode, prefix) if lm else {}
    examples = _examples(chosen, encode, prefix)
    tasks = {n: _entries(chosen, n, "prompt") for n in examples}
    total = 1 + sum(len(found) * len(lm[n]) for (_, n), found in windows.items())
    total += sum((len(found) + 1) * len(tasks[n]) for n, found in examples.items())
    rows: list[LmRow] = []
    task_rows: list[TaskRow] = []
    with torch.no_grad(), Stages(total) as stages:
        stages.begin("compiling")
        compile_s = _compile(model, [*lm.items(), *tasks.items()], chosen.compiled)
        stages.end()
        for (text, length), found in windows.items():
            for index, (offset, ids) in enumerate(found):
                where = (text, length, index, offset)
                rows += _read_window(model, ids, lm[length], where, chosen, stages)
        for length, made in examples.items():
            task_rows += _ask(model, made, tasks[length], length, chosen, stages)
    limit = getattr(model.config, "max_position_embeddings", None)
    shown = [METHODS[name] for name in chosen.methods]
    report = FidelityReport(
        {
            "hardware": hardware.device_name(chosen.device),
            "threads": torch.get_num_threads(),
            "versions": hardware.versions(),
            "model": f"{chosen.model.name}, {str(chosen.dtype).removeprefix('torch.')}, "
            f"{limit} positions, every layer",
            "measured": f"{', '.join(chosen.tasks)}; lm in causal scope, the rest in prompt scope "
            "with DGACache; dense_below=0 everywhere",
            "texts": ", ".join(chosen.read),
            "lengths": {"lm": list(lm), "prompts": list(tasks)},
            "slots": "none while a text is read" if chosen.slots is None else chosen.slots,
            "seed": chosen.seed,
            "methods": {method.name: method.what for method in shown},
            "config": "none" if chosen.config is None
            else options.non_default_fields(chosen.config),
            "compiling": f"{compile_s:.1f} s, apart from all that follows",
            "wall time": f"{time.perf_counter() - begin:.0f} s",
        },
        rows,
        task_rows,
    )  # fmt: skip
    print(report.text(), file=sys.stderr if chosen.json == "-" else sys.stdout)
    report.write(chosen.json, chosen.csv, chosen.plot)
    return 0


# Options


def _check(a: argparse.Namespace) -> Options:
    options.check_model_folder(a.model)
    options.check_outputs(a.json, a.csv, a.plot)
    standard = dataclasses.asdict(QUICK if a.quick else FULL)
    given = {name: getattr(a, name, None) for name in standard}
    fields = standard | {name: value for name, value in given.items() if value is not None}
    fields["beyond"] = a.methods or fields["beyond"]
    fields["beyond_budgets"] = a.budgets or fields["beyond_budgets"]
    for name, allowed in (("tasks", TASKS), ("methods", tuple(METHODS)), ("needles", VARIANTS)):
        if wrong := [item for item in fields[name] if item not in allowed]:
            raise UsageError(f"--{name} {','.join(wrong)}: expected some of: {', '.join(allowed)}")
    if a.plot is not None and "lm" not in fields["tasks"]:
        raise UsageError("--plot shows language modelling; expected lm among --tasks")
    read = _texts(a.text, standard["texts"])
    config = None if a.config is None else options.parse_config(a.config, dense_below=0)
    return Options(
        **fields | {"texts": len(read)}, model=a.model, read=read, examples=a.examples,
        seed=a.seed, dtype=options.DTYPES[a.dtype],
        device=options.check_device(a.device), threads=a.threads, config=config, slots=a.slots,
        json=a.json, csv=a.csv, plot=a.plot,
    )  # fmt: skip


def _texts(paths: Sequence[Path] | None, count: int) -> dict[str, str]:
    if paths is None:
        found = {"English": default_text(), "code": Path(typing.__file__).read_text()}
        return dict(list(found.items())[:count])
    texts: dict[str, str] = {}
    for path in paths:
        try:
            texts[path.name if path.name not in texts else str(path)] = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--text {path}: {error}") from error
    return texts


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")
    return value


def _list_of(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    def parse(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))

    return parse


def _open(chosen: Options) -> tuple[Any, Encode, list[int]]:
    """The model, its tokenizer, and the special tokens with which texts begin."""
    model, tokenizer = open_model(chosen.model, chosen.dtype)
    model = model.to(chosen.device)
    limit = getattr(model.config, "max_position_embeddings", None)
    for name in ("lengths", "task_lengths"):
        longest = max(getattr(chosen, name))
        if limit is not None and longest > limit:
            raise UsageError(
                f"--{name.replace('_', '-')}: the model has {limit} positions, got {longest}"
            )

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return model, encode, list(tokenizer("")["input_ids"])


# What is measured


def _entries(chosen: Options, length: int, scope: Scope) -> list[Entry]:
    first, budgets = chosen.task_lengths[0], chosen.task_budgets
    if scope == "causal":
        first = chosen.lengths[0]
        budgets = chosen.budgets if length == first else chosen.beyond_budgets
    methods = [METHODS[n] for n in (chosen.methods if length == first else chosen.beyond)]
    if chosen.config is not None:
        methods.append(fixed("config", chosen.config, "--config"))
    return entries(methods, budgets, length, scope)


def _windows(
    chosen: Options, encode: Encode, prefix: list[int]
) -> dict[tuple[str, int], list[tuple[int, Tensor]]]:
    """By text and length: start and (1, L) tokens of each window, at the same starts."""
    found = {}
    longest = chosen.lengths[-1]
    for name, text in chosen.read.items():
        ids = encode(text)
        apart = len(ids) // chosen.windows
        if apart < longest:
            raise UsageError(
                f"--text: {name} has {len(ids)} tokens, expected at least "
                f"{longest * chosen.windows} for --lengths and --windows"
            )
        for length in chosen.lengths:
            found[name, length] = [
                (at, torch.tensor([[*prefix, *ids[at:]][:length]]))
                for at in range(0, apart * chosen.windows, apart)
            ]
    return found


def _examples(
    chosen: Options, encode: Encode, prefix: list[int]
) -> dict[int, list[tuple[int, Example]]]:
    """By length: numbered examples of all tasks."""
    tasks = set(chosen.tasks) - {"lm"}
    if not tasks:
        return {}
    filler = encode(next(iter(chosen.read.values())))
    found: dict[int, list[tuple[int, Example]]] = {n: [] for n in chosen.task_lengths}
    for number in range(chosen.examples):
        maker = Maker(encode, filler, prefix, chosen.seed + number)
        for length, made in found.items():
            if "needle" in tasks:
                made += [
                    (number, maker.needle(variant, length, depth))
                    for variant in chosen.needles
                    for depth in chosen.depths
                ]
            if "tracking" in tasks:
                made.append((number, maker.tracking(length)))
            if "words" in tasks:
                made.append((number, maker.words(length)))
    return found


def _compile(model: Any, groups: Iterable[tuple[int, Sequence[Entry]]], compiled: bool) -> float:
    """Compile attention for entries by length, so that no row's seconds hold it."""
    begin = time.perf_counter()
    for config, length in dict.fromkeys((e.config, length) for length, g in groups for e in g):
        if config is not None and config.prefill != "dense":
            compile_kernel(model, config, length, compiled=compiled)
    return time.perf_counter() - begin


def _read_window(
    model: Any,
    ids: Tensor,
    rivals: Sequence[Entry],
    where: tuple[str, int, int, int],
    chosen: Options,
    stages: Stages,
) -> Iterator[LmRow]:
    """All methods on one window; dense comes first, and the others are compared with it."""
    ids = ids.to(model.device)
    half = ids.shape[1] // 2
    dense: Tensor | None = None
    for entry in rivals:
        stages.begin(f"{where[0]}, {where[1]} tokens, {entry.method}")
        begin = time.perf_counter()
        plan_s = 0.0
        if chosen.slots is None or entry.config is None:
            with planned(model, entry.config, compiled=chosen.compiled) as plans:
                logits = next_token_logits(model, ids)
            cost, plan_s = plans.cost, sum(plans.seconds)
        else:
            cost = prompt_cost(model, ids[0].tolist(), entry.config, compiled=chosen.compiled)
            begin = time.perf_counter()
            logits = logits_over_cache(model, ids, entry.config, _kv_dtype(chosen.slots))
        seconds = time.perf_counter() - begin
        nll = token_nll(logits, ids)
        if dense is None:
            dense = tail_log_probs(logits, half)
        kl, top1 = compare(dense, logits[half:])
        del logits
        stages.end()
        yield LmRow(
            *where, entry.method, entry.budget, _fields(entry.config), cost=cost,
            nll=nll.mean().item(), tail_nll=nll[half:].mean().item(), kl=kl, top1=top1,
            plan_s=plan_s, seconds=seconds,
        )  # fmt: skip


def _ask(
    model: Any,
    examples: Sequence[tuple[int, Example]],
    rivals: Sequence[Entry],
    length: int,
    chosen: Options,
    stages: Stages,
) -> Iterator[TaskRow]:
    """All methods on all questions of one length."""
    for entry in rivals:
        stages.begin(f"prompts of {length} tokens, {entry.method}, cost")
        cost = prompt_cost(model, examples[0][1].prompt, entry.config, compiled=chosen.compiled)
        stages.end()
        for number, example in examples:
            stages.begin(f"{example.task}, {length} tokens, {entry.method}")
            begin = time.perf_counter()
            found = answer(model, example, entry.config, _kv_dtype(chosen.slots))
            seconds = time.perf_counter() - begin
            stages.end()
            yield TaskRow(
                example.task, length, example.depth, number, entry.method, entry.budget,
                _fields(entry.config), cost=cost, **dataclasses.asdict(found),
                answer_tokens=len(example.answer), seconds=seconds,
            )  # fmt: skip


def _kv_dtype(slots: str | None) -> Literal["int8"] | None:
    return "int8" if slots == "int8" else None


def _fields(config: DGAConfig | None) -> dict[str, Any]:
    return {} if config is None else options.non_default_fields(config)
