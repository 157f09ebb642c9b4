"""Fine-tune a language model to see its past through DGA, and print what that wins back.

python examples/finetune.py --model FOLDER [--text FILE ...] [--steps N] [--train qkvo]

It prints the dense model's NLL on held-out text, the NLL under DGA as published (groups of 16, one
token in ten exact) without training, and after it. A run that was killed goes on from its last
checkpoint when it is started again, to the same end. Needs the `hf` extra.
"""

import argparse
import os
from pathlib import Path
from pydoc_data import topics

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexdga


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--text", type=Path, nargs="+", help="default: Python's help topics")
    add("--steps", type=int, default=300)
    add("--length", type=int, default=2048, help="tokens of a window")
    add("--batch", type=int, default=1, help="windows of a step")
    add("--lr", type=float, default=5e-5)
    add("--train", choices=["all", "qkvo"], default="all", help="qkvo: attention's weights alone")
    add("--windows", type=int, default=4, help="of held-out text, the last tenth")
    add("--checkpoint", type=Path, default=Path("finetune.pt"))
    add("--every", type=int, default=20, help="steps from checkpoint to checkpoint")
    return parser.parse_args()


def nll(model, windows):
    """Mean over the tokens of (N, L) windows, in nats."""
    model.eval()
    with torch.no_grad():
        losses = [model(w[None], labels=w[None], use_cache=False).loss.item() for w in windows]
    model.train()
    return sum(losses) / len(losses)


def batch_of(step, ids, chosen):
    """Windows that depend on the number of the step alone: a resumed run draws the same."""
    generator = torch.Generator().manual_seed(step)
    at = torch.randint(len(ids) - chosen.length, (chosen.batch,), generator=generator)
    return torch.stack([ids[i : i + chosen.length] for i in at.tolist()])


def save(state, path):
    """Whole or not at all, whenever the process is killed."""
    new = path.with_suffix(".new")
    torch.save(state, new)
    os.replace(new, path)


def main():
    chosen = arguments()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model)
    if chosen.text is None:
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    else:
        text = "\n".join(path.read_text() for path in chosen.text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    held = max(len(ids) // 10, chosen.length)
    if len(ids) < held + 2 * chosen.length:
        raise SystemExit(
            f"--text: expected at least {held + 2 * chosen.length} tokens, got {len(ids)}"
        )
    ids, held_out = ids[:-held], ids[-held:]
    windows = held_out[: held // chosen.length * chosen.length].view(-1, chosen.length)
    windows = windows[: chosen.windows]

    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen.train == "all" or any(part in name for part in names))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise SystemExit(f"--train qkvo: expected a model with {', '.join(names)}")
    optimizer = torch.optim.AdamW(trained.values(), lr=chosen.lr, weight_decay=0.0)
    model.gradient_checkpointing_enable()

    # In causal scope no token decides what an earlier one sees: nothing leaks into training.
    config = flexdga.DGAConfig.paper(scope="causal")
    if chosen.checkpoint.exists():
        state = torch.load(chosen.checkpoint)
        with torch.no_grad():
            for name, weights in state["weights"].items():
                trained[name].copy_(weights)
        optimizer.load_state_dict(state["optimizer"])
        print(f"resumed after step {state['step']} of {chosen.checkpoint}")
    else:
        state = {"step": 0, "losses": [], "dense": nll(model, windows)}
        with flexdga.applied(model, config):
            state["before"] = nll(model, windows)
    print(f"held-out NLL, dense: {state['dense']:.4f}")
    print(f"held-out NLL, DGA without training: {state['before']:.4f}", flush=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with flexdga.applied(model, config), Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("training", total=chosen.steps, completed=state["step"])
        model.train()
        for step in range(state["step"], chosen.steps):
            windows_of_step = batch_of(step, ids, chosen)
            loss = model(windows_of_step, labels=windows_of_step, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["losses"].append(loss.item())
            bar.update(task, completed=step + 1, description=f"loss {loss.item():.3f}")
            if (step + 1) % chosen.every == 0 or step + 1 == chosen.steps:
                weights = {name: p.detach() for name, p in trained.items()}
                state |= {
                    "step": step + 1, "weights": weights, "optimizer": optimizer.state_dict(),
                }  # fmt: skip
                save(state, chosen.checkpoint)
        after = nll(model, windows)
    print(f"held-out NLL, DGA after {chosen.steps} steps: {after:.4f}")
    gap = state["before"] - state["dense"]
    print(
        f"of the gap of {gap:.4f} to the dense model, closed: {(state['before'] - after) / gap:.0%}"
    )


if __name__ == "__main__":
    main()
