"""torchao under DGA: quantised weights run, compiled and exported, and int8 slots in the cache.

    python examples/quantize.py --model FOLDER

Without --model it is a tiny one with random weights, reading random tokens. Compiling and exporting
30 layers take minutes each: --ways eager leaves them out. The int4 kernel takes a minute for 200
tokens: --length 200 for it.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import flexdga
from flexdga import DGACache, DGAConfig
from flexdga.cache import CACHE_NAME

WEIGHTS = {
    "float32": None,
    "int8": Int8WeightOnlyConfig(),
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig(),
    "int4": PrototypeInt4WeightOnlyConfig(group_size=64),
}
"""int8-dynamic: activations are rounded to int8 too, row by row as they come. int4: 64 weights
share a scale and a zero; the kernel for CPUs is torch's, and torchao 0.18 reaches it by this
name."""
WAYS = ("eager", "compiled", "exported")
CHUNK = 64
"""Tokens that read the cache at a time."""


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(sizes)


def load(folder: str | None, length: int) -> tuple[nn.Module, Tensor]:
    """The model, and (1, L) tokens to read."""
    if folder is None:
        return tiny_model().eval(), torch.randint(512, (1, length))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "\n".join(topics.topics.values())
    return model, torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:length]])


def mebibytes(model: nn.Module) -> float:
    """Of the weights as they are saved: those that layers share count once."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 2**20


def loss(logits: Tensor, tokens: Tensor) -> float:
    """Negative log likelihood of the tokens after the first, a token."""
    return F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).item()


def row(name: str, run: Callable[[Tensor], Tensor], tokens: Tensor, size: float) -> list[str]:
    """Speed and loss of one way to run a model."""
    logits = run(tokens)  # the first call may compile
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run(tokens)
        seconds.append(time.perf_counter() - began)
    speed = tokens.shape[1] / min(seconds)
    print(f"{name}: {speed:.0f} tokens/s", file=sys.stderr, flush=True)
    return [name, f"{speed:.0f}", f"{size:.1f}", f"{loss(logits, tokens):.4f}"]


def rows_of_weights(
    model: nn.Module, tokens: Tensor, kinds: list[str], ways: list[str]
) -> list[list[str]]:
    """Each kind of weights in each way: a prompt of all the tokens."""
    rows = []
    for name in kinds:
        quantised = copy.deepcopy(model)
        if WEIGHTS[name] is not None:
            quantize_(quantised, WEIGHTS[name])  # of a wrapped model: attention has no weights

        def run(tokens: Tensor, model: nn.Module = quantised) -> Tensor:
            return model(tokens, use_cache=False).logits

        size = mebibytes(quantised)
        if "eager" in ways:
            rows.append(row(name, run, tokens, size))
        if "compiled" in ways:
            torch.compiler.reset()
            rows.append(row(f"{name}, compiled", torch.compile(run), tokens, size))
        if "exported" in ways:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.pt2")
                flexdga.export(quantised, tokens[:, :100], path)
                size = path.stat().st_size / 2**20
                rows.append(row(f"{name}, exported", flexdga.load(path), tokens, size))
    return rows


def rows_of_slots(model: nn.Module, tokens: Tensor, config: DGAConfig) -> list[list[str]]:
    """Slots in float32 and in int8, read by every chunk of the text after the first."""
    rows, losses, sizes = [], [], []
    for kind in (None, "int8"):
        cache = DGACache(config, model_config=model.config, kv_dtype=kind)
        logits = [
            model(chunk, **{CACHE_NAME: cache}, use_cache=True).logits
            for chunk in tokens.split(CHUNK, 1)
        ]
        memory = cache.memory()
        losses.append(loss(torch.cat(logits, 1), tokens))
        sizes.append(memory.slot_bytes)
        found = (memory.slot_bytes / 2**20, sizes[-1] / sizes[0], memory.bytes / 2**20)
        rows.append([kind or "float32", *(f"{x:.3f}" for x in found), f"{losses[-1]:.4f}"])
        rows[-1].append(f"{losses[-1] / losses[0] - 1:+.3%}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a transformers model's folder (default: a tiny model)")
    parser.add_argument("--length", type=int, default=1000, help="tokens to read")
    parser.add_argument("--window", type=int, default=128, help="tokens that stay in sight")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    model, tokens = load(arguments.model, arguments.length)
    window = {"window": arguments.window, "scope": "causal", "dense_below": 0}
    with torch.no_grad():
        with flexdga.applied(model, DGAConfig.streaming_llm(**window)):
            rows = rows_of_weights(model, tokens, arguments.weights, arguments.ways)
        print(tabulate(rows, ["weights", "tokens/s", "MiB", "NLL"], tablefmt="github"))
        groups = DGAConfig(rest="group", focal_ratio=1 / 16, open_units=0, **window)
        with flexdga.applied(model, groups):
            rows = rows_of_slots(model, tokens, groups)
    head = ["slots", "MiB", "of float32", "cache MiB", "NLL", "change"]
    print("\n" + tabulate(rows, head, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
