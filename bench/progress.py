"""Progress on stderr: a bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Stages:
    """A context that counts `total` stages and says what the present one is doing."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=self._plain,
        )
        self._task = self._bar.add_task("", total=total)
        self._stage = ""

    def __enter__(self) -> Stages:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, stage: str) -> None:
        """The next stage starts."""
        self._stage = stage
        self._bar.update(self._task, description=stage)
        if self._plain:
            print(f"{stage} ...", file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """What the stage is doing (on a terminal only)."""
        self._bar.update(self._task, description=f"{self._stage}: {text}")

    def end(self) -> None:
        """The stage is over."""
        self._bar.advance(self._task)
