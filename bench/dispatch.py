"""What `dga_attention` picks by itself at each length, and whether that was the faster one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from flexdga import DGAConfig
from flexdga.cost_model import case_of, dense_below, dense_time, dga_time

from .baselines import DGA, DISPATCHED
from .session import Row


@dataclasses.dataclass(frozen=True)
class DispatchRow:
    """One length.

    Attributes:
        length: of the sequence.
        dense_below: lengths below it are expected to be faster densely, or said to be.
        expected: DGA's speed over SDPA's by the cost model.
        measured: the same in this run: the fastest SDPA backend, the config at every length.
        picks: what `dga_attention` takes, `dense` or `DGA`.
        faster: what was faster in this run.
        overhead: time of `dga_attention` over that of what it picks, called by itself.
    """

    length: int
    dense_below: int
    expected: float
    measured: float
    picks: str
    faster: str
    overhead: float


def dispatch(
    rows: Sequence[Row], config: DGAConfig, query: Tensor, key: Tensor
) -> list[DispatchRow]:
    """A row for each length at which an SDPA backend, DGA and `dga_attention` itself were timed.

    Args:
        rows: what was timed.
        config: what `dga_attention` was called with.
        query: (B, H, ·, D) of the inputs.
        key: (B, Hkv, ·, D).
    """
    case, below = case_of(query, key), dense_below(config, query, key)
    found = []
    for length in dict.fromkeys(row.length for row in rows):
        here = {row.method: row for row in rows if row.length == length}
        measured = here[DGA].speedup if DGA in here else None
        if measured is None or DISPATCHED not in here:
            continue
        dense_ms = here[DGA].median_ms * measured
        picks, alone = ("dense", dense_ms) if length < below else (DGA, here[DGA].median_ms)
        found.append(
            DispatchRow(
                length, below, dense_time(case, length) / dga_time(config, case, length), measured,
                picks, DGA if measured > 1 else "dense", here[DISPATCHED].median_ms / alone,
            )
        )  # fmt: skip
    return found
