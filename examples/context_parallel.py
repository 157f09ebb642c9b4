"""Read a long text with a model whose sequence is sharded over processes.

    torchrun --nproc-per-node 2 examples/context_parallel.py --model FOLDER

Every process holds the model, reads its part of the text and sends the others slots, not keys and
values. Printed: how well the model expects the text, how long that took, and what was sent. The
first run compiles for a minute or two. `--length 16384` needs a model of that context, or patience
with what it says beyond its own. With `--new-tokens 50` the model goes on with the text: the raw
tokens that it may look at again stay where they were read.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import flexdga
from flexdga.parallel import Shards, traffic

ROWS = 1024  # logits at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a transformers model's folder or name")
    parser.add_argument("--text", type=Path, help="a text file (default Python's help topics)")
    parser.add_argument("--length", type=int, default=16384, help="tokens of it")
    parser.add_argument(
        "--dense-below",
        type=int,
        help="shorter texts take exact dense attention, over everybody's keys and values (default "
        "those over which DGA is expected to be slower)",
    )
    parser.add_argument("--new-tokens", type=int, default=0, help="to go on with, greedily")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    mesh = init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))
    text = options.text.read_text() if options.text else help_topics()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=options.length)
    tokens = tokens["input_ids"].to(device)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval().to(device)

    # No token is planned with what follows it.
    config = flexdga.DGAConfig.auto(
        0.15, open_by="landmarks", scope="causal", dense_below=options.dense_below
    )
    flexdga.wrap(model.model, config, mesh=mesh, gather=False)  # the part below the logits
    shards = Shards(tokens.shape[1], mesh, config)
    following = F.pad(tokens[:, 1:], (0, 1), value=-100)
    following = shards.shard(following, 1, fill=-100)
    with torch.no_grad():
        for attempt in ("first, compiles", "second"):
            dist.barrier()
            begin = time.perf_counter()
            with traffic() as sent:
                hidden = model.model(tokens).last_hidden_state
            dist.barrier()
            seconds = time.perf_counter() - begin
            say(f"{attempt}: {tokens.shape[1]} tokens in {seconds:.1f} s")
        parts = zip(hidden.split(ROWS, 1), following.split(ROWS, 1))
        losses = [
            F.cross_entropy(model.lm_head(h)[0].float(), f[0], ignore_index=-100, reduction="sum")
            for h, f in parts
        ]
        total = torch.stack([torch.stack(losses).sum(), (following != -100).sum().float()])
        dist.all_reduce(total)
    layers = model.config.num_hidden_layers
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    kv = 2 * kv_heads * head_dim * hidden.element_size() * hidden.shape[1]
    say(shards.describe())
    say(f"NLL {total[0] / total[1]:.3f} per token")
    say(f"sent by rank 0: {sum(sent.values()) / layers / 2**20:.2f} MiB a layer; its keys and "
        f"values would be {kv * (shards.world - 1) / 2**20:.2f}")  # fmt: skip
    if options.new_tokens:
        flexdga.unwrap(model.model)
        flexdga.wrap(model, config, mesh=mesh)
        begin = time.perf_counter()
        text = model.generate(tokens, max_new_tokens=options.new_tokens, do_sample=False)
        say(f"read again, and {options.new_tokens} tokens generated, in "
            f"{time.perf_counter() - begin:.1f} s:")  # fmt: skip
        say(tokenizer.decode(text[0, tokens.shape[1] :]))
    dist.destroy_process_group()


def help_topics() -> str:
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
