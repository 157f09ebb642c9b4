"""The subcommand `decode`: what a token costs after a long prompt, dense caches against DGACache.

One model reads one text. At each context length the prompt is prefilled twice per method, in turn
(time to first token: the better one, for the first pays for memory and files that were never
touched); then the same next tokens of the text are fed to all methods, one at a time and in
turn. Attention alone is timed on the same caches: all layers of a token, nothing else of the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexdga import DGACache, DGAConfig, applied, dga_attention
from flexdga.cost_model import dense_below
from flexdga.exact import attend_all

from . import hardware, options
from .decode_report import DecodeReport, DecodeRow
from .errors import UsageError
from .progress import Stages
from .workloads import default_text, next_logits, open_model, random_like

LENGTHS = (1024, 4096, 8192, 16384, 32768)
TOKENS, PROMPTS = 16, 2
DYNAMIC, STATIC, DGA = "dynamic", "static", "DGA"


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options."""

    model: Path
    text: str
    lengths: tuple[int, ...]
    tokens: int
    dtype: torch.dtype
    device: torch.device
    threads: int | None
    config: DGAConfig
    json: str | None
    csv: str | None
    plot: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexdga-bench decode`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a local Hugging Face model")
    add("--text", type=Path, metavar="FILE", help="what it reads (default: Python's help)")
    add(
        "--lengths",
        type=options.lengths,
        default=LENGTHS,
        metavar="L,L,...",
        help=f"tokens of context (default {','.join(map(str, LENGTHS))})",
    )
    add(
        "--tokens",
        type=options.positive_int,
        default=TOKENS,
        metavar="N",
        help=f"decoded at each length (default {TOKENS})",
    )
    options.add_machine(parser)
    add(
        "--config", nargs="+", default=[], metavar="KEY=VALUE",
        help="fields of DGAConfig, or preset=NAME",
    )  # fmt: skip
    add("--json", metavar="FILE", help="everything with full digits; - for stdout")
    add("--csv", metavar="FILE", help="the rows")
    add("--plot", metavar="FILE.png", help="latency against context (needs the `plot` extra)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the files."""
    begin = time.perf_counter()
    chosen = _check(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    model, ids = _open(chosen)
    rows: list[DecodeRow] = []
    with torch.no_grad(), Stages((PROMPTS + 1) * len(chosen.lengths) + 1) as stages:
        stages.begin("compiling")
        compile_s = _compile(model, chosen)
        stages.end()
        for length in chosen.lengths:
            rows += _at_length(model, ids, length, chosen, stages)
    limit = getattr(model.config, "max_position_embeddings", None)
    report = DecodeReport(
        {
            "hardware": hardware.device_name(chosen.device),
            "threads": torch.get_num_threads(),
            "versions": hardware.versions(),
            "model": f"{chosen.model.name}, {str(chosen.dtype).removeprefix('torch.')}, "
            f"{limit} positions",
            "DGAConfig": options.non_default_fields(chosen.config),
            "decoded": f"{chosen.tokens} tokens of the text at each length, methods in turn",
            "compiling": f"{compile_s:.1f} s, apart from all that follows",
            "wall time": f"{time.perf_counter() - begin:.0f} s",
        },
        rows,
    )
    print(report.text(), file=sys.stderr if chosen.json == "-" else sys.stdout)
    report.write(chosen.json, chosen.csv, chosen.plot)
    return 0


def _check(a: argparse.Namespace) -> Options:
    options.check_model_folder(a.model)
    options.check_outputs(a.json, a.csv, a.plot)
    try:
        text = default_text() if a.text is None else a.text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {a.text}: {error}") from error
    return Options(
        model=a.model, text=text, lengths=a.lengths, tokens=a.tokens,
        dtype=options.DTYPES[a.dtype], device=options.check_device(a.device), threads=a.threads,
        config=options.parse_config(a.config), json=a.json, csv=a.csv, plot=a.plot,
    )  # fmt: skip


def _open(chosen: Options) -> tuple[Any, Tensor]:
    """The model, and (1, N) token ids of the text, as many as are needed."""
    need = chosen.lengths[-1] + 2 * chosen.tokens
    model, tokenizer = open_model(chosen.model, chosen.dtype)
    ids = tokenizer(chosen.text, truncation=True, max_length=need)["input_ids"]
    if len(ids) < need:
        raise UsageError(
            f"--text: expected at least {need} tokens for --lengths and --tokens, got {len(ids)}"
        )
    return model.to(chosen.device), torch.tensor([ids], device=chosen.device)


def _compile(model: Any, chosen: Options) -> float:
    """Compile attention for the model's heads, so that no prompt waits for it."""
    query, key, _ = random_like(model, 1)
    below = dense_below(chosen.config, query, key, decodes=True)
    if chosen.lengths[-1] < below:
        return 0.0
    begin = time.perf_counter()
    query, key, value = random_like(model, max(below, 1024))
    dga_attention(query, key, value, config=chosen.config, return_plan=True)
    return time.perf_counter() - begin


def _at_length(
    model: Any, ids: Tensor, length: int, chosen: Options, stages: Stages
) -> list[DecodeRow]:
    """Prefill each method, then decode in turn."""
    from transformers import DynamicCache, StaticCache

    prompt = ids[:, :length]
    first = {DYNAMIC: math.inf, DGA: math.inf}
    for turn in range(1, PROMPTS + 1):
        stages.begin(f"L = {length}, prompts, {turn} of {PROMPTS}")
        dense = DynamicCache(config=model.config)
        dga = DGACache(chosen.config, model_config=model.config)
        took = _timed(chosen.device, _forward, model, prompt, dense)
        first[DYNAMIC] = min(first[DYNAMIC], took)
        with applied(model, chosen.config):
            first[DGA] = min(first[DGA], _timed(chosen.device, _forward, model, prompt, dga))
        stages.end()
    stages.begin(f"L = {length}, decoding")
    static = StaticCache(config=model.config, max_cache_len=length + 2 * chosen.tokens)
    for index, layer in enumerate(dense.layers):
        static.update(layer.keys, layer.values, index)
    token_ms: dict[str, list[float]] = {DYNAMIC: [], STATIC: [], DGA: []}
    attention_ms: dict[str, list[float]] = {DYNAMIC: [], DGA: []}
    for step in range(-1, chosen.tokens):  # the first is not counted
        at = length + step + 1
        token = ids[:, at : at + 1]
        for name, cache in ((DYNAMIC, dense), (STATIC, static)):
            token_ms[name].append(_timed(chosen.device, _forward, model, token, cache))
        with applied(model, chosen.config):
            token_ms[DGA].append(_timed(chosen.device, _forward, model, token, dga))
    held = {DYNAMIC: _bytes(dense), STATIC: _bytes(static), DGA: dga.memory().bytes}
    slots = max(layer.cache.num_slots + layer.cache.num_raw for layer in dga.layers)
    shapes = model.config.get_text_config().num_attention_heads
    for _ in range(chosen.tokens):
        news = [_new_token(layer, shapes) for layer in dense.layers]
        attention_ms[DYNAMIC].append(_timed(chosen.device, _dense_layers, dense, news))
        attention_ms[DGA].append(_timed(chosen.device, _dga_layers, dga, news))
    stages.end()
    base = statistics.median(token_ms[DYNAMIC][1:])
    rows = []
    for name in (DYNAMIC, STATIC, DGA):
        times = token_ms[name][1:]
        own = attention_ms.get(name)
        rows.append(
            DecodeRow(
                length=length,
                method=name,
                first_token_s=first[name] / 1e3 if name in first else None,
                token_ms=statistics.median(times),
                token_min_ms=min(times),
                token_max_ms=max(times),
                tokens_per_s=1e3 / statistics.median(times),
                speedup=base / statistics.median(times),
                attention_ms=None if own is None else statistics.median(own),
                cache_mib=held[name] / 2**20,
                of_dense=held[name] / held[DYNAMIC],
                keys=length if name != DGA else slots,
            )
        )
    return rows


def _forward(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """The next token, greedily."""
    return next_logits(model, ids, cache)[:, -1].argmax(-1)


def _new_token(layer: Any, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value of one token, shaped for a layer's cache."""
    key = torch.randn_like(layer.keys[:, :, :1])
    query = torch.randn_like(key).repeat_interleave(heads // key.shape[1], 1)
    return query, key, torch.randn_like(key)


def _dense_layers(cache: Any, news: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Dense attention of one token in all layers; the query heads of a KV head share its keys."""
    for layer, (query, _, _) in zip(cache.layers, news):
        nothing = query.new_zeros(1, 1, 1, 1).expand(1, 1, 1, layer.keys.shape[2])
        attend_all(query, layer.keys, layer.values, nothing, scale=query.shape[-1] ** -0.5)


def _dga_layers(cache: DGACache, news: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """The same over a DGACache, which also stores the token, and pools when that is due."""
    for layer, new in zip(cache.layers, news):
        layer.cache.attend(*new)


def _bytes(cache: Any) -> int:
    return sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )


def _timed(device: torch.device, call: Callable[..., Any], *args: Any) -> float:
    """Milliseconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - begin)
