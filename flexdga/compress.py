"""From a `Plan` and a layer's query, key and value to the slots that the kernel attends to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexdga.config import GroupWeights
from flexdga.indexing import take_rows
from flexdga.plan import Plan

Take = Callable[[Tensor, Tensor], Tensor]


class Slots(NamedTuple):
    """What queries attend to: (B, Hkv, S, D) keys and values, (B, Hkv, S) float32 bias or None."""

    key: Tensor
    value: Tensor
    bias: Tensor | None


def compress(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    weights: GroupWeights,
    mass: bool,
    scale: float,
) -> Slots:
    """Raw tokens, copies of the focal ones, and one weighted mean per group.

    A group's key and value are k_g = Σ p_i k_i and v_g = Σ p_i v_i over its members (paper,
    group coding).

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, D).
        plan: for this shape.
        weights: how members weigh in their group.
        mass: whether groups get the entropy of their weights as bias.
        scale: of the scores.
    """
    if not plan.num_stand_ins:
        return Slots(key, value, None)
    pooled = pool(
        query, key, value, plan.focal, plan.members, plan.member_score,
        weights=weights, mass=mass, scale=scale,
    )  # fmt: skip
    bias = None
    if pooled.entropy is not None:
        exact = plan.num_slots - pooled.entropy.shape[-1]
        none = torch.zeros_like(plan.start[..., :exact], dtype=pooled.entropy.dtype)
        bias = torch.cat([none, pooled.entropy], -1)
    return Slots(
        torch.cat([key, pooled.focal_key, pooled.group_key], 2),
        torch.cat([value, pooled.focal_value, pooled.group_value], 2),
        bias,
    )


class Pooled(NamedTuple):
    """Focal copies (B, Hkv, F, D), groups (B, Hkv, G, D), and the groups' bias or None."""

    focal_key: Tensor
    focal_value: Tensor
    group_key: Tensor
    group_value: Tensor
    entropy: Tensor | None


def pool(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    focal: Tensor,
    members: Tensor,
    member_score: Tensor | None,
    *,
    weights: GroupWeights,
    mass: bool,
    scale: float,
    take: Take = take_rows,
) -> Pooled:
    """Copies of the focal tokens, and one key and value for each group.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, D).
        focal: (B, Hkv, F) tokens, -1 for none.
        members: (B, Hkv, G, m) tokens, -1 for none.
        member_score: (B, Hkv, G, m) their importance, if the weights need it.
        weights: how members weigh in their group.
        mass: whether groups get the entropy of their weights as bias.
        scale: of the scores.
        take: reads rows of query, key and value; whoever differentiates by hand gives its own.
    """
    if members.shape[2] == 0:
        none = take(key, focal[..., :0]), take(value, focal[..., :0])
        entropy = torch.zeros_like(focal[..., :0], dtype=torch.float32) if mass else None
        return Pooled(take(key, focal), take(value, focal), *none, entropy)
    weight = group_weights(
        query, key, members, member_score, weights=weights, scale=scale, take=take
    )
    share = weight.to(key)[..., None, :]
    # With weights p, log Σ exp(s_i) >= Σ p_i s_i + H(p): the group's score plus the entropy.
    return Pooled(
        take(key, focal),
        take(value, focal),
        (share @ take(key, members)).squeeze(-2),
        (share @ take(value, members)).squeeze(-2),
        # Never at 0, where the slope of the entropy is infinite.
        torch.special.entr(weight.clamp(min=1e-30)).sum(-1) if mass else None,
    )


def group_weights(
    query: Tensor,
    key: Tensor,
    members: Tensor,
    member_score: Tensor | None,
    *,
    weights: GroupWeights,
    scale: float,
    take: Take = take_rows,
) -> Tensor:
    """(B, Hkv, G, m) weights of each group's members, 0 for absent ones; float32, or float64.

    `last_query` follows the paper: p = softmax of q_last·k_i·scale over the group, with q_last
    the query of the group's last token. Query heads that share the KV head average their weights
    (flexdga's choice; with one query head per KV head it is the paper's rule).
    """
    here = members >= 0
    if weights == "mean":
        return here.float() / here.sum(-1, keepdim=True).clamp(min=1)
    if weights == "importance":
        assert member_score is not None  # checked where plans come in
        share = torch.where(here, member_score + 1e-12, 0.0)
        return share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    kv_heads = key.shape[1]
    rep = query.shape[1] // kv_heads
    last = members.amax(-1)
    # Rows of all query heads of a KV head at the group's last token: (B, Hkv, rep, G, D).
    q_last = take(query, last.repeat_interleave(rep, 1)).unflatten(1, (kv_heads, rep))
    k_members = take(key, members)
    score = k_members @ q_last.permute(0, 1, 3, 4, 2)  # (B, Hkv, G, m, rep)
    score = score.to(torch.promote_types(score.dtype, torch.float32)) * scale
    score = score.masked_fill(~here[..., None], float("-inf"))
    weight = torch.softmax(score, -2).mean(-1)
    return torch.where(here, weight, 0.0)  # a group without members has no softmax: 0, not NaN
