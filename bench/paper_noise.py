"""Claim 2, Theorem 2: groups make attention less sensitive to noise, variance 1/m²."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga import DGAConfig, Plan, make_plan
from flexdga.compress import compress, group_weights
from flexdga.indexing import take_rows

from .attended import attended_by
from .fidelity_methods import compare, next_token_logits, tail_log_probs
from .paper_claim import Claim, Finding, Row
from .workloads import QKV

SIGMA = 0.1
"""Of the noise under which weights are compared: small, so that their change is linear in it."""
LAST = 64
"""Queries under which weights are compared: the last ones."""
METHODS: dict[str, DGAConfig | None] = {
    "dense": None,
    "DGA": DGAConfig.paper(),
    "DGA, mass": DGAConfig.paper(group_bias="mass"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "equal": {"group_weights": "mean"},
    "mass": {"group_bias": "mass"},
}
"""Under which weights are compared: changes to the published setting."""
SAYS = (
    "grouping cuts the variance of the weight change under Gaussian noise by 1/m² (Theorem 2), "
    "and the KL of the output under noise is lower with grouped attention."
)
HOW = (
    "Gaussian noise on the scores. Weights: of the tokens in groups that a query sees, a token's "
    "being its group's times its share of it; mean square of their change at σ = 0.1, over that of "
    "the same tokens in dense attention; mass: of the weights, square: of their squares, before "
    "any noise; output: mean square of the change of attention's output. equal: members have "
    "equal shares of their group (group_weights='mean'), as in the theorem. mass: a group keeps "
    "the weight of all its members (group_bias='mass'). KL: of the "
    "model's next token, clean against noisy, each method against itself, noise in all layers."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured."""

    length: int
    groups: tuple[int, ...]
    every: int
    draws: int
    sigmas: tuple[float, ...]


FULL = Settings(1024, (2, 4, 8, 16, 32), 5, 4, (0.1, 0.5, 1.0, 2.0))
QUICK = Settings(512, (4, 16), 10, 4, (0.5, 1.0))


class Seen(NamedTuple):
    """Keys and values (Hkv, S, D), bias (Hkv, S) or None, and who sees them (Hkv, Q, S)."""

    key: Tensor
    value: Tensor
    bias: Tensor | None
    visible: Tensor


def dense_keys(x: QKV, queries: Tensor) -> Seen:
    """All tokens, causally."""
    visible = torch.arange(x.length) <= queries[:, None]
    return Seen(x.key[0], x.value[0], None, visible.expand(x.key.shape[1], -1, -1))


def slots(x: QKV, config: DGAConfig, queries: Tensor) -> tuple[Seen, Plan, QKV]:
    """The slots of a plan, the plan, and the inputs filled up to its length."""
    with torch.compiler.set_stance("force_eager"):  # each configuration would be compiled anew
        plan = make_plan(x.query, x.key, x.value, config=config, scale=x.scale)
    fill = (0, 0, 0, plan.length - x.length)
    query, key, value = (F.pad(t, fill) for t in (x.query, x.key, x.value))
    whole = QKV(query, key, value, x.scale)
    mass = config.group_bias == "mass"
    key, value, bias = compress(
        query, key, value, plan,
        weights=config.group_weights, mass=mass, scale=x.factor,
    )  # fmt: skip
    bias = None if bias is None else bias[0]
    return Seen(key[0], value[0], bias, plan.visible(queries)[0]), plan, whole


def attention_weights(
    x: QKV, seen: Seen, queries: Tensor, sigma: float, generator: torch.Generator | None
) -> Tensor:
    """(H, Q, S) softmax of the scores, with noise of that standard deviation on them."""
    rep = x.query.shape[1] // x.key.shape[1]
    query = x.query[0, :, queries].unflatten(0, (-1, rep))
    score = query @ seen.key.mT[:, None] * x.factor
    if seen.bias is not None:
        score = score + seen.bias[:, None, None]
    if sigma:
        score = score + sigma * torch.randn(score.shape, generator=generator)
    return score.masked_fill(~seen.visible[:, None], -torch.inf).softmax(-1).flatten(0, 1)


def output(weight: Tensor, seen: Seen) -> Tensor:
    """(H, Q, D)."""
    rep = weight.shape[0] // seen.value.shape[0]
    return weight @ seen.value.repeat_interleave(rep, 0)


def attention(x: QKV, config: DGAConfig | None, sigma: float, generator: torch.Generator) -> Tensor:
    """(1, H, L, D) under a configuration (None: dense), with noise on the scores."""
    queries = torch.arange(x.length)
    keys = dense_keys(x, queries) if config is None else slots(x, config, queries)[0]
    return output(attention_weights(x, keys, queries, sigma, generator), keys)[None]


