"""Fine-tune a language model to see its past through DGA, and print what that wins back.

python examples/finetune.py --model FOLDER [--text FILE ...] [--steps N] [--train qkvo]

It prints the dense model's NLL on held-out text, the NLL under DGA as published (groups of 16, one
token in ten exact) without training, and after it. Training on a kind of text helps by itself:
`--attention dense` trains the dense model on the same windows, to compare with. A run that was
killed goes on from its last checkpoint when it is started again, to the same end. Needs the `hf`
extra; `--plot` matplotlib.
"""

import argparse
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from pydoc_data import topics

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexdga

WARM_UP = 20
"""Steps in which the learning rate rises."""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--text", type=Path, nargs="+", help="default: Python's help, the standard library's code")
    add("--steps", type=int, default=300)
    add("--length", type=int, default=2048, help="tokens of a window")
    add("--batch", type=int, default=1, help="windows of a step")
    add("--lr", type=float, default=3e-4, help="after a warm-up; it falls to 0 with the last step")
    add("--train", choices=["all", "qkvo"], default="all", help="qkvo: attention's weights alone")
    add("--attention", choices=["dga", "dense"], default="dga", help="dense: to compare with")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bfloat16", action="store_true", help="autocast: faster on GPUs, and CPUs with AMX")
    add("--recompute", action="store_true", help="activations in backward: less memory")
    add("--windows", type=int, default=4, help="of the last tenth of each text, held out")
    add("--checkpoint", type=Path, default=Path("finetune.pt"))
    add("--every", type=int, default=20, help="steps from checkpoint to checkpoint")
    add("--look", type=int, default=50, help="steps from one look at held-out text to the next")
    add("--json", type=Path, help="the curve, written with each checkpoint")
    add("--plot", type=Path, help="the curve as a PNG")
    return parser.parse_args()


def read(chosen):
    """What is trained on and what is held out: the texts, joined by kind."""
    if chosen.text is not None:
        return [path.read_text() for path in chosen.text]
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    return [
        "\n".join(topics.topics[name] for name in sorted(topics.topics)),
        "\n".join(path.read_text() for path in library),
    ]


def split(texts, tokenizer, chosen):
    """Tokens to train on, one row of them for all texts, and (N, L) windows of held-out ones."""
    training, held_out = [], []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        held = max(len(ids) // 10, chosen.length)
        if len(ids) < held + 2 * chosen.length:
            raise SystemExit(
                f"--text: expected at least {held + 2 * chosen.length} tokens, got {len(ids)}"
            )
        training.append(ids[:-held])
        windows = ids[-held:][: held // chosen.length * chosen.length].view(-1, chosen.length)
        held_out.append(windows[: chosen.windows])
    return torch.cat(training).to(chosen.device), torch.cat(held_out).to(chosen.device)


def loss_of(model, windows, chosen):
    """Mean over the tokens of (N, L) windows, in nats.

    Autocast lasts no longer than this: within it, the weights that it has cast stay as they were.
    """
    device = torch.device(chosen.device).type
    with torch.autocast(device, torch.bfloat16, enabled=chosen.bfloat16):
        return model(windows, labels=windows, use_cache=False).loss


def nll(model, windows, chosen):
    """`loss_of` held-out windows, one at a time."""
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, w[None], chosen).item() for w in windows]
    model.train()
    return sum(losses) / len(losses)


def batch_of(step, ids, chosen):
    """Windows that depend on the number of the step alone: a resumed run draws the same."""
    generator = torch.Generator().manual_seed(step)
    at = torch.randint(len(ids) - chosen.length, (chosen.batch,), generator=generator)
    return torch.stack([ids[i : i + chosen.length] for i in at.tolist()])


def rate_of(step, chosen):
    """The learning rate: up in the first steps, then down to nothing."""
    return chosen.lr * min(1.0, (step + 1) / WARM_UP) * (1 - step / chosen.steps)


def save(state, path):
    """Whole or not at all, whenever the process is killed."""
    new = path.with_suffix(".new")
    torch.save(state, new)
    os.replace(new, path)


