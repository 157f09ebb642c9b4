"""The specification: plain PyTorch in float64, dense and slow, for tests and for readers.

Nothing here is shared with the optimised code, and the optimised code never imports it. Everything
works on one sequence at a time, (H, L, D) per head, with loops where loops are clearest: on the
CPU, wherever the inputs are, and the result goes back to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flexdga.plan import NEVER, Plan


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Exact attention.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        is_causal: whether a query sees only the tokens up to itself.
        scale: of the scores; None = 1/√D.
        document_ids: (B, L), negative for padding, whose output is 0.

    Returns:
        (B, H, L, Dv) float64.
    """
    length, device = query.shape[2], query.device
    query, key, value, document_ids = _on_cpu((query, key, value, document_ids))
    ids = torch.zeros(query.shape[0], length) if document_ids is None else document_ids
    seen = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] >= 0)
    if is_causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    rep = query.shape[1] // key.shape[1]
    k, v = (t.double().repeat_interleave(rep, 1) for t in (key, value))
    score = query.double() @ k.mT * _scale(query, scale)
    return (_softmax(score.masked_fill(~seen[:, None], -math.inf)) @ v).to(device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    group_weights: str = "last_query",
    group_bias: str = "none",
    scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention over the slots of a plan: what `dga_attention` computes once it has planned.

    Args:
        query: (B, H, L, D), L no longer than the plan's length.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        plan: says which slots there are, and who sees them.
        group_weights: as in `DGAConfig`.
        group_bias: as in `DGAConfig`.
        scale: of the scores; None = 1/√D.
        score_mod: of positions; it alone is called where the inputs are.

    Returns:
        (B, H, L, Dv) float64.
    """
    (batch, heads, length, _), device = query.shape, query.device
    query, key, value, plan = _on_cpu((query, key, value, plan))
    rep, scale = heads // key.shape[1], _scale(query, scale)
    out = torch.zeros(batch, heads, length, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for g in range(key.shape[1]):
            q = query[b, g * rep : (g + 1) * rep].double()
            tokens, weights = slot_weights(plan, b, g, q, key[b, g].double(), group_weights, scale)
            if not tokens:
                continue
            k = torch.stack([w @ key[b, g, t].double() for t, w in zip(tokens, weights)])
            v = torch.stack([w @ value[b, g, t].double() for t, w in zip(tokens, weights)])
            bias = torch.zeros(len(tokens), dtype=torch.float64)
            if group_bias == "mass":
                bias = torch.stack([torch.special.entr(w).sum() for w in weights])
            at = torch.arange(length)[:, None]
            slot = torch.tensor([s for s in range(plan.num_slots) if _members(plan, b, g, s)])
            for r in range(rep):
                seen = visible(plan, b, g * rep + r, length, rep)[:, slot]
                score = q[r] @ k.T * scale
                if score_mod is not None:
                    place = (torch.tensor(b), torch.tensor(g * rep + r))
                    given = (score, *place, at, plan.position[b, g, slot])
                    score = score_mod(*(x.to(device) for x in given)).cpu()
                score = (score + bias).masked_fill(~seen, -math.inf)
                out[b, g * rep + r] = _softmax(score) @ v
    return out.to(device)


def slot_weights(
    plan: Plan, b: int, g: int, q: Tensor, k: Tensor, group_weights: str, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens of every slot that stands for any, and their weights in it.

    Args:
        plan: the plan.
        b: which sequence.
        g: which KV head.
        q: (rep, L, D) the query heads of the KV head.
        k: (L, D).
        group_weights: as in `DGAConfig`.
        scale: of the scores.
    """
    first_group = plan.num_slots - plan.members.shape[2]
    tokens, weights = [], []
    for s in range(plan.num_slots):
        members = torch.tensor(_members(plan, b, g, s))
        if not len(members):
            continue
        weight = torch.ones(len(members), dtype=torch.float64) / len(members)
        if s >= first_group and group_weights == "last_query":
            weight = torch.softmax(q[:, members.max()] @ k[members].T * scale, -1).mean(0)
        elif s >= first_group and group_weights == "importance":
            assert plan.member_score is not None
            score = plan.member_score[b, g, s - first_group].double() + 1e-12
            score = score[plan.members[b, g, s - first_group] >= 0]
            weight = score / score.sum()
        tokens.append(members)
        weights.append(weight)
    return tokens, weights


def visible(plan: Plan, b: int, h: int, length: int, rep: int = 1) -> Tensor:
    """(L, S) bool: which slots each query of one head sees, `rep` query heads to a KV head."""
    plan, g, at = _on_cpu(plan), h // rep, torch.arange(length)[:, None]
    seen = (plan.start[b, g] <= at) & (at < plan.end[b, g])
    if plan.open is None:
        return seen
    rows, size = plan.length // plan.open.shape[2], plan.length // plan.open.shape[3]
    members = [_members(plan, b, g, s) for s in range(plan.num_slots)]
    hidden: dict[int, list[int]] = {}  # slots of a unit's tokens that are not raw
    for s in range(plan.length, plan.num_slots):
        if members[s]:
            hidden.setdefault(members[s][0] // size, []).append(s)
    for row, unit in (plan.open[b, h] < NEVER).nonzero().tolist():
        since = int(plan.open[b, h, row, unit])
        queries = slice(min(since, length), min((row + 1) * rows, length))
        seen[queries, unit * size : (unit + 1) * size] = True
        seen[queries, hidden.get(unit, [])] = False
    padding = plan.start[b, g, : plan.length][:length] == NEVER
    return seen & ~padding[:, None]


def coverage(plan: Plan, b: int, h: int, length: int, rep: int = 1) -> Tensor:
    """How many slots visible to each query stand for each token: (L, L) int, query by token."""
    seen = visible(plan, b, h, length, rep)
    count = torch.zeros(length, length, dtype=torch.long)
    for s in range(plan.num_slots):
        members = [s] if s < plan.length else _members(plan, b, h // rep, s)
        for token in members:
            if token < length:
                count[:, token] += seen[:, s]
    return count


def paper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    focal_ratio: float = 0.1,
    group_size: int = 16,
    probes: int = 64,
) -> Tensor:
    """Dynamic Group Attention in the five steps of arXiv 2505.22107, one head: (L, D) each.

    What the paper leaves open is decided as in `DGAConfig.paper`.
    """
    q, k, v = (t.double() for t in _on_cpu((query, key, value)))
    length, scale = q.shape[0], 1 / math.sqrt(q.shape[1])
    # 1. Importance: attention accumulated over a few sampled queries.
    sampled = sorted({(n + 1) * length // probes - 1 for n in range(probes)} - {-1})
    importance = torch.zeros(length, dtype=torch.float64)
    for i in sampled:
        importance[: i + 1] += torch.softmax(q[i] @ k[: i + 1].T * scale, -1)
    # 2. Focal tokens: the top γL.
    count = int(round(focal_ratio * 1e6) * length // 10**6)
    focal = sorted(importance.topk(count).indices.tolist())
    # 3. Groups of m among the others, in order, weighted by their last token's query.
    rest = [j for j in range(length) if j not in set(focal)]
    groups = [rest[n : n + group_size] for n in range(0, len(rest), group_size)]
    groups = [group for group in groups if len(group) == group_size]
    pooled = []
    for group in groups:
        p = torch.softmax(q[group[-1]] @ k[group].T * scale, -1)
        pooled.append((p @ k[group], p @ v[group]))
    out = torch.zeros_like(v)
    for i in range(length):
        seen_groups = [n for n, group in enumerate(groups) if group[-1] <= i]
        grouped = {j for n in seen_groups for j in groups[n]}
        # 4. Complementary tokens: members of unfinished groups at or before the query.
        raw = [j for j in rest if j <= i and j not in grouped]
        exact = [j for j in focal if j <= i] + raw
        # 5. One softmax.
        keys = torch.stack([k[j] for j in exact] + [pooled[n][0] for n in seen_groups])
        values = torch.stack([v[j] for j in exact] + [pooled[n][1] for n in seen_groups])
        out[i] = torch.softmax(q[i] @ keys.T * scale, -1) @ values
    return out.to(query.device)


def cca(
    query: Tensor, key: Tensor, value: Tensor, *, group_size: int = 16, window: int = 1024
) -> Tensor:
    """Core Context Aware attention (arXiv 2412.12465), its two modules, one head: (L, D) each."""
    q, k, v = (t.double() for t in _on_cpu((query, key, value)))
    length, scale = q.shape[0], 1 / math.sqrt(q.shape[1])
    # Globality-aware pooling: one core token per group of g, weighted by its last token's query.
    cores = []
    for c in range(length // group_size):
        span = slice(c * group_size, (c + 1) * group_size)
        p = torch.softmax(q[span][-1] @ k[span].T * scale, -1)
        cores.append((p @ k[span], p @ v[span]))
    out = torch.zeros_like(v)
    for i in range(1, length + 1):  # the paper counts tokens from 1
        # Locality-preserving window: the rest, raw, so that nothing is seen twice or missed.
        seen = max(0, (i - window) // group_size)
        raw = range(seen * group_size, i)
        keys = torch.stack([cores[c][0] for c in range(seen)] + [k[j] for j in raw])
        values = torch.stack([cores[c][1] for c in range(seen)] + [v[j] for j in raw])
        out[i - 1] = torch.softmax(q[i - 1] @ keys.T * scale, -1) @ values
    return out.to(query.device)


def _members(plan: Plan, b: int, g: int, slot: int) -> list[int]:
    """The tokens that a slot stands for; none if no query sees it."""
    raw, focal = plan.length, plan.focal.shape[-1]
    if plan.start[b, g, slot] >= plan.end[b, g, slot]:
        return []
    if slot < raw:
        return [slot]
    if slot < raw + focal:
        return [int(plan.focal[b, g, slot - raw])]
    return [int(t) for t in plan.members[b, g, slot - raw - focal] if t >= 0]


def _on_cpu(inputs: Any) -> Any:
    """Tensors, or what holds some, on the CPU."""
    return tree_map_only(Tensor, Tensor.cpu, inputs)


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _softmax(score: Tensor) -> Tensor:
    """Softmax; a query that sees nothing gets zeros."""
    return torch.softmax(score, -1).nan_to_num(0.0)