def weight_changes(
    x: QKV, config: DGAConfig, draws: int, generator: torch.Generator
) -> dict[str, float]:
    """Sums over heads, the last queries and their grouped tokens; `draws` of the noise.

    Returns:
        Under `dense` and `grouped` names: `change` and `square` of the tokens' weights, `mass`
        of them, `output`'s change.
    """
    queries = torch.arange(max(x.length - LAST, 0), x.length)
    seen, plan, whole = slots(x, config, queries)
    members = plan.members[0]  # (Hkv, G, m)
    share = group_weights(
        whole.query, whole.key, plan.members, plan.member_score,
        weights=config.group_weights, scale=x.factor,
    )[0]  # fmt: skip
    first = plan.num_slots - members.shape[1]
    rep = x.query.shape[1] // x.key.shape[1]
    here = (members >= 0)[:, None] & seen.visible[:, :, first:, None]  # (Hkv, Q, G, m)
    here = here.repeat_interleave(rep, 0)
    share, index = (t.repeat_interleave(rep, 0) for t in (share, members.clamp(min=0)))
    every = dense_keys(x, queries)

    def of_tokens(weight: Tensor, grouped: bool) -> Tensor:
        """(H, Q, G, m) weights of the tokens in groups."""
        if grouped:
            return (weight[..., first:, None] * share[:, None]) * here
        rows = take_rows(weight.mT[None], index.flatten(1)[None])[0]  # tokens as rows
        return rows.mT.unflatten(-1, index.shape[1:]) * here

    found: dict[str, float] = {}
    for name, keys, grouped in (("dense", every, False), ("grouped", seen, True)):
        clean = attention_weights(x, keys, queries, 0.0, None)
        mine = of_tokens(clean, grouped)
        change = moved = 0.0
        for _ in range(draws):
            noisy = attention_weights(x, keys, queries, SIGMA, generator)
            change += (of_tokens(noisy, grouped) - mine).square().sum().item() / draws
            moved += output(noisy - clean, keys).square().sum().item() / draws
        found |= {
            f"{name}_change": change, f"{name}_square": mine.square().sum().item(),
            f"{name}_mass": mine.sum().item(), f"{name}_output": moved,
        }  # fmt: skip
    return found


def weight_rows(
    layers: Sequence[QKV], chosen: Settings, seed: int, announce: Callable[[str], None]
) -> list[Row]:
    """Ratios, grouped over dense, for each variant and group size; over every so many layers."""
    rows = []
    for variant, changes in VARIANTS.items():
        for m in chosen.groups:
            announce(f"weights, {variant}, m = {m}")
            config = DGAConfig.paper(group_size=m, **changes)
            generator = torch.Generator().manual_seed(seed)
            parts = [
                weight_changes(x, config, chosen.draws, generator) for x in layers[:: chosen.every]
            ]
            total = {key: sum(part[key] for part in parts) for key in parts[0]}
            ratios = {
                name: total[f"grouped_{name}"] / total[f"dense_{name}"]
                for name in ("change", "square", "mass", "output")
            }
            rows.append({"variant": variant, "m": m, "theorem": 1 / m**2, **ratios})
    return rows


def output_rows(
    model: Any, ids: Tensor, sigmas: Sequence[float], seed: int, announce: Callable[[str], None]
) -> list[Row]:
    """KL(clean || noisy) of the next token over the second half of (1, L) ids, by method and σ."""
    half = ids.shape[1] // 2
    rows: list[Row] = []
    for method, config in METHODS.items():
        clean: Tensor | None = None
        for sigma in (0.0, *sigmas):
            announce(f"output, {method}, σ = {sigma}")
            generator = torch.Generator().manual_seed(seed)
            attend = functools.partial(attention, config=config, sigma=sigma, generator=generator)
            with torch.no_grad(), attended_by(model, attend):
                logits = next_token_logits(model, ids)
            if clean is None:
                clean = tail_log_probs(logits, half)
                continue
            kl, top1 = compare(clean, logits[half:])
            rows.append({"method": method, "sigma": sigma, "kl": kl, "top1": top1})
    return rows


