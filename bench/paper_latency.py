"""Claim 4: the time from token to token hardly grows with the context."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexdga import DGACache, DGAConfig, applied

from .paper_claim import Claim, Finding, Row
from .report import number
from .workloads import next_logits, random_like

DYNAMIC, STATIC, DGA = "dynamic", "static", "DGA"
CONFIG = DGAConfig.paper(unit_size=18)
"""m' = 1.1·m tokens are regrouped at a time, rounded up."""
PREFILL = dataclasses.replace(CONFIG, prefill="dense")
"""The cache is the same, and the prompt's own output is not looked at."""
FROM, TO = 4096, 16384
"""Tokens of context between which the paper's growth is, and the latter its speedup's."""
GROWTH, SPEEDUP = 1.12, 2.42
SAYS = (
    "inter-token latency grows from 26 to 29 ms (1.12 times) between 4K and 16K tokens, and is "
    "2.42 times better than dense attention's at 16K (LLaMA2-7B on one GPU)."
)
HOW = (
    "the whole model, one token after another, caches in turn, median of the tokens after the "
    "first; pooled: the slowest of them, when a unit of 18 tokens is regrouped. dynamic, static: "
    "transformers' caches with SDPA. What the caches hold is random, in the model's shapes: the "
    "time does not depend on it. Growth is from the first length to the last."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Context lengths, and how many tokens are timed at each."""

    lengths: tuple[int, ...]
    tokens: int


FULL = Settings((4096, 8192, 16384), 24)
QUICK = Settings((2048, 4096), 6)


def measure(model: Any, chosen: Settings, seed: int, announce: Callable[[str], None]) -> Claim:
    """Time tokens at every length.

    Args:
        model: of transformers, on CPU.
        chosen: how much.
        seed: of what the caches hold.
        announce: told what is being done.
    """
    rows: list[Row] = []
    with torch.no_grad():
        for length in chosen.lengths:
            torch.manual_seed(seed)
            announce(f"filling caches with {length} tokens")
            caches = filled_caches(model, length, chosen.tokens)
            announce(f"decoding after {length} tokens")
            rows += _time(model, caches, length, chosen.tokens)
    return Claim(
        "4", "Inter-token latency", SAYS, HOW, _findings(rows),
        {"ms from token to token": _lines(rows)}, {"latency": rows},
    )  # fmt: skip


def filled_caches(model: Any, length: int, tokens: int) -> dict[str, Any]:
    """A cache of each kind that holds `length` random tokens, with room for more.

    One layer's prompt goes into every layer.
    """
    from transformers import DynamicCache, StaticCache

    text = model.config.get_text_config()
    query, key, value = random_like(model, length)
    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=length + tokens + 1)
    dga = DGACache(PREFILL, model_config=model.config)
    with torch.compiler.set_stance("force_eager"):
        dga.layers[0].cache.attend(query, key, value)
    for index in range(text.num_hidden_layers):
        dynamic.update(key, value, index)
        static.update(key, value, index)
        if index:
            dga.layers[index].cache = copy.deepcopy(dga.layers[0].cache)
    return {DYNAMIC: dynamic, STATIC: static, DGA: dga}


def _time(model: Any, caches: dict[str, Any], length: int, tokens: int) -> list[Row]:
    vocabulary = model.config.get_text_config().vocab_size
    found: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(tokens + 1):  # the first is not counted
        token = torch.randint(vocabulary, (1, 1))
        names = list(caches)
        for name in names[step % 3 :] + names[: step % 3]:
            if name == DGA:
                with applied(model, CONFIG):
                    found[name].append(_token(model, token, caches[name]))
            else:
                found[name].append(_token(model, token, caches[name]))
    return [
        {
            "length": length, "cache": name, "ms": statistics.median(times[1:]),
            "fastest_ms": min(times[1:]), "slowest_ms": max(times[1:]),
            "mean_ms": statistics.mean(times[1:]), "tokens": tokens,
        }
        for name, times in found.items()
    ]  # fmt: skip


def _token(model: Any, token: Tensor, cache: Any) -> float:
    """Milliseconds of one token."""
    begin = time.perf_counter()
    next_logits(model, token, cache)
    return 1e3 * (time.perf_counter() - begin)


def _findings(rows: Sequence[Row]) -> list[Finding]:
    ms = {(row["cache"], row["length"]): row["ms"] for row in rows}
    first, last = min(r["length"] for r in rows), max(r["length"] for r in rows)
    enough = (first, last) == (FROM, TO)
    growth = {name: ms[name, last] / ms[name, first] for name in (DYNAMIC, STATIC, DGA)}
    times = {name: ms[name, last] / ms[DGA, last] for name in (DYNAMIC, STATIC)}
    return [
        Finding(
            f"DGA's latency grows by no more than {GROWTH} times from {FROM} to {TO} tokens.",
            f"{growth[DGA]:.2f} times from {first} to {last}; dynamic {growth[DYNAMIC]:.2f}, "
            f"static {growth[STATIC]:.2f}.",
            growth[DGA] <= GROWTH if enough else None,
        ),
        Finding(
            f"it is {SPEEDUP} times better than dense attention's at {TO} tokens.",
            f"at {last} {times[DYNAMIC]:.2f} times better than the dynamic cache, "
            f"{times[STATIC]:.2f} than the static one, which is the faster.",
            min(times.values()) >= SPEEDUP if enough else None,
        ),
    ]


def _lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    lines = []
    for length in dict.fromkeys(row["length"] for row in rows):
        own = {row["cache"]: row for row in rows if row["length"] == length}
        lines.append(
            {"context": str(length)}
            | {name: number(row["ms"]) for name, row in own.items()}
            | {
                "DGA pooled": number(own[DGA]["slowest_ms"]),
                "x dynamic": f"{own[DYNAMIC]['ms'] / own[DGA]['ms']:.2f}",
                "x static": f"{own[STATIC]['ms'] / own[DGA]['ms']:.2f}",
            }
        )
    return lines


def draw(claim: Claim, figure: Any) -> None:
    """Latency over context."""
    rows = claim.rows["latency"]
    axes = figure.subplots()
    for name in (DYNAMIC, STATIC, DGA):
        own = [row for row in rows if row["cache"] == name]
        axes.plot([r["length"] for r in own], [r["ms"] for r in own], marker="o", label=name)
    ticks = sorted({row["length"] for row in rows})
    axes.set(xscale="log", xlabel="tokens of context", ylabel="ms from token to token")
    axes.set_xticks(ticks, [str(length) for length in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
