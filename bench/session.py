"""From methods and inputs to rows of numbers."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import measure
from .baselines import DGA, DISPATCHED, Method, reference
from .measure import Call, FirstCall, Timing
from .workloads import QKV

_MS = 1e3


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method on one set of inputs."""

    timing: Timing
    error: float
    computed: float
    peak_bytes: int
    planner: Timing | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """All methods on one set of inputs."""

    length: int
    layer: int | None
    measured: dict[str, Measured]

    def best_sdpa(self, methods: Sequence[Method]) -> float | None:
        """Median seconds of the fastest SDPA backend."""
        names = {method.name for method in methods if method.is_sdpa}
        times = [m.timing.median for name, m in self.measured.items() if name in names]
        return min(times, default=None)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A first call at a length that compiled something."""

    method: str
    length: int
    graphs: int
    first_call_s: float
    compile_s: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one length: over rounds, and for a model the median over layers too.

    Times are in ms. `error` and `peak_mib` are the mean and the maximum over layers.
    """

    length: int
    method: str
    layers: int
    runs: int
    median_ms: float
    min_ms: float
    max_ms: float
    planner_ms: float | None
    planner_share: float | None
    speedup: float | None
    computed: float
    error: float
    error_max: float
    peak_mib: float


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """DGA on one layer of a model."""

    length: int
    layer: int
    median_ms: float
    speedup: float | None
    computed: float
    error: float


@dataclasses.dataclass(frozen=True)
class Session:
    """How all lengths and layers are measured: the same methods, rounds and budget.

    Attributes:
        methods: what is compared.
        device: where.
        rounds: as in `measure.interleave`.
        budget: seconds of timed calls for each set of inputs.
    """

    methods: Sequence[Method]
    device: torch.device
    rounds: int | None
    budget: float

    def sample(
        self, x: QKV, announce: Callable[[str], None]
    ) -> tuple[Sample, list[Compiled], dict[str, str]]:
        """Measure all methods on `x`.

        Returns:
            The sample, what was compiled for it, and why methods were left out.
        """
        refused = {m.name: reason for m in self.methods if (reason := m.refuses(x)) is not None}
        used = [method for method in self.methods if method.name not in refused]
        exact = reference(x)
        calls: dict[str, Call] = {}
        firsts: dict[str, FirstCall] = {}
        facts: dict[str, tuple[float, float]] = {}
        for method in used:
            announce(method.name)
            bound = method.bind(x)
            first = measure.first_call(bound.call, self.device)
            firsts[method.name] = first
            facts[method.name] = (_error(first.output, exact), bound.computed())
            calls[method.name] = bound.call
            if bound.plan is not None:
                bound.plan()
                calls[_planner(method.name)] = bound.plan
        announce("timing")
        once = {m.name for m in used if self._only_once(m, firsts[m.name])}
        often = {name: call for name, call in calls.items() if name not in once}
        timings = {name: Timing((firsts[name].seconds,)) for name in once}
        timings |= measure.interleave(often, self.device, rounds=self.rounds, budget=self.budget)
        measured = {
            name: Measured(
                timings[name], *fact, firsts[name].peak_bytes, timings.get(_planner(name))
            )
            for name, fact in facts.items()
        }
        compiled = [
            Compiled(name, x.length, first.graphs, first.seconds,
                     max(first.seconds - timings[name].median, 0.0))
            for name, first in firsts.items()
            if first.graphs
        ]  # fmt: skip
        return Sample(x.length, x.layer, measured), compiled, refused

    def _only_once(self, method: Method, first: FirstCall) -> bool:
        """Whether the first call has to do: a slow baseline, and nobody asked for more."""
        slow = first.seconds > measure.SLOW_SECONDS and not first.graphs
        ours = method.name in (DGA, DISPATCHED)
        return slow and self.rounds is None and not method.is_sdpa and not ours

    def rows(self, samples: Sequence[Sample]) -> list[Row]:
        """One row per method, from the samples of one length."""
        names = list(dict.fromkeys(name for sample in samples for name in sample.measured))
        sdpa = [method.name for method in self.methods if method.is_sdpa and method.name in names]
        best = min((_median_time(name, samples) for name in sdpa), default=None)
        return [self._row(name, samples, best) for name in names]

    def _row(self, name: str, samples: Sequence[Sample], best: float | None) -> Row:
        all_of = [sample.measured[name] for sample in samples]
        median = _median_time(name, samples)
        planner = _median([m.planner.median if m.planner else None for m in all_of])
        errors = [m.error for m in all_of]
        return Row(
            length=samples[0].length,
            method=name,
            layers=len(samples),
            runs=len(all_of[0].timing.seconds),
            median_ms=median * _MS,
            min_ms=min(m.timing.low for m in all_of) * _MS,
            max_ms=max(m.timing.high for m in all_of) * _MS,
            planner_ms=None if planner is None else planner * _MS,
            planner_share=None if planner is None else planner / median,
            speedup=None if best is None else best / median,
            computed=statistics.mean(m.computed for m in all_of),
            error=statistics.mean(errors),
            error_max=max(errors),
            peak_mib=max(m.peak_bytes for m in all_of) / 2**20,
        )

    def layer_rows(self, samples: Sequence[Sample]) -> list[LayerRow]:
        """DGA layer by layer; empty where the inputs are no model's."""
        rows = []
        for sample in samples:
            if sample.layer is not None and DGA in sample.measured:
                m, best = sample.measured[DGA], sample.best_sdpa(self.methods)
                median = m.timing.median
                speedup = None if best is None else best / median
                rows.append(
                    LayerRow(
                        sample.length, sample.layer, median * _MS, speedup, m.computed, m.error
                    )
                )
        return rows


def _error(out: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return ((out.float() - exact).norm() / exact.norm()).item()


def _planner(method: str) -> str:
    """The name under which a method's planner is timed."""
    return f"{method} planner"


def _median_time(method: str, samples: Sequence[Sample]) -> float:
    """Seconds: the median over samples of the median over rounds."""
    return statistics.median(sample.measured[method].timing.median for sample in samples)


def _median(values: Sequence[float | None]) -> float | None:
    """The median, or None as soon as one is missing."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if values and len(present) == len(values) else None
