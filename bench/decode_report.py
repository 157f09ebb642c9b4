"""What `flexdga-bench decode` found, as text of 80 columns, JSON, CSV and a picture."""

from __future__ import annotations

import csv
import dataclasses
from itertools import groupby
from typing import Any

from .report import listed, number, table, write_json

LEGEND = {
    "dynamic, static": "transformers' DynamicCache and StaticCache, with its SDPA attention. DGA: "
    "DGACache.",
    "1st s": "time to the first token: the whole prompt and one token; the better of two.",
    "ms": "time from token to token, the whole model; median of the tokens, ± half the distance "
    "from the fastest to the slowest. x: times faster than dynamic.",
    "attn": "ms of attention alone, all layers of one token over the same caches (dense: "
    "SDPA in which query heads share their KV head's keys).",
    "MiB (share)": "keys, values and what else the cache keeps; share of dynamic's.",
    "keys": "that a query sees: tokens, or slots and raw tokens.",
}


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One method at one context length."""

    length: int
    method: str
    first_token_s: float | None
    token_ms: float
    token_min_ms: float
    token_max_ms: float
    tokens_per_s: float
    speedup: float
    attention_ms: float | None
    cache_mib: float
    of_dense: float
    keys: int


@dataclasses.dataclass(frozen=True)
class DecodeReport:
    """A measurement: facts about it, and its rows."""

    header: dict[str, Any]
    rows: list[DecodeRow]

    def text(self) -> str:
        """Header, tables and legend."""
        parts = [listed(self.header)]
        for length, rows in groupby(self.rows, key=lambda row: row.length):
            parts.append(f"{length} tokens of context\n{table([_line(row) for row in rows])}")
        parts.append(listed(LEGEND))
        return "\n\n".join(parts)

    def write(self, json_path: str | None, csv_path: str | None, plot_path: str | None) -> None:
        """The files that were asked for; `-` prints JSON."""
        if json_path is not None:
            write_json(self, json_path)
        if csv_path is not None:
            with open(csv_path, "w", newline="") as file:
                writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(DecodeRow)])
                writer.writeheader()
                writer.writerows(dataclasses.asdict(row) for row in self.rows)
        if plot_path is not None:
            self._plot(plot_path)

    def _plot(self, path: str) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for name in dict.fromkeys(row.method for row in self.rows):
            own = [row for row in self.rows if row.method == name]
            axes.plot([r.length for r in own], [r.token_ms for r in own], marker="o", label=name)
        ticks = sorted({row.length for row in self.rows})
        axes.set(xscale="log", xlabel="tokens of context", ylabel="ms from token to token")
        axes.set_xticks(ticks, [str(length) for length in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(f"{self.header['model']}\n{self.header['hardware']}", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)


def _line(row: DecodeRow) -> dict[str, str]:
    return {
        "method": row.method,
        "1st s": "" if row.first_token_s is None else number(row.first_token_s),
        "ms": f"{number(row.token_ms)} ± {number((row.token_max_ms - row.token_min_ms) / 2, 2)}",
        "tok/s": number(row.tokens_per_s),
        "x": f"{row.speedup:.2f}",
        "attn": "" if row.attention_ms is None else number(row.attention_ms),
        "MiB (share)": f"{number(row.cache_mib)} ({row.of_dense:.2f})",
        "keys": str(row.keys),
    }
