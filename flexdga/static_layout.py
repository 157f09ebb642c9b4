"""How a decode cache of fixed capacity is laid out in tensors.

It holds what `DGACache` holds in `causal` scope, so that no shape depends on the text: a token's
place, and what a query sees, follow from the number of tokens so far alone. All rows of a batch are
equally long texts without padding. A step reads all columns of slots, those that hold none yet too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.handover import handover, lookahead
from flexdga.plan import NEVER
from flexdga.planner import group_slots_per_unit

State = dict[str, Tensor]
"""One layer's tensors, by name; which there are depends on the config.

- key, value: (B, Hkv, C, D). The first `Layout.ring` columns are raw tokens, token t in column
  t mod ring; then come copies of attention sinks, then each unit's slots.
- bias: (B, Hkv, C - ring) of the slots; -inf where there is none yet.
- query: (B, H, ring, D), where planning reads queries.
- far0, far1, ...: (B, Hkv, capacity, ·) raw keys and values that queries may open, each one tensor,
  or numbers and scales.
- units: (B, Hkv, N, ·) features of what may be opened, with `open_by="landmarks"`.
- open: (B, H, N) bool, what the present query block has open.
"""


class Layout:
    """The sizes of one layer's tensors.

    Args:
        config: of the layer.
        capacity: tokens that a text may grow to.

    Raises:
        ValueError: `capacity` is none.
        NotImplementedError: the config decides something that needs shapes that depend on data.
    """

    def __init__(self, config: DGAConfig, capacity: int) -> None:
        self.prompt, self.capacity = config, capacity
        self.dense = (config.dense_below or 0) >= NEVER
        changes: dict[str, Any] = {"scope": "causal", "focal_budget": None}
        self.config = config = dataclasses.replace(config, **changes, probe_placement="even")
        unit, rows = config.unit_size, config.block_size[0]
        self.step = math.lcm(self.prompt.step, config.step)
        """A prompt is stored in whole steps of so many tokens."""
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"decode: expected a number of tokens, got {capacity!r}")
        if capacity < 2 * self.step or capacity % self.step:
            raise ValueError(
                f"decode: expected {2 * self.step} tokens or more, in whole steps of "
                f"{self.step} (unit_size and block_size decide them), got {capacity}"
            )
        self._check()
        self.count = capacity // unit
        """Units."""
        self.extra = 0 if self.dense else max(config.sinks - config.focal_per_unit, 0)
        """Sinks that have columns of their own; the first unit's slots hold the others."""
        each = config.focal_per_unit + group_slots_per_unit(config)
        self.per_unit = 0 if self.dense else each
        reads_queries = config.needs_importance or (
            config.groups and config.group_weights == "last_query"
        )
        self.keeps_queries = bool(reads_queries and self.per_unit)
        begins = range(0, 2 * math.lcm(unit, rows), unit)  # how units lie in blocks repeats itself
        due = [handover(begin + unit - 1, config) for begin in begins]
        self.at_once = max(due.count(time) for time in due)
        """Units that can be due at one query."""
        self.stretch = -(-(self.at_once * unit + lookahead(config)) // unit)
        """Units whose tokens decide on these."""
        steady = max(time - begin + 1 for time, begin in zip(due, begins))
        steady = max(steady, self.stretch * unit)
        self.ring = capacity if self.dense else min(-(-steady // unit) * unit, capacity)
        self.opens = config.opens and config.keep_raw != "none" and not self.dense
        self.scrap = max(self.at_once * self.per_unit, self.extra)
        """Columns at the end, for what is written nowhere else."""

    @property
    def names(self) -> list[str]:
        """Of the tensors of a state, in order."""
        if self.dense:
            return ["key", "value"]
        far = 4 if self.config.keep_raw == "int8" else 2
        names = ["key", "value", "bias"] + ["query"] * self.keeps_queries
        if self.opens:
            names += [f"far{i}" for i in range(far)] + ["open"]
            names += ["units"] * (self.config.open_by == "landmarks")
        return names

    @property
    def slots(self) -> int:
        """Columns of slots, scrap apart."""
        return self.extra + self.count * self.per_unit

    def _check(self) -> None:
        config = self.prompt
        if self.dense:
            return
        plain = config.rest == "drop" and not config.needs_importance
        if config.scope == "prompt" and not (config.opens and plain):
            raise NotImplementedError(
                "decode: in scope='prompt' a whole prompt decides which of its tokens are focal "
                "or grouped, and so how many columns are left of it; expected scope='causal', "
                "which decides unit by unit (or open_units with rest='drop' and no focal tokens)"
            )
        if config.keep_raw == "cpu" and config.opens:
            raise NotImplementedError(
                "decode: an exported program has one device; expected keep_raw 'full', 'int8' or "
                "'none', got 'cpu'"
            )
        if config.sinks > config.unit_size:
            raise NotImplementedError(
                f"decode: expected at most unit_size ({config.unit_size}) sinks, got {config.sinks}"
            )

    def done(self, time: Tensor) -> Tensor:
        """How many units query `time` sees as slots."""
        config, rows = self.config, self.config.block_size[0]
        reached = time // rows * rows if config.align else time
        return (reached - config.window + 1).clamp(min=0) // config.unit_size

    def positions(self, time: Tensor) -> Tensor:
        """(ring,) the newest token up to `time` that each raw column can hold; < 0 for none."""
        column = torch.arange(self.ring, device=time.device)
        return time - torch.remainder(time - column, self.ring)
