"""Claim 3b: small language models from scratch, dense against DGA, on the same text and seeds."""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flexdga import DGAConfig, applied

from .paper_claim import Claim, Finding, Row

DENSE, DGA, LEAKS = "dense", "DGA", "DGA, prompt"
SAYS = (
    "a lower condition number makes training converge faster: GPT-2 small and OPT-125M from "
    "scratch reach a loss in fewer steps with DGA than with dense attention."
)
HOW = (
    "small Llamas (2 layers, 4 heads of 32) from scratch on Python's help and standard library, "
    "tokens renumbered by how common they are; AdamW, weights and windows from the seed alone. "
    "DGA as published, causal scope. DGA, prompt: trained in prompt scope, in which later tokens "
    "choose the focal ones (the leak), held-out text read in causal scope. NLL: of held-out text, "
    "nats per token, mean of the seeds ± half of greatest - least."
)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is trained."""

    methods: tuple[str, ...]
    seeds: int
    steps: int
    look: int
    batch: int
    length: int
    windows: int
    vocabulary: int


FULL = Settings((DENSE, DGA, LEAKS), 3, 200, 25, 2, 512, 4, 2048)
QUICK = Settings((DENSE, DGA), 3, 30, 10, 2, 256, 4, 512)
LEARNING_RATE = 2e-3
WARM_UP = 20
"""Steps in which the learning rate rises to its value."""


def config_of(method: str) -> DGAConfig | None:
    """The published setting, in the scope of the method; None = dense."""
    if method == DENSE:
        return None
    return DGAConfig.paper(scope="prompt" if method == LEAKS else "causal")


def common_tokens(ids: Tensor, vocabulary: int) -> Tensor:
    """The ids renumbered by how common they are; the rarest share the last number.

    A small model has no room for a large vocabulary.
    """
    order = torch.bincount(ids).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank[ids].clamp(max=vocabulary - 1)


def train(
    method: str, seed: int, ids: Tensor, chosen: Settings, announce: Callable[[str], None]
) -> list[Row]:
    """One model, trained from scratch; its losses at every look.

    Args:
        method: of the attention.
        seed: of weights and of windows, so that methods differ in nothing else.
        ids: (N,) the text; its last tenth is held out.
        chosen: how much.
        announce: told the step.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=chosen.vocabulary, **SIZES))
    model.train()
    held = max(len(ids) // 10, chosen.windows * chosen.length)
    windows = ids[-held:][: chosen.windows * chosen.length].view(chosen.windows, -1)
    ids = ids[:-held]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    config = config_of(method)
    causal = config_of(DGA) if method == LEAKS else config
    rows: list[Row] = []
    losses: list[float] = []
    for step in range(chosen.steps + 1):
        if step % chosen.look == 0:
            announce(f"{method}, seed {seed}, step {step}")
            rows.append(
                {
                    "method": method, "seed": seed, "step": step,
                    "training": statistics.mean(losses) if losses else None,
                    "held_out": _loss(model, windows, causal),
                }
            )  # fmt: skip
            losses.clear()
        if step == chosen.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP)
        at = torch.randint(len(ids) - chosen.length, (chosen.batch,), generator=generator)
        batch = torch.stack([ids[i : i + chosen.length] for i in at.tolist()])
        with torch.enable_grad(), _attending(model, config):
            loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return rows


def _loss(model: Any, windows: Tensor, config: DGAConfig | None) -> float:
    with torch.no_grad(), _attending(model, config):
        loss: float = model(windows, labels=windows, use_cache=False).loss.item()
    return loss


@contextmanager
def _attending(model: Any, config: DGAConfig | None) -> Iterator[None]:
    """Uncompiled: at these sizes compiling would take longer than training."""
    if config is None:
        yield
        return
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", message="flexdga: training with scope='prompt'")
        with applied(model, config):
            yield


