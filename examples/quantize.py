"""int8 weights (torchao) under DGA: run, compiled and exported, with speed, size and loss.

    python examples/quantize.py --model FOLDER

Without --model it is a tiny one with random weights, reading random tokens.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import flexdga


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
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
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 2**20


def row(name: str, run: Callable[[Tensor], Tensor], tokens: Tensor, size: float) -> list[object]:
    """Speed and loss of one way to run the model."""
    logits = run(tokens)  # the first call may compile
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run(tokens)
        seconds.append(time.perf_counter() - began)
    loss = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).item()
    return [name, f"{tokens.shape[1] / min(seconds):.0f}", f"{size:.1f}", f"{loss:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a transformers model's folder (default: a tiny model)")
    parser.add_argument("--length", type=int, default=1000, help="tokens to read")
    parser.add_argument("--window", type=int, default=128, help="tokens that stay in sight")
    arguments = parser.parse_args()
    model, tokens = load(arguments.model, arguments.length)
    config = flexdga.DGAConfig.streaming_llm(window=arguments.window, scope="causal")
    flexdga.wrap(model, config)

    def run(tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).logits

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        rows = [row("float32", run, tokens, mebibytes(model))]
        quantize_(model, Int8WeightOnlyConfig())  # of a wrapped model: attention has no weights
        size = mebibytes(model)
        rows.append(row("int8", run, tokens, size))
        rows.append(row("int8 compiled", torch.compile(run), tokens, size))
        path = flexdga.export(model, tokens[:, :100], Path(folder, "model.pt2"))
        exported = flexdga.load(path)
        rows.append(row("int8 exported", exported, tokens, path.stat().st_size / 2**20))
    print(tabulate(rows, ["weights", "tokens/s", "MiB", "NLL"], tablefmt="github"))


if __name__ == "__main__":
    main()