def measure(
    model: Any, layers: Sequence[QKV], ids: Tensor, chosen: Settings, seed: int,
    announce: Callable[[str], None],
) -> Claim:  # fmt: skip
    """Both halves of the claim.

    Args:
        model: of transformers.
        layers: inputs of each layer's attention, at least `chosen.length` long.
        ids: (1, L) what the model read.
        chosen: how much.
        seed: of the noise.
        announce: told what is being done.
    """
    with torch.no_grad():
        weights = weight_rows([x.first(chosen.length) for x in layers], chosen, seed, announce)
    outputs = output_rows(model, ids[:, : chosen.length], chosen.sigmas, seed, announce)
    return Claim(
        "2", "Robustness to noise", SAYS, HOW, _findings(weights, outputs),
        {
            "Variance of the weight change, grouped over dense": _weight_lines(weights),
            "Grouped over dense, as published": _other_lines(weights, "published"),
            "Grouped over dense, groups keep their weight": _other_lines(weights, "mass"),
            "KL(clean || noisy) of the model's next token, nats": _output_lines(outputs),
        },
        {"weights": weights, "outputs": outputs},
    )  # fmt: skip


def _findings(weights: Sequence[Row], outputs: Sequence[Row]) -> list[Finding]:
    kl = {(row["method"], row["sigma"]): row["kl"] for row in outputs}
    sigmas = sorted({row["sigma"] for row in outputs})

    def of_weights(variant: str, says: str, more: str = "") -> Finding:
        rows = [row for row in weights if row["variant"] == variant]
        ratios = ", ".join(f"{row['change']:.2g} (m={row['m']})" for row in rows)
        slope = f"as 1/m^{-_slope(rows):.2f}"
        return Finding(
            says, f"{ratios}, {slope}{more}.", all(r["change"] <= r["theorem"] for r in rows)
        )

    def of_output(method: str, says: str) -> Finding:
        ratios = [kl[method, sigma] / kl["dense", sigma] for sigma in sigmas]
        found = ", ".join(f"{r:.3g} (σ={sigma:g})" for r, sigma in zip(ratios, sigmas))
        return Finding(says, f"KL over dense's: {found}.", all(ratio < 1 for ratio in ratios))

    square = ", ".join(f"{r['square']:.2g}" for r in weights if r["variant"] == "published")
    return [
        of_weights(
            "published",
            "the variance of a grouped token's weight change is at most 1/m² of dense attention's.",
            f". The squares of the weights themselves are {square} of dense's: what shrinks is "
            "the weight, since a group weighs about as much as one of its tokens",
        ),
        of_weights("equal", "so it is where members share their group's weight equally."),
        of_weights("mass", "so it is where groups keep the weight of all their members."),
        of_output("DGA", "the KL of the output under noise is lower with DGA than with dense."),
        of_output("DGA, mass", "so it is where groups keep the weight of all their members."),
    ]


def _slope(rows: Sequence[Row]) -> float:
    """Of log(change) over log(m), by least squares."""
    x, y = (torch.tensor([row[key] for row in rows]).double().log() for key in ("m", "change"))
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / x.square().sum()).item()


def _weight_lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    lines = []
    for m in dict.fromkeys(row["m"] for row in rows):
        own = {row["variant"]: row for row in rows if row["m"] == m}
        line = {"m": str(m), "1/m²": f"{own['published']['theorem']:.2g}"}
        line |= {variant: f"{row['change']:.2g}" for variant, row in own.items()}
        lines.append(line)
    return lines


def _other_lines(rows: Sequence[Row], variant: str) -> list[dict[str, str]]:
    return [
        {"m": str(row["m"])}
        | {key: f"{row[key]:.2g}" for key in ("mass", "square", "change", "output")}
        for row in rows
        if row["variant"] == variant
    ]


def _output_lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [
        {"σ": f"{sigma:g}"}
        | {row["method"]: f"{row['kl']:.3g}" for row in rows if row["sigma"] == sigma}
        for sigma in sorted({row["sigma"] for row in rows})
    ]


def draw(claim: Claim, figure: Any) -> None:
    """Variance over m beside 1/m², and KL over σ."""
    left, right = figure.subplots(1, 2)
    weights, outputs = claim.rows["weights"], claim.rows["outputs"]
    for variant in VARIANTS:
        own = [row for row in weights if row["variant"] == variant]
        left.plot([r["m"] for r in own], [r["change"] for r in own], marker="o", label=variant)
    sizes = sorted({row["m"] for row in weights})
    left.plot(sizes, [1 / m**2 for m in sizes], color="black", ls=":", label="1/m² (Theorem 2)")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="m",
        ylabel="variance of weight change, grouped over dense",
    )
    left.set_xticks(sizes, [str(m) for m in sizes])
    left.minorticks_off()
    for method in METHODS:
        own = [row for row in outputs if row["method"] == method]
        right.plot([r["sigma"] for r in own], [r["kl"] for r in own], marker="o", label=method)
    right.set(xscale="log", yscale="log", xlabel="σ", ylabel="KL(clean || noisy), nats")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