def measure(ids: Tensor, chosen: Settings, announce: Callable[[str], None]) -> Claim:
    """Train every method with every seed.

    Args:
        ids: (N,) tokens of the text, as the tokenizer numbers them.
        chosen: how much.
        announce: told what is being done.
    """
    common = common_tokens(ids, chosen.vocabulary)
    rows: list[Row] = []
    for seed in range(chosen.seeds):
        for method in chosen.methods:
            rows += train(method, seed, common, chosen, announce)
    return Claim(
        "3b", "Convergence from scratch", SAYS,
        f"{HOW} {chosen.steps} steps of {chosen.batch} windows of {chosen.length} tokens, "
        f"{chosen.seeds} seeds, {chosen.vocabulary} tokens in the vocabulary.",
        _findings(rows), {"Held-out NLL by step": _lines(rows)}, {"training": rows},
    )  # fmt: skip


def _at(rows: Sequence[Row], method: str, step: int) -> list[float]:
    """Held-out NLL of each seed."""
    return [r["held_out"] for r in rows if r["method"] == method and r["step"] == step]


def _findings(rows: Sequence[Row]) -> list[Finding]:
    steps = sorted({row["step"] for row in rows} - {0})
    dense, found = _mean_curve(rows, DENSE), []
    for method in dict.fromkeys(row["method"] for row in rows):
        if method == DENSE:
            continue
        needed = _steps_to(dense[-1][1], _mean_curve(rows, method))
        found.append(
            Finding(
                f"{method} needs fewer steps than dense to the loss at which dense ends, by the "
                "mean of the seeds.",
                f"to {dense[-1][1]:.3f} "
                + (f"{needed:.0f}" if needed is not None else f"more than {steps[-1]}")
                + f" steps, dense {steps[-1]}.",
                needed is not None and needed < steps[-1],
            )
        )
        gaps = [
            [a - b for a, b in zip(_at(rows, method, step), _at(rows, DENSE, step))]
            for step in steps
        ]
        ahead = [sum(gap < 0 for gap in at) for at in gaps]
        seeds = len(gaps[0])
        found.append(
            Finding(
                f"{method} is ahead of dense after the same steps, with every seed.",
                f"held-out NLL over dense's after {steps[-1]} steps: "
                f"{', '.join(f'{gap:+.3f}' for gap in gaps[-1])}; seeds ahead at each look: "
                f"{', '.join(map(str, ahead))} of {seeds}.",
                all(count == seeds for count in ahead),
            )
        )
    return found


def _mean_curve(rows: Sequence[Row], method: str) -> list[tuple[int, float]]:
    """Steps, and the mean of the seeds' held-out NLL."""
    steps = sorted({row["step"] for row in rows if row["method"] == method})
    return [(step, statistics.mean(_at(rows, method, step))) for step in steps]


def _steps_to(loss: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """The step at which a curve first gets down to a loss, on straight lines between its looks."""
    if curve[0][1] <= loss:
        return float(curve[0][0])
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def _lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return [
        {"step": str(step)} | {method: _spell(_at(rows, method, step)) for method in methods}
        for step in sorted({row["step"] for row in rows})
    ]


def _spell(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def draw(claim: Claim, figure: Any) -> None:
    """Held-out and training loss over steps: a thin line per seed, a thick one for their mean."""
    rows = claim.rows["training"]
    panels = figure.subplots(1, 2)
    for axes, key in zip(panels, ("held_out", "training")):
        for color, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [r for r in rows if r["method"] == method and r[key] is not None]
            steps = sorted({row["step"] for row in own})
            for seed in sorted({row["seed"] for row in own}):
                line = [row[key] for row in own if row["seed"] == seed]
                axes.plot(steps, line, color=f"C{color}", lw=0.7, alpha=0.6)
            mean = [statistics.mean(r[key] for r in own if r["step"] == step) for step in steps]
            axes.plot(steps, mean, color=f"C{color}", lw=2, label=method)
        axes.set(xlabel="steps", ylabel=f"{key.replace('_', '-')} NLL, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
