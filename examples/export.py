"""Take a model out of Python: one file that needs torch alone, tried in a process of its own.

    python examples/export.py --model FOLDER

Without --model it is a tiny one with random weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flexdga

RUN = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
tokens, expected = torch.load(sys.argv[2])
error = (model(tokens) - expected).norm() / expected.norm()
print(f"{tuple(tokens.shape)} tokens: off by {error:.1e}, with torch alone:", not
      {"flexdga", "transformers"} & set(sys.modules))
"""


def tiny_model() -> LlamaForCausalLM:
    sizes = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a transformers model's folder (default: a tiny model)")
    parser.add_argument("--window", type=int, default=128, help="tokens that stay in sight")
    arguments = parser.parse_args()
    if arguments.model is None:
        model = tiny_model()
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval()
    flexdga.wrap(model, flexdga.DGAConfig.streaming_llm(window=arguments.window))
    vocabulary = model.config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        path, calls = Path(folder, "model.pt2"), Path(folder, "calls.pt")
        began = time.perf_counter()
        flexdga.export(model, torch.randint(vocabulary, (1, 100)), path)
        took, size = time.perf_counter() - began, path.stat().st_size / 2**20
        print(f"exported in {took:.0f} s, {size:.1f} MiB", flush=True)
        for shape in ((1, 300), (3, 777)):  # neither was seen at export
            tokens = torch.randint(vocabulary, shape)
            with torch.no_grad():
                torch.save((tokens, model(tokens, use_cache=False).logits), calls)
            subprocess.run([sys.executable, "-c", RUN, path, calls], check=True)


if __name__ == "__main__":
    main()
