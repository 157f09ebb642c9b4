"""The subcommand `parallel`: what sharded attention sends, how fast it is, and where that leads."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from flexdga import DGAConfig
from flexdga.config import BY_LANDMARKS

from . import hardware, options
from .errors import UsageError
from .parallel_model import ASSUMPTIONS, Open, all_gathered, arithmetic, bytes_sent
from .parallel_ranks import Job, RankResult, run_ranks
from .progress import Stages
from .report import listed, number, table, wrap, write_json
from .workloads import (
    QKV,
    ModelSource,
    Shape,
    add_shape,
    default_text,
    given_shape,
    random_qkv,
)

LENGTH = 32768
RANKS = (2, 4)
CARRIED = ((131072, 8), (1 << 20, 64))
"""Lengths and ranks that the model is carried to."""
BANDWIDTH, SPEED = 50.0, 50.0
LEGEND = {
    "sent": "MiB that the busiest rank sends for one layer's call, counted from the collectives.",
    "KV": "MiB that it would send if all keys and values were gathered, or passed around a ring "
    "(both send as much); computed.",
    "fewer": "KV over sent.",
    "ms": "the slowest rank's median call; processes of one thread each, mean over the layers.",
    "speedup": "one process of one thread over this.",
    "memory": "what a call holds beyond its inputs, of the rank that holds most, over one "
    "process's.",
    "model": "what the cost model says of the same, with the mean rank's opened units.",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options."""

    length: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    shape: Shape
    source: ModelSource | None
    rounds: int
    seed: int
    config: DGAConfig
    bandwidth: float
    speed: float
    json: str | None


@dataclasses.dataclass(frozen=True)
class ParallelRow:
    """So many processes at the measured length; MiB and ms of one layer's call."""

    ranks: int
    sent_mib: float
    sent_by_kind: dict[str, float]
    modelled_mib: float
    kv_mib: float
    fewer: float
    ms: float
    modelled_ms: float
    speedup: float
    peak_mib: float
    peak_of_one: float


@dataclasses.dataclass(frozen=True)
class CarriedRow:
    """What the model says of another length and number of ranks."""

    length: int
    ranks: int
    sent_mib: float
    kv_mib: float
    fewer: float
    compute_ms: float
    send_ms: float
    send_kv_ms: float


