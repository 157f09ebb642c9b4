"""Who sees what: one head of a plan, for the terminal (rich) and as a picture (matplotlib)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexdga.plan import Plan

if TYPE_CHECKING:
    from rich.console import RenderableType

_SECTIONS = (
    ("raw", "cyan", "#2a9fd6"),
    ("focal", "yellow", "#e6a700"),
    ("group", "magenta", "#b5179e"),
)
_SHADES = " ░▒▓█"
_MAX_PIXELS = 2048


def draw_plan(plan: Plan, *, batch: int, head: int, width: int, height: int) -> RenderableType:
    """Queries downwards, slots to the right, a shade for the share of them that sees the other.

    The three sections get columns in proportion to the square root of their slots, so that the
    small ones can be seen.
    """
    from rich.console import Group
    from rich.text import Text

    _check_head(plan, batch, head)
    columns = _columns(plan, width)
    rows = min(height, plan.length)
    title = Text(f"Plan, sequence {batch}, KV head {head}: queries ↓, slots →\n")
    for (name, color, _), count, section in zip(_SECTIONS, columns, _sections(plan)):
        label = f"{name} ({section.stop - section.start})"
        title.append(f"{label[:count]:<{count}} ", style=color)
    lines = [title]
    for row in range(rows):
        queries = torch.arange(row * plan.length // rows, (row + 1) * plan.length // rows)
        seen = _share_seen(plan, batch, head, queries)
        line = Text()
        for (_, color, _), count, section in zip(_SECTIONS, columns, _sections(plan)):
            for cell in _pool(seen[section], count).tolist():
                shade = 0 if cell == 0 else min(1 + int(cell * 4), 4)
                line.append(_SHADES[shade], style=color)
            line.append(" ")
        lines.append(line)
    return Group(*lines)


def save_plan_png(plan: Plan, path: str, *, batch: int, head: int) -> None:
    """The same as a picture."""
    try:
        import matplotlib.colors
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "drawing to a file needs matplotlib: pip install 'flexdga[plot]'"
        ) from error
    _check_head(plan, batch, head)
    rows = min(plan.length, _MAX_PIXELS)
    queries = torch.arange(rows) * plan.length // rows
    start, end = plan.start[batch, head].cpu(), plan.end[batch, head].cpu()
    seen = (start <= queries[:, None]) & (queries[:, None] < end)
    parts = [section for section in _sections(plan) if section.stop > section.start]
    widths = [(section.stop - section.start) ** 0.5 for section in parts]
    figure = matplotlib.figure.Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(1, len(parts), sharey=True, width_ratios=widths, squeeze=False)[0]
    for axis, section, (name, _, color) in zip(axes, parts, _SECTIONS):
        colors = matplotlib.colors.ListedColormap(["white", color])
        extent = (0, section.stop - section.start, plan.length, 0)
        axis.imshow(
            seen[:, section].numpy(), cmap=colors, aspect="auto", extent=extent, vmin=0, vmax=1
        )
        axis.set_title(name)
        axis.set_xlabel("slot")
    axes[0].set_ylabel("query")
    figure.suptitle(f"Who sees what: {plan.length} tokens, cost {plan.cost():.3f} of dense causal")
    figure.savefig(path, dpi=150)


def _sections(plan: Plan) -> list[slice]:
    raw, focal = plan.length, plan.length + plan.focal.shape[-1]
    return [slice(0, raw), slice(raw, focal), slice(focal, plan.num_slots)]


def _columns(plan: Plan, width: int) -> list[int]:
    roots = [(section.stop - section.start) ** 0.5 for section in _sections(plan)]
    return [max(round((width - 2) * root / sum(roots)), 1) if root else 0 for root in roots]


def _share_seen(plan: Plan, batch: int, head: int, queries: Tensor) -> Tensor:
    """(S,) share of these consecutive queries that see each slot."""
    start, end = plan.start[batch, head].cpu(), plan.end[batch, head].cpu()
    first, after = int(queries[0]), int(queries[-1]) + 1
    overlap = end.clamp(max=after).long() - start.clamp(min=first).long()
    return overlap.clamp(min=0) / (after - first)


def _pool(seen: Tensor, count: int) -> Tensor:
    """Mean over `count` stretches of slots."""
    edges = torch.arange(count + 1) * seen.shape[0] // max(count, 1)
    sums = torch.cat([seen.new_zeros(1), seen.cumsum(0)])
    return (sums[edges[1:]] - sums[edges[:-1]]) / (edges[1:] - edges[:-1]).clamp(min=1)


def _check_head(plan: Plan, batch: int, head: int) -> None:
    for name, value, size in zip(("batch", "head"), (batch, head), plan.start.shape[:2]):
        if not 0 <= value < size:
            raise ValueError(f"{name}: expected 0 to {size - 1}, got {value}")
