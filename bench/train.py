"""The subcommand `train`: forward and backward of one attention call, DGA against SDPA."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga import DGAConfig, dga_attention

from . import hardware, measure, options
from .progress import Stages
from .report import listed, number, spell_range, table, write_json
from .workloads import Shape, add_shape, given_shape, random_qkv

LENGTHS = (2048, 4096, 8192)
BUDGET = 10.0
"""Seconds of timed calls for each length."""
SDPA, DGA = "SDPA", "DGA"
LEGEND = {
    "step ms": "forward and backward of one call, median of calls in turn, ± half the distance "
    "from the fastest to the slowest. For DGA planning is in it.",
    "forward": "the call alone, with gradients enabled. backward: the difference.",
    "speedup": "SDPA's step over this one.",
    "MiB": "peak memory of a step beyond its inputs and the output's gradient; of SDPA: over "
    "SDPA's.",
}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options."""

    lengths: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    threads: int | None
    shape: Shape
    repeats: int | None
    seed: int
    config: DGAConfig
    json: str | None


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """One method at one length; times are medians in ms."""

    length: int
    method: str
    runs: int
    step_ms: float
    step_min_ms: float
    step_max_ms: float
    forward_ms: float
    backward_ms: float
    speedup: float
    peak_mib: float
    peak_of_sdpa: float


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """A measurement: facts about it, and its rows."""

    header: dict[str, Any]
    rows: list[TrainRow]

    def text(self, peak_source: str) -> str:
        """Header, tables and legend."""
        parts = [listed(self.header)]
        for length, rows in groupby(self.rows, key=lambda row: row.length):
            parts.append(f"L = {length}\n{table([_line(row) for row in rows])}")
        legend = LEGEND | {"MiB": f"{LEGEND['MiB']} ({peak_source})"}
        parts.append(listed(legend))
        return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench train`."""
    add = parser.add_argument
    add(
        "--lengths",
        type=options.lengths,
        default=LENGTHS,
        metavar="L,L,...",
        help=f"tokens (default {','.join(map(str, LENGTHS))})",
    )
    options.add_machine(parser)
    add_shape(parser)
    options.add_repeats(parser, BUDGET)
    add("--seed", type=int, default=0)
    add(
        "--config",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="fields of DGAConfig, or preset=NAME. Without them DGAConfig's defaults, but "
        "scope=causal and dense_below=0",
    )
    add("--json", metavar="PATH", help="all numbers as JSON; - for stdout (tables go to stderr)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, write the file."""
    begin = time.perf_counter()
    chosen = _check(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    rows: list[TrainRow] = []
    with Stages(len(chosen.lengths)) as stages:
        for length in chosen.lengths:
            stages.begin(f"L = {length}")
            rows += _at_length(length, chosen, stages.detail)
            stages.end()
    report = TrainReport(
        {
            "hardware": hardware.device_name(chosen.device),
            "threads": torch.get_num_threads(),
            "versions": hardware.versions(),
            "shapes": f"{chosen.shape}, {str(chosen.dtype).removeprefix('torch.')}, causal",
            "DGAConfig": options.non_default_fields(chosen.config),
            "rounds": spell_range(row.runs for row in rows),
            "inputs": f"random, seed {chosen.seed}",
            "wall time": f"{time.perf_counter() - begin:.0f} s",
        },
        rows,
    )
    text = report.text(measure.PEAK_SOURCE[chosen.device.type])
    print(text, file=sys.stderr if chosen.json == "-" else sys.stdout)
    if chosen.json is not None:
        write_json(report, chosen.json)
    return 0


def _check(a: argparse.Namespace) -> Options:
    """Everything that can be wrong, found before anything runs."""
    shape, _ = given_shape(a)
    shape.check()
    options.check_outputs(a.json, None, None)
    return Options(
        lengths=a.lengths, dtype=options.DTYPES[a.dtype], device=options.check_device(a.device),
        threads=a.threads, shape=shape, repeats=a.repeats, seed=a.seed,
        config=options.parse_config(a.config, dense_below=0, scope="causal"), json=a.json,
    )  # fmt: skip


def _at_length(length: int, chosen: Options, announce: Callable[[str], None]) -> list[TrainRow]:
    x = random_qkv(chosen.shape, length, dtype=chosen.dtype, device=chosen.device, seed=chosen.seed)
    direction = torch.randn_like(x.query)
    calls: dict[str, measure.Call] = {}
    peaks: dict[str, int] = {}
    for name, attention in (
        (SDPA, lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=x.grouped
        )),
        (DGA, lambda q, k, v: dga_attention(q, k, v, config=chosen.config)),
    ):  # fmt: skip
        announce(name)
        inputs = [t.detach().requires_grad_() for t in (x.query, x.key, x.value)]
        forward, step = _calls(attention, inputs, direction)
        calls[f"{name} forward"], calls[name] = forward, step
        peaks[name] = measure.first_call(step, chosen.device).peak_bytes
    announce("timing")
    found = measure.interleave(calls, chosen.device, rounds=chosen.repeats, budget=BUDGET)
    rows = []
    for name in (SDPA, DGA):
        step_time, forward_time = found[name], found[f"{name} forward"].median
        rows.append(
            TrainRow(
                length=length,
                method=name,
                runs=len(step_time.seconds),
                step_ms=1e3 * step_time.median,
                step_min_ms=1e3 * step_time.low,
                step_max_ms=1e3 * step_time.high,
                forward_ms=1e3 * forward_time,
                backward_ms=1e3 * (step_time.median - forward_time),
                speedup=found[SDPA].median / step_time.median,
                peak_mib=peaks[name] / 2**20,
                peak_of_sdpa=peaks[name] / peaks[SDPA],
            )
        )
    return rows


def _calls(
    attention: Attention, inputs: list[Tensor], direction: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The call alone, and with its gradients, which the next one throws away."""

    def forward() -> Tensor:
        return attention(*inputs)

    def step() -> Tensor:
        grads = torch.autograd.grad(attention(*inputs), inputs, direction)
        return grads[0]

    return forward, step


def _line(row: TrainRow) -> dict[str, str]:
    spread = number((row.step_max_ms - row.step_min_ms) / 2, 2)
    return {
        "method": row.method,
        "step ms": f"{number(row.step_ms)} ± {spread}",
        "forward": number(row.forward_ms),
        "backward": number(row.backward_ms),
        "speedup": f"{row.speedup:.2f}",
        "MiB": number(row.peak_mib),
        "of SDPA": f"{row.peak_of_sdpa:.2f}",
    }
