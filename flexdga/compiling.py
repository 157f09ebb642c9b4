"""From an exported program to the files of a package; in a process of its own where that pays."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flexdga.calls import unfolding
from flexdga.inductor import checked_inputs, long_memory, ordered_strides
from flexdga.lowering import decomposition
from flexdga.repeats import folded
from flexdga.saying import log

Options = Mapping[str, Any] | None
"""Of Inductor."""
LARGE = 500
"""Nodes of a program, from which on it is compiled in a process of its own."""
_PROGRAM, _TASK, _ANSWER, _SAID = "program.pt2", "task", "answer", "said"
_COMMAND = "import sys; from flexdga.compiling import answer; answer(sys.argv[1])"


def all_compiled(
    programs: Iterator[tuple[str, ExportedProgram]], options: Options, processes: int | None
) -> dict[str, Any]:
    """The files of each program, by its name.

    Args:
        programs: the next is asked for when the one before it is being compiled.
        options: of Inductor.
        processes: 2 compiles the first in another process. None: 2 if it is large.
    """
    first, program = next(programs)
    if processes is None:
        large = len(program.graph.nodes) >= LARGE
        processes = 2 if large and (os.cpu_count() or 1) > 1 else 1
    with contextlib.ExitStack() as stack:
        files: Callable[[], Any] = functools.partial(compiled, first, program, options)
        if processes == 2:
            files = stack.enter_context(_meanwhile(first, program, options))
        others = {name: compiled(name, other, options) for name, other in programs}
        return {first: files(), **others}


@torch.no_grad()
def compiled(name: str, program: ExportedProgram, options: Options) -> Any:
    """The files that AOTInductor makes of a program."""
    began = time.perf_counter()
    assert program.example_inputs is not None  # of torch.export
    args, kwargs = program.example_inputs
    if _has_subclasses(program):
        program = program.run_decompositions({})  # which leaves their insides
    graph, pieces = folded(program.module(check_guards=False))
    chosen = dict(options or {}) | {"aot_inductor.package": True}
    log.info(
        "flexdga.export: compiling %s, %d nodes of %d",
        name, len(graph.graph.nodes), len(program.graph.nodes),
    )  # fmt: skip
    with long_memory(), checked_inputs(), ordered_strides(), unfolding(pieces, decomposition()):
        files = torch._inductor.aot_compile(graph, args, kwargs, options=chosen)
    log.info("flexdga.export: %s took %.0f s", name, time.perf_counter() - began)
    return files


def _has_subclasses(program: ExportedProgram) -> bool:
    """Whether weights are tensors of other kinds (torchao's), which have insides."""
    every = (*program.state_dict.values(), *program.constants.values())
    return any(is_traceable_wrapper_subclass(x) for x in every)


@contextlib.contextmanager
def _meanwhile(
    name: str, program: ExportedProgram, options: Options
) -> Iterator[Callable[[], Any]]:
    """Begin to compile a program in another process.

    What that process cannot do is done here instead, with a warning that says why: a program may
    call operators of the caller's own, which other processes do not know.

    Yields:
        What waits for the files, and returns them.
    """
    with tempfile.TemporaryDirectory(prefix="flexdga-") as made, contextlib.ExitStack() as stack:
        folder, why = Path(made), ""
        try:
            process = _begin(name, program, options, folder)
            stack.callback(process.wait)
            stack.callback(process.kill)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"

        def files() -> Any:
            nonlocal why
            if not why and process.wait() == 0:
                found, records = pickle.loads((folder / _ANSWER).read_bytes())
                for record in records:
                    if log.isEnabledFor(record.levelno):
                        log.handle(record)
                return found
            why = why or f"exit status {process.returncode}\n" + (folder / _SAID).read_text()
            log.warning("flexdga.export: %s is compiled again, after another process: %s",
                         name, why)  # fmt: skip
            return compiled(name, program, options)

        yield files


def _begin(
    name: str, program: ExportedProgram, options: Options, folder: Path
) -> subprocess.Popen[bytes]:
    torch.export.save(program, folder / _PROGRAM)
    task = name, dict(options or {}), torch.get_num_threads(), torch._inductor.config.save_config()
    (folder / _TASK).write_bytes(pickle.dumps(task))
    with open(folder / _SAID, "wb") as said:
        # -P: what the caller imports from is handed over; the working folder is not to be added.
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, folder],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        )  # fmt: skip


def answer(folder: str) -> None:
    """What the other process does: reads its task, compiles, and writes the files' names."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            record.msg, record.args = record.getMessage(), None
            records.append(record)

    records: list[logging.LogRecord] = []
    log.addHandler(Keep())
    log.setLevel(logging.INFO)
    task = pickle.loads(Path(folder, _TASK).read_bytes())
    name, options, threads, config = task
    torch.set_num_threads(threads)
    torch._inductor.config.load_config(config)
    program = torch.export.load(Path(folder, _PROGRAM))
    files = compiled(name, program, options)
    Path(folder, _ANSWER).write_bytes(pickle.dumps((files, records)))
