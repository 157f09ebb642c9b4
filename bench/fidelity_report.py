"""What `flexdga-bench fidelity` found, as text of 80 columns, JSON, CSV and a picture."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from .report import listed, number, table, wrap, write_json

DEPTHS_SHOWN = 4
LM_LEGEND = {
    "cost": "score entries in the plans over those of dense causal attention, mean of the "
    "layers. After a method's name: the budget it was given.",
    "NLL, tail": "nats per token of the text; of its second half.",
    "KL": "KL(dense || method) over the second half, nats per token.",
    "top-1": "share of the second half's positions whose likeliest token is dense's.",
    "s (plan)": "seconds of the forward pass; of planning in it, which `--quick` does not compile. "
    "For speed see `flexdga-bench attention`.",
}
TASK_LEGEND = {
    "cost": "of the first prompt: score entries in its plans over dense causal ones.",
    "seen": "keys that a decoded token goes over, some of them hidden until their unit is pooled, "
    "over the prompt's tokens; the most of the layers.",
    "kept": "bytes of the cache after the prompt, its reserves included, over dense ones.",
    "exact": "answers that greedy decoding gives in full.",
    "right": "share of the answers' tokens (digits of a code) that are the likeliest, the true "
    "ones before them given.",
    "NLL": "of the answers' tokens, nats per token; then by depth of the needle.",
}
Row = TypeVar("Row", "LmRow", "TaskRow")


@dataclasses.dataclass(frozen=True)
class LmRow:
    """One method reading one window of a text. `budget` is None where none is heeded."""

    text: str
    length: int
    window: int
    offset: int
    method: str
    budget: float | None
    config: dict[str, Any]
    cost: float
    nll: float
    tail_nll: float
    kl: float
    top1: float
    plan_s: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """One method answering one question. `depth` is None where the answer is everywhere."""

    task: str
    length: int
    depth: float | None
    example: int
    method: str
    budget: float | None
    config: dict[str, Any]
    cost: float
    seen: float
    kept: float
    exact: bool
    right: float
    nll: float
    answer_tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class FidelityReport:
    """A measurement: facts about it, and its rows."""

    header: dict[str, Any]
    lm: list[LmRow]
    tasks: list[TaskRow]

    def text(self) -> str:
        """Header, tables and legend."""
        parts = [listed(self.header)]
        for (text, length), lm in groupby(self.lm, key=lambda row: (row.text, row.length)):
            parts += _lm_tables(text, length, list(lm))
        if self.lm:
            parts.append(_legend("Language modelling", LM_LEGEND))
        for length, found in groupby(self.tasks, key=lambda row: row.length):
            parts += _task_tables(length, list(found))
        if self.tasks:
            parts.append(_legend("Tasks", TASK_LEGEND))
        return "\n\n".join(parts)

    def write(self, json_path: str | None, csv_path: str | None, plot_path: str | None) -> None:
        """The files that were asked for; `-` prints JSON."""
        if json_path is not None:
            write_json(self, json_path)
        if csv_path is not None:
            self._write_csv(csv_path)
        if plot_path is not None:
            self._plot(plot_path)

    def _write_csv(self, path: str) -> None:
        """All rows; a column that is not a row's stays empty."""
        fields = [f.name for kind in (LmRow, TaskRow) for f in dataclasses.fields(kind)]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(
                file, ["task", *(n for n in dict.fromkeys(fields) if n != "task")]
            )
            writer.writeheader()
            writer.writerows({"task": "lm"} | dataclasses.asdict(row) for row in self.lm)
            writer.writerows(dataclasses.asdict(row) for row in self.tasks)

    def _plot(self, path: str) -> None:
        """KL over cost: a line per method, a column of panels per text, a row per length."""
        from matplotlib.figure import Figure

        texts = list(dict.fromkeys(row.text for row in self.lm))
        lengths = sorted({row.length for row in self.lm})
        methods = list(dict.fromkeys(row.method for row in self.lm))
        size = (1 + 4.5 * len(texts), 1 + 4 * len(lengths))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(lengths), len(texts), squeeze=False, sharex=True)
        for axes, (length, text) in zip(panels.flat, itertools.product(lengths, texts)):
            points: dict[str, list[tuple[float, float]]] = {}
            own = [row for row in self.lm if (row.text, row.length) == (text, length)]
            for group in _groups(own):
                if (kl := _mean(group, "kl")) > 0:  # not dense
                    points.setdefault(group[0].method, []).append((_mean(group, "cost"), kl))
            for method, found in points.items():
                color = f"C{methods.index(method) - 1}"  # dense is the first
                axes.plot(*zip(*sorted(found)), marker="o", label=method, color=color)
            axes.set(yscale="log", title=f"{text}, {length} tokens")
            axes.grid(alpha=0.3, which="both")
        for axes in panels[-1]:
            axes.set_xlabel("cost (share of dense)")
        for axes in panels[:, 0]:
            axes.set_ylabel("KL(dense || method), nats per token")
        lines = panels[0, 0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=5, fontsize="small")
        figure.suptitle(f"{self.header['model']}\n{self.header['hardware']}", fontsize="small")
        figure.savefig(path, dpi=150)


