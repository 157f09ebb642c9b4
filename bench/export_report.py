"""What `flexdga-bench export` found, as text of 80 columns and JSON."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

from .report import listed, number, table, write_json

LEGEND = {
    "exported": "the package, prompt and decode step as its two entry points. eager: the model in "
    "Python over a DGACache, whose attention alone is compiled. compiled: what is exported, under "
    "torch.compile(fullgraph=True, dynamic=True).",
    "dense": "the model with dense attention, exported in the same way.",
    "prompt ms": "a prompt of one row, to the logits after it; median of calls in turn, ± half "
    "the distance from the fastest to the slowest. token ms: each token after it.",
    "error": "|x - eager| / |eager| (Frobenius norms) of the logits after the prompt and after "
    "each token, the median and the worst of them; exported, of batch 1 and 3 in a process that "
    "imports torch alone; eager, where its embeddings move by their last bit, which is enough to "
    "open other units where some are close.",
    "made in s": "export and compilation of both entry points; compiled, for one row. "
    "CPU s: of all processes, which others on the machine do not lengthen as much.",
}


@dataclasses.dataclass(frozen=True)
class Made:
    """What a method took to make, and its MiB on disk if it has any."""

    method: str
    seconds: float
    cpu_seconds: float
    mib: float | None


@dataclasses.dataclass(frozen=True)
class ExportRow:
    """One method at one length of prompt; times in ms."""

    length: int
    method: str
    prompt_ms: float
    prompt_min_ms: float
    prompt_max_ms: float
    token_ms: float
    token_min_ms: float
    token_max_ms: float
    tokens_per_s: float
    error: float
    worst: float


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """A measurement: facts about it, what was made, and its rows."""

    header: dict[str, Any]
    made: list[Made]
    rows: list[ExportRow]

    def text(self) -> str:
        """Header, tables and legend."""
        parts = [listed(self.header)]
        parts.append(table([_made_line(made) for made in self.made]))
        for length, rows in groupby(self.rows, key=lambda row: row.length):
            parts.append(f"L = {length}\n{table([_line(row) for row in rows])}")
        parts.append(listed(LEGEND))
        return "\n\n".join(parts)

    def write(self, json_path: str | None) -> None:
        """The file that was asked for; `-` prints it."""
        if json_path is not None:
            write_json(self, json_path)


def _made_line(made: Made) -> dict[str, str]:
    return {
        "method": made.method,
        "made in s": number(made.seconds),
        "CPU s": number(made.cpu_seconds),
        "MiB on disk": "" if made.mib is None else number(made.mib),
    }


def _line(row: ExportRow) -> dict[str, str]:
    return {
        "method": row.method,
        "prompt ms": _spread(row.prompt_ms, row.prompt_min_ms, row.prompt_max_ms),
        "token ms": _spread(row.token_ms, row.token_min_ms, row.token_max_ms),
        "tokens/s": number(row.tokens_per_s),
        "error": f"{row.error:.0e}",
        "worst": f"{row.worst:.0e}",
    }


def _spread(median: float, low: float, high: float) -> str:
    return f"{number(median)} ± {number((high - low) / 2, 2)}"
