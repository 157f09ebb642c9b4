"""A chat over a long document, dense and DGA side by side: text, latency and cache size, live.

python examples/generate.py --model FOLDER [--document FILE] [--question TEXT]

FOLDER holds a transformers model with a chat template, such as SmolLM2-135M-Instruct. Needs the
`hf` extra.
"""

import argparse
import time
from pathlib import Path
from pydoc_data import topics

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer

import flexdga
from flexdga.cache import CACHE_NAME


class Answer(BaseStreamer):
    """Collects the tokens of one `generate` call, and shows them as they come."""

    def __init__(self, name, tokenizer, cache, size, show):
        self.name, self.tokenizer, self.cache, self.size, self.show = (
            name, tokenizer, cache, size, show,
        )  # fmt: skip
        self.tokens, self.times, self.mib = [], [], 0.0

    def put(self, value):
        self.times.append(time.perf_counter())
        if len(self.times) > 1:  # the first is the prompt
            self.tokens += value.flatten().tolist()
        self.mib = self.size(self.cache) / 2**20
        self.show()

    def end(self):
        self.show()

    def row(self):
        gaps = [b - a for a, b in zip(self.times[1:], self.times[2:])]
        first = f"{self.times[1] - self.times[0]:.1f} s" if len(self.times) > 1 else "..."
        token = f"{1e3 * sorted(gaps)[len(gaps) // 2]:.0f} ms" if gaps else ""
        return self.name, first, token, f"{self.mib:.1f}"

    def panel(self):
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return Panel(text or "...", title=self.name)


def dense_bytes(cache):
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--document", type=Path, help="default: Python's help topics")
    parser.add_argument("--question", default="What is the document about? Answer in one sentence.")
    parser.add_argument("--tokens", type=int, default=7000, help="of the document")
    parser.add_argument("--answer", type=int, default=48, help="new tokens")
    chosen = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model).eval()
    document = chosen.document.read_text() if chosen.document else "\n".join(topics.topics.values())
    ids = tokenizer(document, truncation=True, max_length=chosen.tokens)["input_ids"]
    message = f"{tokenizer.decode(ids)}\n\n{chosen.question}"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    # The question stands at the end: the last queries know best what it needs.
    config = flexdga.DGAConfig(probe_placement="tail")
    console = Console()
    console.print(f"{prompt['input_ids'].shape[1]} tokens of prompt; the first DGA run compiles")

    with Live(console=console, refresh_per_second=8) as live:
        answers = []

        def show():
            table = Table("cache", "first token", "each token", "MiB")
            for answer in answers:
                table.add_row(*answer.row())
            live.update(Group(*(answer.panel() for answer in answers), table))

        def run(name, cache, size):
            answers.append(Answer(name, tokenizer, cache, size, show))
            model.generate(
                **prompt, **{CACHE_NAME: cache}, streamer=answers[-1],
                max_new_tokens=chosen.answer, do_sample=False,
            )  # fmt: skip

        with torch.no_grad():
            run("dense", DynamicCache(config=model.config), dense_bytes)
            with flexdga.applied(model, config):
                cache = flexdga.DGACache(config, model_config=model.config)
                run("DGA", cache, lambda cache: cache.memory().bytes)


if __name__ == "__main__":
    main()
