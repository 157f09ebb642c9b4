"""Claim 1, Theorem 1: attention weights are ρ-sparse, the more surely the longer the context."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .paper_claim import Claim, Finding, Row
from .report import number
from .workloads import QKV

RHO = 0.02
NEAR_ONE = 0.95
AT = 400
"""Where the paper says that the probability is close to 1."""
MASS = 0.9
QUERIES = 16
"""The last ones of each context."""
SAYS = (
    "few tokens carry the prediction, and sparsity grows with the context length L: with ρ = 0.02 "
    "the probability that attention weights are ρ-sparse is close to 1 at L = 400 (Theorem 1, for "
    "independent scores)."
)
HOW = (
    "weights of the last 16 queries of contexts of L tokens, every head and layer. ρ-sparse: some "
    "token gets at least 1/(ρL), so 1/ρ = 50 times the mean; it is impossible up to L = 50. "
    "no sink: without the first token, the others' weights made to sum to 1. independent: normal "
    "scores as spread out as the model's, drawn independently (the theorem's setting). That bar "
    "falls as 1/L by definition, so also: how many tokens hold 90 % of the weight, and their "
    "share of the context."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Context lengths, and how many texts."""

    lengths: tuple[int, ...]
    texts: int


FULL = Settings((50, 100, 200, 400, 800, 1600, 3200), 2)
QUICK = Settings((50, 100, 200, 400, 800), 1)


def measure(
    captured: Mapping[str, Sequence[QKV]], lengths: Sequence[int], seed: int,
    announce: Callable[[str], None],
) -> Claim:  # fmt: skip
    """Weights of every layer at every length.

    Args:
        captured: by text, the inputs of each layer's attention, as long as the longest length.
        lengths: ascending.
        seed: of the independent scores.
        announce: told what is being done.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for name, layers in captured.items():
        for length in lengths:
            announce(f"{name}, L = {length}")
            parts = [of_layer(x, length, generator) for x in layers]
            mean = {key: statistics.mean(part[key] for part in parts) for key in parts[0]}
            rows.append({"text": name, "length": length, **mean})
    means = [_mean([row for row in rows if row["length"] == length]) for length in lengths]
    return Claim(
        "1", "Sparsity of attention weights", SAYS, HOW, _findings(means),
        {"Mean of the texts": [_line(row) for row in means]}, {"sparsity": rows},
    )  # fmt: skip


def of_layer(x: QKV, length: int, generator: torch.Generator) -> dict[str, float]:
    """How sparse the weights of the last queries of `length` tokens are; means over heads."""
    last = min(QUERIES, length)
    rep = x.query.shape[1] // x.key.shape[1]
    query = x.query[0, :, length - last : length].float()
    key = x.key[0, :, :length].float().repeat_interleave(rep, 0)
    score = query @ key.mT * x.factor
    context = torch.arange(length - last, length) + 1
    seen = torch.arange(length) < context[:, None]
    spread = _spread(score, seen)
    draws = torch.randn(score.shape, generator=generator) * spread[..., None]
    weight, independent = (s.masked_fill(~seen, -torch.inf).softmax(-1) for s in (score, draws))
    rest = weight[..., 1:] / weight[..., 1:].sum(-1, keepdim=True).clamp(min=1e-30)
    holders = tokens_that_hold(weight, MASS)
    return {
        "sparse": is_sparse(weight, context).float().mean().item(),
        "no_sink": is_sparse(rest, context - 1).float().mean().item(),
        "independent": is_sparse(independent, context).float().mean().item(),
        "holders": holders.float().mean().item(),
        "share": (holders / context).mean().item(),
        "holders_independent": tokens_that_hold(independent, MASS).float().mean().item(),
        "spread": spread.mean().item(),
    }


def is_sparse(weight: Tensor, context: Tensor) -> Tensor:
    """Whether some weight of (..., Q, L) reaches 1/(ρ·context): (..., Q) bool."""
    return weight.amax(-1) >= 1 / (RHO * context)


def tokens_that_hold(weight: Tensor, mass: float) -> Tensor:
    """(..., Q): the fewest tokens whose weights sum to `mass`."""
    held = weight.sort(-1, descending=True).values.cumsum(-1)
    return (held < mass).sum(-1) + 1


def _spread(score: Tensor, seen: Tensor) -> Tensor:
    """(..., Q) standard deviation over the tokens that each query sees."""
    count = seen.sum(-1)
    mean = score.masked_fill(~seen, 0.0).sum(-1) / count
    square = (score - mean[..., None]).square().masked_fill(~seen, 0.0).sum(-1) / count
    return square.sqrt()


def _mean(rows: Sequence[Row]) -> dict[str, Any]:
    keys = [key for key in rows[0] if key not in ("text", "length")]
    means = {key: statistics.mean(row[key] for row in rows) for key in keys}
    return {"length": rows[0]["length"]} | means


def _findings(means: Sequence[Row]) -> list[Finding]:
    at = min(means, key=lambda row: abs(row["length"] - AT))
    chances = [row["sparse"] for row in means]
    shares = [row["share"] for row in means]
    holders = [row["holders"] for row in means]
    return [
        Finding(
            f"the probability of ρ-sparsity is close to 1 (at least {NEAR_ONE}) at L = {AT}.",
            f"{at['sparse']:.3f} at {at['length']}; without the first token {at['no_sink']:.3f}; "
            f"independent scores {at['independent']:.3f}.",
            at["sparse"] >= NEAR_ONE,
        ),
        Finding(
            "it grows with L.",
            ", ".join(f"{c:.3f}" for c in chances) + " from the shortest to the longest.",
            _ascending(chances),
        ),
        Finding(
            "few tokens carry the prediction, a smaller share of the context as it grows.",
            f"{MASS:.0%} of the weight is on {holders[0]:.0f} tokens of {means[0]['length']} and "
            f"on {holders[-1]:.0f} of {means[-1]['length']}: {shares[0]:.2f} and "
            f"{shares[-1]:.2f} of the context.",
            shares[-1] < shares[0],
        ),
    ]


def _ascending(values: Sequence[float]) -> bool:
    return all(a <= b for a, b in pairwise(values)) and values[-1] > values[0]


def _line(row: Row) -> dict[str, str]:
    return {
        "L": str(row["length"]),
        "P(sparse)": f"{row['sparse']:.3f}",
        "no sink": f"{row['no_sink']:.3f}",
        "independent": f"{row['independent']:.3f}",
        "tokens of 90 %": number(row["holders"]),
        "share": f"{row['share']:.3f}",
    }


def draw(claim: Claim, figure: Any) -> None:
    """Probability over L, and the share of the tokens that hold 90 %."""
    rows = claim.rows["sparsity"]
    lengths = sorted({row["length"] for row in rows})
    means = [_mean([row for row in rows if row["length"] == length]) for length in lengths]
    left, right = figure.subplots(1, 2)
    for key, label in (
        ("sparse", "the model"),
        ("no_sink", "the model, without the first token"),
        ("independent", "independent scores (Theorem 1)"),
    ):
        left.plot(lengths, [row[key] for row in means], marker="o", label=label)
    left.axvline(AT, color="gray", ls=":")
    left.set(xscale="log", xlabel="tokens of context", ylabel=f"P(ρ-sparse), ρ = {RHO}")
    for text in dict.fromkeys(row["text"] for row in rows):
        own = [row for row in rows if row["text"] == text]
        right.plot([r["length"] for r in own], [r["share"] for r in own], marker="o", label=text)
    right.set(xscale="log", xlabel="tokens of context", ylabel="share that holds 90 % of weight")
    for axes in (left, right):
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