def _lm_tables(text: str, length: int, rows: Sequence[LmRow]) -> list[str]:
    groups = _groups(rows)
    windows = len(groups[0])
    title = f"{text}, {length} tokens" + (f", mean of {windows} windows" if windows > 1 else "")
    means = [
        {
            "method": _label(group[0]),
            "cost": f"{_mean(group, 'cost'):.3f}",
            **_quality(group, _mean),
            "s (plan)": f"{_mean(group, 'seconds'):.1f} ({_mean(group, 'plan_s'):.1f})",
        }
        for group in groups
    ]
    parts = [f"{title}\n{table(means)}"]
    if windows > 1:
        spreads = [{"method": _label(group[0]), **_quality(group, _spread)} for group in groups]
        parts.append(f"{text}, {length} tokens, windows' greatest - least\n{table(spreads)}")
    return parts


def _quality(group: Sequence[LmRow], over: Callable[[Sequence[Any], str], float]) -> dict[str, str]:
    return {
        "NLL": f"{over(group, 'nll'):.3f}",
        "tail": f"{over(group, 'tail_nll'):.3f}",
        "KL": f"{over(group, 'kl'):.4f}",
        "top-1": f"{over(group, 'top1'):.3f}",
    }


def _task_tables(length: int, rows: Sequence[TaskRow]) -> list[str]:
    spent = [
        {
            "method": _label(group[0]),
            "cost": f"{_mean(group, 'cost'):.3f}",
            "seen": f"{_mean(group, 'seen'):.3f}",
            "kept": f"{_mean(group, 'kept'):.3f}",
            "s per question": number(_mean(group, "seconds"), 2),
        }
        for group in _groups(rows)
    ]
    parts = [f"Prompts of {length} tokens, mean of the tasks\n{table(spent)}"]
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        parts.append(f"{task}, {length} tokens\n{table([_task_line(g) for g in _groups(own)])}")
    return parts


def _task_line(group: Sequence[TaskRow]) -> dict[str, str]:
    line = {
        "method": _label(group[0]),
        "exact": f"{sum(row.exact for row in group)}/{len(group)}",
        "right": f"{_mean(group, 'right'):.2f}",
        "NLL": f"{_mean(group, 'nll'):.3f}",
    }
    depths = sorted({row.depth for row in group if row.depth is not None})
    if 1 < len(depths) <= DEPTHS_SHOWN:
        line |= {
            f"at {depth:g}": f"{_mean([r for r in group if r.depth == depth], 'nll'):.3f}"
            for depth in depths
        }
    return line


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same method and budget, in order of their first."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.budget), []).append(row)
    return list(found.values())


def _label(row: LmRow | TaskRow) -> str:
    return row.method if row.budget is None else f"{row.method} {row.budget:.2f}"


def _mean(rows: Sequence[Any], field: str) -> float:
    return statistics.mean(getattr(row, field) for row in rows)


def _spread(rows: Sequence[Any], field: str) -> float:
    values = [getattr(row, field) for row in rows]
    return max(values) - min(values)


def _legend(title: str, lines: dict[str, str]) -> str:
    return "\n".join([title, *(wrap(f"{key}: {text}") for key, text in lines.items())])