def write_curve(state, chosen):
    """What has been measured so far, with the options that it was measured under."""
    if chosen.json is None:
        return
    options = {name: str(value) for name, value in vars(chosen).items()}
    numbers = {name: state[name] for name in ("step", "dense", "before", "curve", "losses")}
    chosen.json.write_text(json.dumps({"options": options} | numbers, indent=1))


def draw(state, chosen):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*state["curve"]), "o-", label=f"{chosen.attention}, trained")
    axes.axhline(state["before"], color="tab:red", ls=":", label="DGA, without training")
    axes.axhline(state["dense"], color="black", ls="--", label="dense, without training")
    axes.set(xlabel="steps", ylabel="held-out NLL, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(chosen.plot, dpi=150)


def main():
    chosen = arguments()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model).to(chosen.device)
    ids, windows = split(read(chosen), tokenizer, chosen)

    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen.train == "all" or any(part in name for part in names))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise SystemExit(f"--train qkvo: expected a model with {', '.join(names)}")
    optimizer = torch.optim.AdamW(trained.values(), lr=chosen.lr, weight_decay=0.0)
    if chosen.recompute:
        model.gradient_checkpointing_enable()

    # In causal scope no token decides what an earlier one sees: nothing leaks into training.
    config = flexdga.DGAConfig.paper(scope="causal")
    decide = ("attention", "train", "steps", "length", "batch", "lr", "bfloat16")
    settings = {name: getattr(chosen, name) for name in decide}
    if chosen.checkpoint.exists():
        state = torch.load(chosen.checkpoint, map_location=chosen.device)
        if state["settings"] != settings:
            raise SystemExit(f"--checkpoint: it is of {state['settings']}, expected {settings}")
        with torch.no_grad():
            for name, weights in state["weights"].items():
                trained[name].copy_(weights)
        optimizer.load_state_dict(state["optimizer"])
        print(f"resumed after step {state['step']} of {chosen.checkpoint}")
    else:
        dense = nll(model, windows, chosen)
        with flexdga.applied(model, config):
            before = nll(model, windows, chosen)
        state = {"settings": settings, "step": 0, "losses": [], "dense": dense, "before": before}
        state["curve"] = [(0, state["before" if chosen.attention == "dga" else "dense"])]
    print(f"held-out NLL, dense: {state['dense']:.4f}")
    print(f"held-out NLL, DGA without training: {state['before']:.4f}", flush=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    applied = flexdga.applied(model, config) if chosen.attention == "dga" else nullcontext()
    with applied, Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("training", total=chosen.steps, completed=state["step"])
        model.train()
        begin = time.perf_counter()
        for step in range(state["step"], chosen.steps):
            loss = loss_of(model, batch_of(step, ids, chosen), chosen)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate_of(step, chosen)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["losses"].append(loss.item())
            state["step"] = done = step + 1
            bar.update(task, completed=done, description=f"loss {loss.item():.3f}")
            if done % chosen.look == 0 or done == chosen.steps:
                state["curve"].append((done, nll(model, windows, chosen)))
                seconds = time.perf_counter() - begin
                print(f"step {done}: held-out NLL {state['curve'][-1][1]:.4f}, {seconds:.0f} s")
            if done % chosen.every == 0 or done == chosen.steps:
                weights = {name: p.detach() for name, p in trained.items()}
                state |= {"weights": weights, "optimizer": optimizer.state_dict()}
                save(state, chosen.checkpoint)
                write_curve(state, chosen)
    after = state["curve"][-1][1]
    what = "DGA" if chosen.attention == "dga" else "dense"
    print(f"held-out NLL, {what} after {state['step']} steps: {after:.4f}")
    if chosen.attention == "dga":
        gap = state["before"] - state["dense"]
        closed = (state["before"] - after) / gap
        print(f"of the gap of {gap:.4f} to the dense model, closed: {closed:.0%}")
    if chosen.plot is not None:
        draw(state, chosen)


if __name__ == "__main__":
    main()
