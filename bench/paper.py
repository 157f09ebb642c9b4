"""The subcommand `paper`: the claims of the papers, each reproduced small on a real model.

Each says what the paper says, what was measured, and whether it holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import (
    hardware,
    options,
    paper_convergence,
    paper_hessian,
    paper_latency,
    paper_noise,
    paper_sparsity,
)
from .attended import capture
from .errors import UsageError
from .paper_claim import Claim
from .progress import Stages
from .report import listed, write_json
from .workloads import QKV, default_text, open_model

CLAIMS = ("1", "2", "3", "4")
DRAW: dict[str, Callable[[Claim, Any], None]] = {
    "1": paper_sparsity.draw,
    "2": paper_noise.draw,
    "3a": paper_hessian.draw,
    "3b": paper_convergence.draw,
    "4": paper_latency.draw,
}
CODE = 2_500_000
"""Characters of the standard library's sources that small models are trained on."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured of each claim."""

    sparsity: paper_sparsity.Settings
    noise: paper_noise.Settings
    hessian: paper_hessian.Settings
    convergence: paper_convergence.Settings
    latency: paper_latency.Settings


FULL = Sizes(
    paper_sparsity.FULL, paper_noise.FULL, paper_hessian.FULL, paper_convergence.FULL,
    paper_latency.FULL,
)  # fmt: skip
QUICK = Sizes(
    paper_sparsity.QUICK, paper_noise.QUICK, paper_hessian.QUICK, paper_convergence.QUICK,
    paper_latency.QUICK,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PaperReport:
    """A measurement: facts about it, and the claims."""

    header: dict[str, Any]
    claims: list[Claim]

    def text(self) -> str:
        """Header, claims, and how many of their statements hold."""
        parts = [listed(self.header)]
        parts += [claim.text() for claim in self.claims]
        found = [finding for claim in self.claims for finding in claim.findings]
        count = {verdict: sum(f.holds is verdict for f in found) for verdict in (True, False, None)}
        parts.append(
            f"Statements: {len(found)}; {count[True]} hold, {count[False]} do not, "
            f"{count[None]} were left open."
        )
        return "\n\n".join(parts)

    def draw(self, folder: Path) -> None:
        """A picture of each claim."""
        from matplotlib.figure import Figure

        for claim in self.claims:
            figure = Figure(figsize=(10, 4.5), layout="constrained")
            DRAW[claim.number](claim, figure)
            about = f"{self.header['model']}; {self.header['hardware']}"
            figure.suptitle(f"{claim.number}. {claim.title}\n{about}", fontsize="small")
            figure.savefig(folder / f"paper_{claim.number}.png", dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench paper`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a local Hugging Face model")
    add("--quick", action="store_true", help="less of everything: two minutes, not fifteen")
    add("--claims", type=_claims, default=CLAIMS, metavar="N,...",
        help="of 1 sparsity, 2 noise, 3 optimisation, 4 latency (default all)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("--threads", type=options.positive_int, metavar="N", help="CPU threads (default torch's)")
    add("--json", metavar="FILE", help="everything with full digits; - for stdout")
    add("--plots", type=Path, metavar="FOLDER", help="PNGs, one per claim (needs the `plot` extra)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the claims, write the files."""
    begin, cpu = time.perf_counter(), time.process_time()
    _check(arguments)
    torch.manual_seed(arguments.seed)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    claims = measure(arguments.model, arguments.claims, arguments.seed, sizes_of(arguments.quick))
    report = PaperReport(
        {
            "hardware": hardware.device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "versions": hardware.versions(),
            "model": f"{arguments.model.name}, float32",
            "texts": "Python's help (English), the standard library's sources (code)",
            "seed": arguments.seed,
            "wall time": f"{time.perf_counter() - begin:.0f} s",
            "CPU time": f"{time.process_time() - cpu:.0f} s",
        },
        claims,
    )
    print(report.text(), file=sys.stderr if arguments.json == "-" else sys.stdout)
    if arguments.json is not None:
        write_json(report, arguments.json)
    if arguments.plots is not None:
        report.draw(arguments.plots)
    return 0


def sizes_of(quick: bool) -> Sizes:
    """How much is measured with `--quick`, and without."""
    return QUICK if quick else FULL


def measure(path: Path, chosen: Sequence[str], seed: int, sizes: Sizes) -> list[Claim]:
    """The claims, in order.

    Args:
        path: of the model.
        chosen: of `CLAIMS`.
        seed: of the noise.
        sizes: how much.
    """
    model, tokenizer = open_model(path, torch.float32)
    texts = {"English": default_text(), "code": library_text()}
    found: list[Claim] = []
    with Stages(_count(chosen)) as stages:

        def add(title: str, make: Callable[[], Claim]) -> None:
            stages.begin(title)
            begin, cpu = time.perf_counter(), time.process_time()
            claim = make()
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
            found.append(dataclasses.replace(claim, seconds=seconds, cpu_seconds=cpu_seconds))
            stages.end()

        captured: dict[str, list[QKV]] = {}
        ids: dict[str, Tensor] = {}
        if {"1", "2", "3"} & set(chosen):
            longest = max(max(sizes.sparsity.lengths), sizes.noise.length)
            stages.begin("reading texts")
            for name, text in list(texts.items())[: sizes.sparsity.texts]:
                ids[name] = _first(tokenizer, text, longest)
                captured[name] = capture(model, ids[name])
            stages.end()
        if "1" in chosen:
            add("sparsity", lambda: paper_sparsity.measure(
                captured, sizes.sparsity.lengths, seed, stages.detail
            ))  # fmt: skip
        if "2" in chosen:
            add("noise", lambda: paper_noise.measure(
                model, captured["English"], ids["English"], sizes.noise, seed, stages.detail
            ))  # fmt: skip
        if "3" in chosen:
            add("condition number", lambda: paper_hessian.measure(
                captured, sizes.hessian, stages.detail
            ))  # fmt: skip
            captured.clear()
            whole = tokenizer("\n".join(texts.values()), verbose=False)["input_ids"]
            add("convergence", lambda: paper_convergence.measure(
                torch.tensor(whole), sizes.convergence, stages.detail
            ))  # fmt: skip
        if "4" in chosen:
            add("latency", lambda: paper_latency.measure(
                model, sizes.latency, seed, stages.detail
            ))  # fmt: skip
    return found


def library_text() -> str:
    """The standard library's sources, in order of their names, as much as is needed of them."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    return "\n".join(path.read_text() for path in paths)[:CODE]


def _first(tokenizer: Any, text: str, count: int) -> Tensor:
    """(1, count) ids with which a text begins."""
    ids = tokenizer(text[: 32 * count], truncation=True, max_length=count)["input_ids"]
    if len(ids) < count:
        raise UsageError(f"--model: its tokenizer makes {len(ids)} tokens, expected {count}")
    return torch.tensor([ids])


def _count(chosen: Sequence[str]) -> int:
    return len(chosen) + ("3" in chosen) + bool({"1", "2", "3"} & set(chosen))


def _claims(text: str) -> tuple[str, ...]:
    found = tuple(sorted({part.strip() for part in text.split(",")}))
    if wrong := [item for item in found if item not in CLAIMS]:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(CLAIMS)}, got {', '.join(wrong)}"
        )
    return found


def _check(a: argparse.Namespace) -> None:
    options.check_model_folder(a.model)
    options.check_output("--json", a.json)
    if a.plots is not None:
        options.check_installed("--plots", "matplotlib", "plot")
        if not a.plots.is_dir():
            raise UsageError(f"--plots {a.plots}: expected a folder that exists")
