"""A measurement as text of 80 columns, JSON or CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import tabulate

from .baselines import DISPATCHED
from .dispatch import DispatchRow
from .roofline import RooflineRow
from .session import Compiled, LayerRow, Row

WIDTH = 80

LEGEND = {
    "ms": "median of interleaved calls; inputs are ready on "
    "the device, the output is allocated inside. DGA is the whole of dga_attention: planning, "
    "group coding, block mask and kernel. flex dense finds its causal block mask made.",
    "±": "half the distance from the fastest to the slowest call; once: a slow baseline's first "
    "call alone.",
    "plan": "time of make_plan alone over DGA's time.",
    "speedup": "time of the fastest SDPA backend over this method's.",
    "computed": "score entries in the blocks that the kernel visits, over the L(L+1)/2 of dense "
    "causal attention, mean of the heads (SDPA: 1 by definition).",
    "GFLOP": "arithmetic of the computed entries, 4·D each (10⁹ operations), without planning's; "
    "per second of the whole call, then (kernel) of the call without planning: compression, block "
    "mask and kernel; and what share each is of the machine's best matrix product (header).",
    "dispatched": "dga_attention where it picks by itself (DGA: at every length, unless --config "
    "names dense_below): DGA's speed over SDPA's, as its cost model expects it and as measured "
    "here; what it picks; what was faster; its own time beyond that of SDPA, or DGA, alone.",
    "err": "|output - dense| / |dense| (Frobenius norms), dense being SDPA in float32.",
}
ON_RANDOM = (
    "Random tensors have no structure that could be kept: their error says nothing about a "
    "model's (--model does)."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a measurement found.

    Attributes:
        header: facts about machine, versions and settings, in order.
        rows: methods, length by length.
        layers: DGA layer by layer, of a model.
        compiled: first calls that compiled.
        missing: methods that this machine lacks, and why.
        left_out: methods left out at some lengths: (method, reason) to the lengths.
        roofline: arithmetic of the rows.
        dispatch: what `dga_attention` picks.
    """

    header: dict[str, Any]
    rows: list[Row]
    layers: list[LayerRow]
    compiled: list[Compiled]
    missing: dict[str, str]
    left_out: dict[int, dict[str, str]]
    roofline: list[RooflineRow]
    dispatch: list[DispatchRow]

    def text(self, peak_source: str) -> str:
        """Header, tables and legend."""
        of_model = bool(self.layers)
        parts = [listed(self.header)]
        for length, rows in groupby(self.rows, key=lambda row: row.length):
            found = list(rows)
            parts.append(_length_table(found, of_model))
            own = [row for row in self.layers if row.length == length]
            parts.append(_layer_table(own) if own else "")
        parts += [_dispatch_table(self.dispatch), _roofline_table(self.roofline)]
        parts.append(self._absent())
        parts.append(_compile_table(self.compiled))
        legend = LEGEND | {"MiB": f"peak memory of a call beyond its inputs ({peak_source})."}
        if of_model:
            legend["err"] += " Mean over the layers; max: of the worst layer."
            legend["ms"] += " Median over the layers."
            del legend["±"]
        else:
            legend["err"] += f" {ON_RANDOM}"
        parts.append(listed(legend))
        return "\n\n".join(part for part in parts if part)

    def _absent(self) -> str:
        lines = [f"{name}: {reason}" for name, reason in self.missing.items()]
        for length, reasons in self.left_out.items():
            lines += [f"{name}, L = {length}: {reason}" for name, reason in reasons.items()]
        return "\n".join(["Left out", *(wrap(f"- {line}") for line in lines)]) if lines else ""

    def write_csv(self, file: TextIO) -> None:
        """The rows, one line per method and length."""
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in self.rows)


def write_json(report: Any, path: str) -> None:
    """Everything in a report's dataclass, with full digits; `-` prints it."""
    text = json.dumps(dataclasses.asdict(report), indent=2, default=str)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n")


