"""What a claim of the papers is for `flexdga-bench paper`: what is said, what was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from .report import table, wrap

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One statement of a claim.

    Attributes:
        says: the statement, in a form that can be measured.
        measured: the figures that decide on it.
        holds: what they decide; None where too little was measured to decide.
    """

    says: str
    measured: str
    holds: bool | None

    def line(self) -> str:
        """For people."""
        verdict = {True: "HOLDS", False: "DOES NOT HOLD", None: "OPEN"}[self.holds]
        return f"{verdict}: {self.says} Measured: {self.measured}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """All that was found about one claim.

    Attributes:
        number: of the claim, with a letter where it has parts.
        title: a few words.
        says: what the paper says.
        how: how it was measured.
        findings: statement by statement.
        tables: rows of text by title.
        rows: every number, by table, for JSON and pictures.
        seconds: how long it took.
        cpu_seconds: what it took of the CPU, all threads together.
    """

    number: str
    title: str
    says: str
    how: str
    findings: list[Finding]
    tables: dict[str, list[dict[str, str]]]
    rows: dict[str, list[Row]]
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def text(self) -> str:
        """Title, the paper's words, tables, findings."""
        head = f"{self.number}. {self.title} ({self.seconds:.0f} s; CPU {self.cpu_seconds:.0f} s)"
        parts = [f"{head}\n{wrap(f'Paper: {self.says}')}\n{wrap(f'Here: {self.how}')}"]
        parts += [f"{title}\n{table(lines)}" for title, lines in self.tables.items()]
        parts.append("\n".join(wrap(finding.line()) for finding in self.findings))
        return "\n\n".join(parts)
