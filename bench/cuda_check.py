"""The subcommand `cuda-check`: flexdga's kernels compiled for GPUs that need not be there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from . import hardware, options
from .cuda_cases import Case, all_cases, quick_cases
from .cuda_pretend import ARCHITECTURES, build_shim, why_not
from .cuda_worker import Kernel, Outcome
from .errors import UsageError
from .progress import Stages
from .report import listed, number, table, wrap, write_json

LEGEND = {
    "case": "attend: compression, block mask and kernel, with a plan that is given; call: "
    "dga_attention, planner included, as it compiles itself for any length; graph: the same in a "
    "torch.compile(fullgraph=True); decode: a step over a cache. opens: the default DGAConfig in "
    "causal scope; groups: groups with their mass as bias, nothing opens. Then query heads for "
    "each KV head; a score mod with a parameter; train: forward and backward.",
    "kernel": "fwd, bwd: flex_attention's; N others: the largest figure of the other Triton "
    "kernels.",
    "regs": "registers of a thread, of 255.",
    "spill": "bytes a thread stores outside of registers, and loads again.",
    "KiB": "shared memory of a block.",
    "runs": "kernels that one pass launches; ATen's are not counted.",
}


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What came of all cases, by architecture."""

    header: dict[str, Any]
    outcomes: dict[str, list[Outcome]]

    @property
    def failed(self) -> bool:
        """Whether anything is wrong anywhere."""
        return any(outcome.problems for found in self.outcomes.values() for outcome in found)

    def text(self) -> str:
        """Header, a table for each architecture, problems, legend."""
        parts = [listed(self.header)]
        for name, found in self.outcomes.items():
            lines = [line for outcome in found for line in _lines(outcome)]
            title = f"{name} ({ARCHITECTURES[name].name}"
            title += f", {ARCHITECTURES[name].shared_memory // 1024} KiB of shared memory)"
            parts.append(f"{title}\n{table(lines)}" if lines else f"{title}: nothing")
            problems = [f"- {o.case}: {problem}" for o in found for problem in o.problems]
            if problems:
                parts.append("\n".join([f"Problems on {name}", *map(wrap, problems)]))
        parts.append(listed(LEGEND))
        count = sum(len(found) for found in self.outcomes.values())
        bad = sum(bool(o.problems) for found in self.outcomes.values() for o in found)
        parts.append(
            f"{bad} of {count} cases have problems."
            if bad
            else f"All {count} cases lower fully, compile to cubin, and fit."
            if count
            else "Nothing was compiled."
        )
        return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench cuda-check`."""
    add = parser.add_argument
    add(
        "--arch",
        default=",".join(ARCHITECTURES),
        metavar="SM,SM,...",
        help=f"architectures (default {','.join(ARCHITECTURES)})",
    )
    add("--quick", action="store_true", help="few cases, without the planner")
    add(
        "--only",
        metavar="TEXT",
        help="cases whose name, as the table has it, contains this",
    )
    add("--json", metavar="PATH", help="all numbers as JSON; - for stdout (tables go to stderr)")


def run(arguments: argparse.Namespace) -> int:
    """Compile, print the tables, write the file. 1 if anything is wrong."""
    begin = time.perf_counter()
    names = _check_architectures(arguments.arch)
    options.check_outputs(arguments.json, None, None)
    reason = why_not()
    if reason is not None:
        raise UsageError(reason)
    cases = quick_cases() if arguments.quick else all_cases()
    if arguments.only is not None:
        cases = [case for case in cases if arguments.only in str(case)]
        if not cases:
            raise UsageError(f"--only {arguments.only}: no case has that in its name")
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    wall = "wall time"
    try:
        with Stages(len(names) * len(cases)) as stages:
            for name in names:
                stages.begin(f"{name}: {cases[0]}")
                for i, outcome in enumerate(check(name, cases), 1):
                    outcomes[name].append(outcome)
                    stages.end()
                    if i < len(cases):
                        stages.begin(f"{name}: {cases[i]}")
    except KeyboardInterrupt:  # what took minutes is not thrown away
        wall = "stopped after"
    report = CheckReport(
        {
            "versions": f"{hardware.versions()}, triton {version('triton')}",
            "shapes": "B=1, Hkv=2, L=2048",
            wall: f"{time.perf_counter() - begin:.0f} s",
        },
        outcomes,
    )
    print(report.text(), file=sys.stderr if arguments.json == "-" else sys.stdout)
    if arguments.json is not None:
        write_json(report, arguments.json)
    return 130 if wall == "stopped after" else int(report.failed)


def check(architecture: str, cases: Sequence[Case]) -> Iterator[Outcome]:
    """Compile the cases for an architecture of `ARCHITECTURES`, in a process of its own.

    Raises:
        RuntimeError: there is no C++ compiler, or the process broke down.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        wanted = json.dumps([dataclasses.asdict(case) for case in cases])
        module = f"{__package__}.cuda_worker"
        command = [sys.executable, "-m", module, build_shim(folder), architecture, wanted]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as worker:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    if line.startswith("{"):
                        fields = json.loads(line)
                        kernels = [Kernel(**kernel) for kernel in fields.pop("kernels")]
                        yield Outcome(kernels=kernels, **fields)
            except BaseException:  # nobody listens any more
                worker.kill()
                raise
        if worker.returncode:
            errors.seek(0)
            raise RuntimeError(f"compiling for {architecture} broke down:\n{errors.read()[-2000:]}")


def _check_architectures(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in ARCHITECTURES:
            raise UsageError(f"--arch {text}: expected some of {', '.join(ARCHITECTURES)}")
    return names


def _lines(outcome: Outcome) -> list[dict[str, str]]:
    parts = {"fwd": "forward", "bwd": "backward", "others": "other"}
    lines: list[dict[str, str]] = []
    for label, part in parts.items():
        kernels = [kernel for kernel in outcome.kernels if kernel.part == part]
        if not kernels:
            continue
        label = f"{len(kernels)} {label}" if part == "other" else label
        lines.append(
            {
                "case": "" if lines else outcome.case,
                "kernel": label,
                "regs": str(max(kernel.registers for kernel in kernels)),
                "spill": str(max(kernel.spill_bytes for kernel in kernels)),
                "KiB": number(max(kernel.shared_bytes for kernel in kernels) / 1024),
                "runs": "" if lines else str(outcome.launches),
            }
        )
    empty = dict.fromkeys(("kernel", "regs", "spill", "KiB", "runs"), "")
    return lines or [{"case": outcome.case} | empty]