def _length_table(rows: Sequence[Row], of_model: bool) -> str:
    first = rows[0]
    title = f"L = {first.length}" + (f", {first.layers} layers" if of_model else "")
    lines = []
    for row in rows:
        line = {"method": row.method, "ms": number(row.median_ms)}
        if not of_model:
            spread = number((row.max_ms - row.min_ms) / 2, 2)
            line["±"] = spread if row.runs > 1 else "once"
        line["plan"] = "" if row.planner_share is None else f"{row.planner_share:.0%}"
        line["speedup"] = _ratio(row.speedup)
        line["computed"] = f"{row.computed:.3f}"
        line["err"] = _error(row.error)
        if of_model:
            line["max"] = _error(row.error_max)
        line["MiB"] = number(row.peak_mib, 2)
        lines.append(line)
    return f"{title}\n{table(lines)}"


def _roofline_table(rows: Sequence[RooflineRow]) -> str:
    shown = [row for row in rows if "math" not in row.method and row.method != DISPATCHED]
    lines = [
        {
            "roofline": row.method,
            "L": str(row.length),
            "GFLOP": number(row.gflop),
            "GFLOP/s": number(row.gflops),
            "of peak": f"{row.share:.0%}",
            "kernel": "" if row.kernel_gflops is None else number(row.kernel_gflops),
            "of  peak": "" if row.kernel_share is None else f"{row.kernel_share:.0%}",
        }
        for row in shown
    ]
    return table(lines) if lines else ""


def _dispatch_table(rows: Sequence[DispatchRow]) -> str:
    lines = [
        {
            "dispatched, L": str(row.length),
            "expected": _ratio(row.expected),
            "measured": _ratio(row.measured),
            "picks": row.picks,
            "faster": row.faster,
            "right": "yes" if row.picks == row.faster else "no",
            "overhead": f"{row.overhead - 1:+.1%}",
        }
        for row in rows
    ]
    if not lines:
        return ""
    return f"{table(lines)}\nPicked: dense below {rows[0].dense_below} tokens."


def _layer_table(rows: Sequence[LayerRow]) -> str:
    lines = [
        {
            "layer": str(row.layer),
            "DGA ms": number(row.median_ms),
            "speedup": _ratio(row.speedup),
            "computed": f"{row.computed:.3f}",
            "error": _error(row.error),
        }
        for row in rows
    ]
    return table(lines)


def _compile_table(compiled: Sequence[Compiled]) -> str:
    if not compiled:
        return "Nothing was compiled."
    lines = [
        {
            "compiled": row.method,
            "at L": str(row.length),
            "graphs": str(row.graphs),
            "first call s": number(row.first_call_s),
            "of that compiling s": number(row.compile_s),
        }
        for row in compiled
    ]
    return f"Compilation (no other first call compiled anything)\n{table(lines)}"


def table(lines: Sequence[dict[str, str]]) -> str:
    """Rows as a github-style table; the first column is text, the others figures."""
    align = ["left", *["right"] * (len(lines[0]) - 1)]
    tabulate.MIN_PADDING = 0  # its headers are two columns wider otherwise: 80 are few
    return tabulate.tabulate(
        lines, headers="keys", tablefmt="github", colalign=align, disable_numparse=True
    )


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, and whole digits never rounded away."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{min(max(digits - whole, 0), 4)}f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


def spell(value: Any) -> str:
    """A value for a header."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)


def spell_range(values: Iterable[int]) -> str:
    """`3`, or `3 to 20`."""
    found = sorted(values)
    return f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def listed(facts: Mapping[str, Any]) -> str:
    """A line for each fact, folded: what it is of, and what it says."""
    return "\n".join(wrap(f"{key}: {spell(value)}") for key, value in facts.items())


def wrap(line: str) -> str:
    """A line folded at 80 columns."""
    return textwrap.fill(line, WIDTH, subsequent_indent="  ")


def absent_by_length(reasons: Iterable[tuple[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    """Reasons gathered by length, lengths without any left out."""
    gathered: dict[int, dict[str, str]] = {}
    for length, found in reasons:
        if found:
            gathered.setdefault(length, {}).update(found)
    return gathered