@dataclasses.dataclass(frozen=True)
class ParallelReport:
    """A measurement, and what follows from it."""

    header: dict[str, Any]
    rows: list[ParallelRow]
    carried: list[CarriedRow]
    assumptions: list[str]

    def text(self) -> str:
        """Header, tables, legend and assumptions."""
        parts = [listed(self.header)]
        parts.append(table([_line(row) for row in self.rows]))
        measured = [row for row in self.rows if row.sent_by_kind]
        kinds = [
            {"what": name}
            | {f"{row.ranks} ranks": number(row.sent_by_kind[name]) for row in measured}
            for name in measured[0].sent_by_kind
        ]
        parts.append("MiB sent by the busiest rank, by what they are\n" + table(kinds))
        parts.append(listed(LEGEND))
        parts.append("The cost model, carried on\n" + table([_carried(r) for r in self.carried]))
        parts.append("\n".join(wrap(f"- {text}") for text in self.assumptions))
        return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench parallel`."""
    add = parser.add_argument
    add("--length", type=options.positive_int, default=LENGTH, metavar="L",
        help=f"tokens (default {LENGTH})")  # fmt: skip
    add("--ranks", type=options.lengths, default=RANKS, metavar="N,N,...",
        help="processes (default 2,4); one alone is measured always")  # fmt: skip
    add("--dtype", choices=list(options.DTYPES), default="float32")
    add_shape(parser)
    add("--model", type=Path, metavar="PATH",
        help="query, key and value of this model's layers, up to its longest context, instead of "
        "random ones")  # fmt: skip
    add("--text", type=Path, metavar="FILE", help="what it reads (default Python's help topics)")
    add("--layers", type=options.layers, default=(0, 10, 20), metavar="I,I,...",
        help="of the model (default 0,10,20), or all")  # fmt: skip
    add("--repeats", type=options.positive_int, default=3, metavar="N", help="rounds (default 3)")
    add("--seed", type=int, default=0)
    add("--config", nargs="+", default=[], metavar="KEY=VALUE",
        help="fields of DGAConfig, or preset=NAME")  # fmt: skip
    add("--bandwidth", type=float, default=BANDWIDTH, metavar="GB/S",
        help=f"of a rank, for the model carried on (default {BANDWIDTH:g})")  # fmt: skip
    add("--speed", type=float, default=SPEED, metavar="TFLOP/S",
        help=f"that a rank's device achieves on this attention (default {SPEED:g})")  # fmt: skip
    add("--json", metavar="PATH", help="all numbers as JSON; - for stdout (tables go to stderr)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, write the file."""
    begin = time.perf_counter()
    chosen = _check(arguments)
    inputs = _inputs(chosen)
    shape = Shape(
        inputs[0].query.shape[0], inputs[0].query.shape[1], inputs[0].key.shape[1],
        inputs[0].query.shape[3],
    )  # fmt: skip
    chosen = dataclasses.replace(chosen, shape=shape, length=inputs[0].length)
    found: dict[int, list[RankResult]] = {}
    with tempfile.TemporaryDirectory() as folder, Stages(1 + len(chosen.ranks)) as stages:
        path = str(Path(folder) / "inputs.pt")
        torch.save([(x.query, x.key, x.value, x.scale) for x in inputs], path)
        layers = len(inputs)
        del inputs
        for world in (1, *chosen.ranks):
            stages.begin(f"{world} processes")
            found[world] = run_ranks(world, Job(path, chosen.config, chosen.rounds))
            stages.end()
    report = _report(found, chosen, layers, time.perf_counter() - begin)
    text = report.text()
    print(text, file=sys.stderr if chosen.json == "-" else sys.stdout)
    if chosen.json is not None:
        write_json(report, chosen.json)
    return 0


def _check(a: argparse.Namespace) -> Options:
    """Everything that can be wrong, found before anything runs."""
    shape, given = given_shape(a)
    shape.check()
    options.check_outputs(a.json, None, None)
    config = options.parse_config(a.config, BY_LANDMARKS, dense_below=0)
    assert config.dense_below is not None
    if a.length < config.dense_below:
        raise UsageError(
            f"--length {a.length}: expected at least dense_below ({config.dense_below}), or "
            "--config dense_below=0: shorter sequences take dense attention"
        )
    if min(a.ranks) < 2:
        raise UsageError(f"--ranks {min(a.ranks)}: expected at least 2; one is measured always")
    for name in ("bandwidth", "speed"):
        if getattr(a, name) <= 0:
            raise UsageError(f"--{name}: expected more than 0, got {getattr(a, name)}")
    source = None
    dtype = options.DTYPES[a.dtype]
    if a.model is not None:
        if given:
            raise UsageError("--model brings its own shape; expected no " + ", ".join(given))
        if a.text is not None and not a.text.is_file():
            raise UsageError(f"--text {a.text}: expected a file")
        text = default_text() if a.text is None else a.text.read_text()
        source = ModelSource.open(
            a.model, text, longest=a.length, layers=a.layers, dtype=dtype,
            device=torch.device("cpu"),
        )  # fmt: skip
        if len(source.tokens) < config.dense_below:
            raise UsageError(
                f"--model: {len(source.tokens)} tokens are all that it reads of the text, expected "
                f"at least dense_below ({config.dense_below})"
            )
    return Options(
        a.length, a.ranks, dtype, shape, source, a.repeats, a.seed, config, a.bandwidth, a.speed,
        a.json,
    )  # fmt: skip


def _inputs(chosen: Options) -> list[QKV]:
    if chosen.source is not None:
        return chosen.source.capture()
    device = torch.device("cpu")
    return [
        random_qkv(chosen.shape, chosen.length, dtype=chosen.dtype, device=device, seed=chosen.seed)
    ]


def _report(
    found: dict[int, list[RankResult]], chosen: Options, layers: int, wall: float
) -> ParallelReport:
    shape, length, config = chosen.shape, chosen.length, chosen.config
    size = torch.empty(0, dtype=chosen.dtype).element_size()
    alone = found[1][0]
    one_ms, one_peak = _slowest([alone]), alone.peak
    rows, opened = [], Open(0.0, alone.entries)
    achieved = arithmetic(shape, length, config, opened) / one_ms
    for world, results in found.items():
        sent = _busiest(results)
        total = sum(sent.values())
        kv = all_gathered(shape, length, world, size)
        modelled, modelled_s = 0.0, one_ms
        if world > 1:
            asked = [_mean(result.sent).get("opened units", 0) for result in results]
            opened = Open(statistics.mean(asked) / kv, alone.entries)
            modelled = sum(bytes_sent(shape, length, world, size, config, opened).values())
            bandwidth = min(result.bandwidth for result in results)
            work = arithmetic(shape, length, config, opened)
            modelled_s = work / (achieved * world) + modelled / bandwidth
        peak = max(result.peak for result in results)
        seconds = _slowest(results)
        rows.append(
            ParallelRow(
                ranks=world,
                sent_mib=total / 2**20,
                sent_by_kind={name: value / 2**20 for name, value in sent.items()},
                modelled_mib=modelled / 2**20,
                kv_mib=kv / 2**20,
                fewer=kv / total if total else 1.0,
                ms=1e3 * seconds,
                modelled_ms=1e3 * modelled_s,
                speedup=one_ms / seconds,
                peak_mib=peak / 2**20,
                peak_of_one=peak / one_peak,
            )
        )
    header = {
        "hardware": hardware.device_name(torch.device("cpu")),
        "versions": hardware.versions(),
        "shapes": f"{shape}, {str(chosen.dtype).removeprefix('torch.')}, causal, L={length}",
        "DGAConfig": options.non_default_fields(config),
        "inputs": f"{layers} layers of a model" if chosen.source else f"random, {chosen.seed}",
        "processes": "one thread each, gloo over localhost",
        "rounds": chosen.rounds,
        "achieved by one": f"{achieved / 1e9:.3g} GFLOP/s of the model's arithmetic",
        "opened": f"{opened.units:.3g} of the keys and values travel as opened units, "
        f"{opened.entries:.3g} of the score entries are theirs",
        "wall time": f"{wall:.0f} s",
    }
    carried = [
        _carry(size, chosen, opened, length, ranks)
        for length, ranks in (*((length, n) for n in chosen.ranks), *CARRIED)
    ]
    assumptions = [
        *ASSUMPTIONS,
        f"Measured rows: speed and bandwidth as achieved here by {chosen.rounds} rounds. Carried: "
        f"{chosen.speed:g} TFLOP/s and {chosen.bandwidth:g} GB/s for each rank, as given.",
    ]
    return ParallelReport(header, rows, carried, assumptions)


def _carry(size: int, chosen: Options, opened: Open, length: int, world: int) -> CarriedRow:
    sent = sum(bytes_sent(chosen.shape, length, world, size, chosen.config, opened).values())
    kv = all_gathered(chosen.shape, length, world, size)
    work = arithmetic(chosen.shape, length, chosen.config, opened) / world
    return CarriedRow(
        length=length,
        ranks=world,
        sent_mib=sent / 2**20,
        kv_mib=kv / 2**20,
        fewer=kv / sent,
        compute_ms=work / chosen.speed / 1e9,
        send_ms=sent / chosen.bandwidth / 1e6,
        send_kv_ms=kv / chosen.bandwidth / 1e6,
    )


def _mean(sent: list[dict[str, int]]) -> dict[str, int]:
    """Bytes by what they are, mean over the layers."""
    total: Counter[str] = Counter()
    for one in sent:
        total.update(one)
    return {name: round(value / len(sent)) for name, value in total.items()}


def _busiest(results: list[RankResult]) -> dict[str, int]:
    return max((_mean(result.sent) for result in results), key=lambda sent: sum(sent.values()))


def _slowest(results: list[RankResult]) -> float:
    """Seconds of a call: of each round the slowest rank, the median, the mean over layers."""
    layers = zip(*(result.seconds for result in results))
    return statistics.mean(
        statistics.median(max(of_round) for of_round in zip(*ranks)) for ranks in layers
    )


def _line(row: ParallelRow) -> dict[str, str]:
    return {
        "ranks": str(row.ranks),
        "sent": number(row.sent_mib),
        "model": number(row.modelled_mib),
        "KV": number(row.kv_mib),
        "fewer": number(row.fewer),
        "ms": number(row.ms),
        "model ms": number(row.modelled_ms),
        "speedup": number(row.speedup),
        "memory": number(row.peak_of_one),
    }


def _carried(row: CarriedRow) -> dict[str, str]:
    return {
        "L": str(row.length),
        "ranks": str(row.ranks),
        "sent": number(row.sent_mib),
        "KV": number(row.kv_mib),
        "fewer": number(row.fewer),
        "compute ms": number(row.compute_ms),
        "send ms": number(row.send_ms),
        "KV ms": number(row.send_kv_ms),
    }
