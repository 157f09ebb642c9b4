"""What `wrap` did to a model: a table with a row for each attention layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tabulate import tabulate

from flexdga.config import DGAConfig


@dataclasses.dataclass
class LayerReport:
    """One attention layer (or, in a plain PyTorch model, one SDPA call of the forward pass).

    Attributes:
        name: the module's name, or the number of the call.
        wrapped: whether its attention goes through DGA.
        why: in a few words, why it does or does not.
        replaced: calls that went through DGA since the model was wrapped.
        passed: calls that were passed on unchanged.
        tokens: keys of the last call that went through DGA.
        slots: slots that stood for them; equal to `tokens` where exact dense attention ran.
        dense_below: tokens below which it would have run, `DGAConfig.dense_below` or what that
            leaves to the cost model.
    """

    name: str
    wrapped: bool
    why: str
    replaced: int = 0
    passed: int = 0
    tokens: int = 0
    slots: int = 0
    dense_below: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """The layers of a wrapped model. Print it."""

    rows: Sequence[LayerReport]

    def __str__(self) -> str:
        table = [
            (
                row.name,
                "yes" if row.wrapped else "no",
                row.replaced,
                row.passed,
                row.tokens or "",
                row.slots or "",
                f"{row.tokens / row.slots:.1f}x" if row.slots else "",
                row.dense_below or "",
                row.why + "; too short to gain, so dense" * (row.tokens < row.dense_below),
            )
            for row in self.rows
        ]
        headers = ["layer", "DGA", "calls", "passed", "tokens", "slots", "fewer", "dense below",
                   "why"]  # fmt: skip
        return tabulate(table, headers=headers, tablefmt="simple")


def about_slots(config: DGAConfig, tokens: int, dense_below: int) -> int:
    """About how many slots the last of so many tokens sees: a figure for reports."""
    if tokens < dense_below:
        return tokens
    focal = config.focal_budget
    focal = int(tokens * config.focal_ratio) if focal is None else focal
    groups = -(-(tokens - config.window) // config.group_size)
    return min(tokens, config.window + focal + max(groups, 0))
