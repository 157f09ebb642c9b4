"""Ways to run a model as a prompt and then token by token: in Python, compiled, or exported."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flexdga
from flexdga import DGACache, DGAConfig

from .export_report import Made
from .progress import Stages
from .workloads import next_logits


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run a model.

    Attributes:
        name: of the attention, and how it is run.
        prompt: (B, L) tokens to (B, 1, vocabulary) logits, and what is left for the next token.
        step: (B, 1) tokens and that, which it changes, to (B, 1, vocabulary) logits.
        ready: inside which these are to be called.
    """

    name: str
    prompt: Callable[[Tensor], tuple[Tensor, Any]]
    step: Callable[[Tensor, Any], Tensor]
    ready: Callable[[], AbstractContextManager[object]] = nullcontext


def eager(name: str, model: Any, config: DGAConfig) -> Way:
    """The model as Python runs it, over a DGACache."""

    def prompt(tokens: Tensor) -> tuple[Tensor, Any]:
        cache = DGACache(config, model_config=model.config)
        return step(tokens, cache), cache

    def step(tokens: Tensor, cache: Any) -> Tensor:
        return next_logits(model, tokens, cache)

    return Way(name, prompt, step, lambda: flexdga.applied(model, config))


def _entries(name: str, prefill: Callable[..., Any], decode: Callable[..., Tensor]) -> Way:
    """Two entry points."""

    def prompt(tokens: Tensor) -> tuple[Tensor, Any]:
        logits, *state = prefill(tokens)
        return logits, state

    return Way(name, prompt, lambda token, state: decode(token.contiguous(), *state))


def exported(
    name: str, model: Any, example: Tensor, path: Path, capacity: int, stages: Stages
) -> tuple[Way, Made]:
    """The wrapped model as a package, loaded here."""
    with _told(stages), _Clock() as clock:
        flexdga.export(model, example, path, decode=capacity)
    loaded = (flexdga.load(path, entry) for entry in ("prefill", "decode"))
    made = Made(name, clock.seconds, clock.cpu_seconds, path.stat().st_size / 2**20)
    return _entries(name, *loaded), made


def compiled(
    name: str, model: Any, config: DGAConfig, example: Tensor, capacity: int
) -> tuple[Way, Made]:
    """What is exported, under torch.compile instead, and compiled here for `example`'s batch."""
    from flexdga.entry_points import Prompt, Step

    # A copy over the same weights, wrapped for good: each wrapping would be compiled anew.
    own = flexdga.wrap(copy.deepcopy(model, {id(p): p for p in model.parameters()}), config)
    compile_: Any = torch.compile  # its annotations lag behind its arguments
    prompt, step = (
        compile_(entry(own, capacity), fullgraph=True, dynamic=True) for entry in (Prompt, Step)
    )
    with _Clock() as clock:
        logits, *state = prompt(example)
        step(logits.argmax(-1), *state)
    return _entries(name, prompt, step), Made(name, clock.seconds, clock.cpu_seconds, None)


class _Clock:
    """Seconds, and CPU seconds of this process and of those that it waited for."""

    def __enter__(self) -> _Clock:
        self._began = os.times()
        return self

    def __exit__(self, *error: object) -> None:
        ended = os.times()
        self.seconds = ended.elapsed - self._began.elapsed
        self.cpu_seconds = sum(ended[:4]) - sum(self._began[:4])


@contextmanager
def _told(stages: Stages) -> Iterator[None]:
    """What flexdga says of its progress becomes the stage's."""

    class Tell(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stages.detail(record.getMessage().partition(": ")[2])

    log, handler = logging.getLogger("flexdga"), Tell(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
