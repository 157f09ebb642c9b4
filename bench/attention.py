"""The subcommand `attention`: one attention call, Dynamic Group Attention against dense ones."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flexdga import DGAConfig

from . import baselines, hardware, measure, options
from .dispatch import dispatch
from .errors import UsageError
from .progress import Stages
from .report import Report, absent_by_length, spell_range, write_json
from .roofline import gemm_peak, peak_size, roofline
from .session import Compiled, LayerRow, Row, Session
from .workloads import (
    QKV,
    ModelSource,
    Shape,
    add_shape,
    default_text,
    given_shape,
    random_qkv,
)  # fmt: skip

LENGTHS = (1024, 2048, 4096, 8192, 16384)
MODEL_LENGTH = 4096
BUDGET, LAYER_BUDGET = 1.5, 1.0
"""Seconds of timed calls for each length, and for each layer of a model."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options; `lengths` None = the workload's own, `layers` empty = all."""

    lengths: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    threads: int | None
    shape: Shape
    repeats: int | None
    seed: int
    config: DGAConfig
    called: DGAConfig
    json: str | None
    csv: str | None
    plot: str | None
    profile: str | None
    model: Path | None
    text: str | None
    layers: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench attention`."""
    add = parser.add_argument
    add(
        "--lengths",
        type=options.lengths,
        metavar="L,L,...",
        help=f"tokens (default {','.join(map(str, LENGTHS))}; with --model {MODEL_LENGTH})",
    )
    options.add_machine(parser)
    add_shape(parser)
    options.add_repeats(parser, BUDGET)
    add("--seed", type=int, default=0)
    add(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of DGAConfig, or preset=NAME; repeatable. Without it DGAConfig's "
        "defaults, but dense_below=0: DGA is measured at every length",
    )
    add("--json", metavar="PATH", help="all numbers as JSON; - for stdout (tables go to stderr)")
    add("--csv", metavar="PATH", help="the rows as CSV")
    add("--plot", metavar="PATH.png", help="time against length (needs the `plot` extra)")
    add("--profile", metavar="FILE.json", help="Chrome trace of a DGA call at the last length")
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="measure on q, k, v of this local Hugging Face model (needs the `hf` extra)",
    )
    add("--text", type=Path, metavar="FILE", help="what the model reads (default: Python's help)")
    add("--layers", type=options.layers, metavar="all|0,5,...", help="of the model (default all)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    begin = time.perf_counter()
    chosen = _check(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)
    source = _open_model(chosen) if chosen.model is not None else None
    lengths = _lengths(chosen, source)
    with torch.no_grad():
        report = _measure(chosen, source, lengths, begin)
    _deliver(report, chosen)
    return 0


def _check(a: argparse.Namespace) -> Options:
    """Everything that can be wrong, found before anything runs."""
    shape, given = given_shape(a)
    if a.model is None:
        for name in ("text", "layers"):
            if getattr(a, name) is not None:
                raise UsageError(f"--{name} is about a model's run: expected --model with it")
    else:
        options.check_installed("--model", "transformers", "hf")
        if given:
            wrong = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{wrong}: the model decides, expected none with --model")
    shape.check()
    options.check_outputs(a.json, a.csv, a.plot)
    options.check_output("--profile", a.profile, ".json")
    text = None
    if a.model is not None:
        try:
            text = default_text() if a.text is None else a.text.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--text {a.text}: {error}") from error
    return Options(
        lengths=a.lengths, dtype=options.DTYPES[a.dtype], device=options.check_device(a.device),
        threads=a.threads, shape=shape, repeats=a.repeats, seed=a.seed,
        config=options.parse_config(a.config, dense_below=0),
        called=options.parse_config(a.config, dense_below=None), json=a.json, csv=a.csv,
        plot=a.plot, profile=a.profile, model=a.model, text=text, layers=a.layers or (),
    )  # fmt: skip


def _open_model(chosen: Options) -> ModelSource:
    assert chosen.model is not None and chosen.text is not None
    longest = max(chosen.lengths or (MODEL_LENGTH,))
    return ModelSource.open(
        chosen.model, chosen.text, longest=longest, layers=chosen.layers,
        dtype=chosen.dtype, device=chosen.device,
    )  # fmt: skip


def _lengths(chosen: Options, source: ModelSource | None) -> tuple[int, ...]:
    if source is None:
        return chosen.lengths or LENGTHS
    available = len(source.tokens)
    if chosen.lengths is not None and chosen.lengths[-1] > available:
        raise UsageError(
            f"--lengths: model and text give {available} tokens at most, got {chosen.lengths[-1]}"
        )
    return chosen.lengths or (available,)


def _measure(
    chosen: Options, source: ModelSource | None, lengths: tuple[int, ...], begin: float
) -> Report:
    if source is None:
        shape = chosen.shape
        captured: list[QKV] = []
    else:
        print("running the model once ...", file=sys.stderr, flush=True)
        captured = source.capture()
        q, k = captured[0].query, captured[0].key
        shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[3])

    def random(length: int) -> QKV:
        return random_qkv(shape, length, dtype=chosen.dtype, device=chosen.device, seed=chosen.seed)

    found, missing = baselines.methods(chosen.config, chosen.called, random(128))
    budget = BUDGET if source is None else LAYER_BUDGET
    session = Session(found, chosen.device, chosen.repeats, budget)
    rows: list[Row] = []
    layers: list[LayerRow] = []
    compiled: list[Compiled] = []
    refused = []
    with Stages(len(lengths) * max(len(captured), 1)) as stages:
        for length in lengths:
            samples = []
            for x in (whole.first(length) for whole in captured) if captured else [random(length)]:
                stages.begin(f"L = {length}" + ("" if x.layer is None else f", layer {x.layer}"))
                sample, more, why = session.sample(x, stages.detail)
                samples.append(sample)
                last = x
                compiled += more
                refused.append((length, why))
                stages.end()
            rows += session.rows(samples)
            layers += session.layer_rows(samples)
    peak = gemm_peak(chosen.dtype, chosen.device)
    if chosen.profile is not None:
        measure.write_trace(
            next(m.bind(last).call for m in found if m.name == baselines.DGA), chosen.profile
        )
    header = _header(chosen, shape, source, rows, time.perf_counter() - begin)
    header["GEMM peak"] = f"{peak:.0f} GFLOP/s, square matrices of {peak_size(chosen.device)}"
    return Report(
        header, rows, layers, compiled, missing, absent_by_length(refused),
        roofline(rows, shape, peak), dispatch(rows, chosen.called, last.query, last.key),
    )  # fmt: skip


def _header(
    chosen: Options, shape: Shape, source: ModelSource | None, rows: list[Row], seconds: float
) -> dict[str, Any]:
    header: dict[str, Any] = {
        "hardware": hardware.device_name(chosen.device),
        "threads": torch.get_num_threads(),
        "versions": hardware.versions(),
        "shapes": f"{shape}, {str(chosen.dtype).removeprefix('torch.')}, causal",
        "DGAConfig": options.non_default_fields(chosen.config),
        "rounds": spell_range(row.runs for row in rows if row.method == baselines.DGA),
        "inputs": f"random, seed {chosen.seed}",
        "wall time": f"{seconds:.0f} s",
    }
    if source is not None:
        header["inputs"] = (
            f"{source.path.name} on {len(source.tokens)} tokens, {len(source.layers)} layers"
        )
    return header


def _deliver(report: Report, chosen: Options) -> None:
    """Tables to stdout, or to stderr where the JSON takes stdout; then the files."""
    text = report.text(measure.PEAK_SOURCE[chosen.device.type])
    print(text, file=sys.stderr if chosen.json == "-" else sys.stdout)
    if chosen.json is not None:
        write_json(report, chosen.json)
    if chosen.csv is not None:
        with open(chosen.csv, "w", newline="") as file:
            report.write_csv(file)
    if chosen.plot is not None:
        from .plot import save_plot

        header = report.header
        save_plot(chosen.plot, report.rows, f"{header['hardware']}\n{header['shapes']}")
