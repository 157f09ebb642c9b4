"""Claim 3a, Theorem 3: grouping lowers the condition number of the Hessian."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .paper_claim import Claim, Finding, Row
from .workloads import QKV

SAYS = (
    "written as a linear coding problem, min over w of |Σ w_j v_j - y|², attention is easier to "
    "optimise with groups: their condition number of the Hessian is lower (Theorem 3)."
)
HOW = (
    "the Hessian of that problem is V·Vᵀ, V the values of L consecutive tokens of a KV head. "
    "shared: the m tokens of a group share one weight (the theorem). DGA: they have the softmax "
    "weights of the group's last query, as its groups do, and a step on the group's. Median κ "
    "over heads, layers and windows; better: in how many of them κ is no greater than ungrouped. "
    "Beyond L = head_dim ungrouped V·Vᵀ is singular: κ is infinite (inf). float64."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Group sizes, and how many windows of each head."""

    groups: tuple[int, ...]
    windows: int


FULL = Settings((2, 4, 8, 16), 16)
QUICK = Settings((2, 16), 2)
LONG = 16
"""How many windows are joined to one whose values outnumber the head's dimensions."""


def condition(rows: Tensor) -> Tensor:
    """(...) κ of the Gram matrix of (..., K, D) rows: infinite where they are dependent."""
    if rows.shape[-2] > rows.shape[-1]:
        return torch.full(rows.shape[:-2], torch.inf, dtype=torch.float64)
    singular = torch.linalg.svdvals(rows)
    smallest = singular[..., -1]
    dependent = smallest <= singular[..., 0] * max(rows.shape[-2:]) * torch.finfo(rows.dtype).eps
    return torch.where(dependent, torch.inf, (singular[..., 0] / smallest).square())


def coded(x: QKV, length: int, m: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose Gram matrices are the Hessians for the tokens from `start` on.

    Returns:
        (Hkv, L, D) values, (Hkv, L/m, D) of groups that share one weight (columns of unit norm,
        so that the grouped problem is the same one restricted), and of DGA's groups; float64.
    """
    here = slice(start, start + length)
    value = x.value[0, :, here].double()
    members = value.unflatten(1, (-1, m))
    shared = members.sum(2) / m**0.5
    key = x.key[0, :, here].double().unflatten(1, (-1, m))
    rep = x.query.shape[1] // x.key.shape[1]
    last = x.query[0, :, here].double()[:, m - 1 :: m].unflatten(0, (-1, rep))
    score = torch.einsum("hrgd,hgmd->hrgm", last, key) * x.factor
    share = score.softmax(-1).mean(1)
    return value, shared, (share[..., None] * members).sum(2)


def measure(
    captured: Mapping[str, Sequence[QKV]], chosen: Settings, announce: Callable[[str], None]
) -> Claim:
    """Condition numbers of every layer.

    Args:
        captured: by text, the inputs of each layer's attention.
        chosen: how much.
        announce: told what is being done.
    """
    some = next(iter(captured.values()))[0]
    size, total = some.value.shape[-1], min(x[0].length for x in captured.values())
    rows = []
    for length, groups in ((size, chosen.groups), (size * LONG, (LONG,))):
        starts = torch.linspace(0, total - length, chosen.windows).long().unique().tolist()
        for m in groups:
            if total < length:
                continue
            announce(f"condition number, L = {length}, m = {m}")
            found = [
                torch.stack([condition(part) for part in coded(x, length, m, start)])
                for layers in captured.values()
                for x in layers
                for start in starts
            ]
            rows.append({"length": length, "m": m} | _summary(torch.cat(found, 1)))
    return Claim(
        "3a", "Condition number of the Hessian", SAYS, HOW, _findings(rows),
        {"κ": [_line(row) for row in rows]}, {"condition": rows},
    )  # fmt: skip


def _summary(kappa: Tensor) -> Row:
    """Of (3, N): ungrouped, shared, DGA."""
    median = kappa.median(1).values.tolist()
    better = (kappa[1:] <= kappa[0] * (1 + 1e-9)).double().mean(1).tolist()
    lower = kappa.shape[1]
    return {
        "heads": lower, "ungrouped": median[0], "shared": median[1], "dga": median[2],
        "shared_better": better[0], "dga_better": better[1],
    }  # fmt: skip


def _findings(rows: Sequence[Row]) -> list[Finding]:
    def spell(key: str) -> str:
        return ", ".join(f"{row[key]:.0%} (L={row['length']}, m={row['m']})" for row in rows)

    return [
        Finding(
            "κ of a group that shares one weight is never above the ungrouped.",
            f"so in {spell('shared_better')}. It could not be otherwise: these Hessians are "
            "compressions of the ungrouped one, and eigenvalues interlace.",
            all(row["shared_better"] == 1 for row in rows),
        ),
        Finding(
            "nor with the weights that DGA really gives to a group's members.",
            f"so in {spell('dga_better')}.",
            all(row["dga_better"] == 1 for row in rows),
        ),
    ]


def _line(row: Row) -> dict[str, str]:
    return {
        "L": str(row["length"]),
        "m": str(row["m"]),
        "ungrouped": f"{row['ungrouped']:.3g}",
        "shared": f"{row['shared']:.3g}",
        "better": f"{row['shared_better']:.0%}",
        "DGA": f"{row['dga']:.3g}",
        "better ": f"{row['dga_better']:.0%}",
        "cases": str(row["heads"]),
    }


def draw(claim: Claim, figure: Any) -> None:
    """Median κ over m, at the length at which the ungrouped one is finite."""
    rows = claim.rows["condition"]
    rows = [row for row in rows if row["length"] == rows[0]["length"]]
    axes = figure.subplots()
    sizes = [row["m"] for row in rows]
    axes.plot([1, *sizes], [rows[0]["ungrouped"], *(r["shared"] for r in rows)], marker="o",
        label="one weight for a group (Theorem 3)")  # fmt: skip
    axes.plot([1, *sizes], [rows[0]["ungrouped"], *(r["dga"] for r in rows)], marker="o",
        label="DGA's groups")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="m", ylabel=f"κ, {rows[0]['length']} tokens")
    axes.set_xticks([1, *sizes], [str(m) for m in (1, *sizes)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
