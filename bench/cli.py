"""The command `flexdga-bench`: one subcommand per kind of measurement."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable

from flexdga import __version__

from . import attention, cuda_check, decode, export, fidelity, paper, parallel, train
from .errors import UsageError


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: its line of help, its options, and what it does (returns the exit status)."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: dict[str, Command] = {
    "attention": Command(
        "time, work and error of one attention call against dense baselines (the default)",
        attention.add_arguments,
        attention.run,
    ),
    "cuda-check": Command(
        "flexdga's kernels compiled for GPUs that need not be there: what they take, and whether "
        "they fit",
        cuda_check.add_arguments,
        cuda_check.run,
    ),
    "decode": Command(
        "time per token and cache size of a model after long prompts, dense against DGACache",
        decode.add_arguments,
        decode.run,
    ),
    "export": Command(
        "a model as a package that needs torch alone: its numbers, its speed, its size",
        export.add_arguments,
        export.run,
    ),
    "fidelity": Command(
        "what a model loses at a budget: language modelling and retrieval, method by method",
        fidelity.add_arguments,
        fidelity.run,
    ),
    "parallel": Command(
        "bytes, time and memory of attention over a sharded sequence, and a cost model of them",
        parallel.add_arguments,
        parallel.run,
    ),
    "paper": Command(
        "what the papers claim, each claim reproduced small on a model: does it hold?",
        paper.add_arguments,
        paper.run,
    ),
    "train": Command(
        "time and memory of one attention call forward and backward, DGA against SDPA",
        train.add_arguments,
        train.run,
    ),
}
DEFAULT = "attention"


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None = the process's own) and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, DEFAULT)
    try:
        arguments = _parser().parse_args(words)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except UsageError as error:
        print(f"flexdga-bench {arguments.command}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "flexdga-bench",
        description=f"Measure flexdga on this machine. Without a command: {DEFAULT}, whose "
        f"options `flexdga-bench {DEFAULT} --help` lists.",
    )
    parser.add_argument("--version", action="version", version=f"flexdga {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help.capitalize())
        command.add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
