"""Generate text without flexdga: prompt and decode step exported into one file, run by torch alone.

    python examples/export_generate.py --model FOLDER

Without --model it is a tiny one with random weights. examples/cpp runs the same file from C++.
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
from flexdga import DGAConfig

RUN = """
import sys, time, torch
from torch._inductor.package import load_package

path, prompts, count = sys.argv[1], torch.load(sys.argv[2]), int(sys.argv[3])
prefill, decode = (load_package(path, name) for name in ("prefill", "decode"))
generated = []
for tokens in prompts:
    logits, *state = prefill(tokens)
    out = [tokens]
    began = time.perf_counter()
    for _ in range(count):
        out.append(logits.argmax(-1))
        logits = decode(out[-1], *state)
    milliseconds = 1e3 * (time.perf_counter() - began) / count
    generated.append(torch.cat(out, 1))
    print(f"{tuple(tokens.shape)} tokens, {count} more at {milliseconds:.2f} ms each")
torch.save(generated, sys.argv[4])
print("with torch alone:", not {"flexdga", "transformers"} & set(sys.modules))
"""


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a transformers model's folder (default: a tiny model)")
    parser.add_argument("--capacity", type=int, default=1024, help="tokens of the longest text")
    parser.add_argument("--count", type=int, default=100, help="tokens to generate")
    parser.add_argument("--window", type=int, default=64, help="tokens that stay in sight")
    parser.add_argument("--open", type=int, default=0, metavar="UNITS",
                        help="units of 32 old tokens that each query may see again")  # fmt: skip
    parser.add_argument("--keep", metavar="FILE.pt2", help="where to keep the package")
    arguments = parser.parse_args()
    if arguments.model is None:
        model = tiny_model()
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval().generation_config.eos_token_id = None
    config = DGAConfig(
        scope="causal", window=arguments.window, open_units=arguments.open, dense_below=0
    )
    flexdga.wrap(model, config)
    vocabulary, room = model.config.vocab_size, arguments.capacity - arguments.count
    # Neither shape was seen at export.
    prompts = [torch.randint(vocabulary, shape) for shape in ((1, room // 2), (3, room // 3))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments.keep or Path(folder, "model.pt2"))
        asked, answered = Path(folder, "prompts.pt"), Path(folder, "generated.pt")
        began = time.perf_counter()
        example = torch.randint(vocabulary, (2, 100))
        flexdga.export(model, example, path, decode=arguments.capacity)
        took, size = time.perf_counter() - began, path.stat().st_size / 2**20
        print(f"exported in {took:.0f} s, {size:.1f} MiB", flush=True)
        torch.save(prompts, asked)
        command = [sys.executable, "-c", RUN, path, asked, str(arguments.count), answered]
        subprocess.run(command, check=True)
        for tokens, got in zip(prompts, torch.load(answered)):
            settings = {"max_new_tokens": arguments.count, "do_sample": False}
            want = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
            print(f"{tuple(tokens.shape)}: the same tokens as in Python:", torch.equal(got, want))


if __name__ == "__main__":
    main()
