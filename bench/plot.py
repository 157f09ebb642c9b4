"""Time against length, as a picture. Needs matplotlib (the `plot` extra)."""

from __future__ import annotations

from collections.abc import Sequence

from .baselines import DISPATCHED
from .session import Row


def save_plot(path: str, rows: Sequence[Row], title: str) -> None:
    """Write a PNG with one line per method, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.method for row in rows if row.method != DISPATCHED):
        own = [row for row in rows if row.method == name]
        lengths = [row.length for row in own]
        below = [row.median_ms - row.min_ms for row in own]
        above = [row.max_ms - row.median_ms for row in own]
        axes.errorbar(
            lengths,
            [row.median_ms for row in own],
            yerr=[below, above],
            label=name,
            marker="o",
            capsize=3,
        )
    ticks = sorted({row.length for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms (median, min to max)")
    axes.set_xticks(ticks, [str(length) for length in ticks])
    axes.minorticks_off()
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
