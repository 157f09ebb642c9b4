"""From a `Plan` and a layer's query, key and value to the slots that the kernel attends to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexdga.config import GroupWeights
from flexdga.indexing import take_rows
from flexdga.plan import Plan


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
    weight = group_weights(query, key, plan, weights=weights, scale=scale)
    pool = weight.to(key)[..., None, :]
    group_key = (pool @ take_rows(key, plan.members)).squeeze(-2)
    group_value = (pool @ take_rows(value, plan.members)).squeeze(-2)
    bias = None
    if mass:
        # With weights p, log Σ exp(s_i) >= Σ p_i s_i + H(p): the group's score plus the entropy.
        entropy = torch.special.entr(weight).sum(-1)
        bias = torch.cat(
            [
                torch.zeros_like(plan.start[..., : plan.num_slots - entropy.shape[-1]]).float(),
                entropy,
            ],
            -1,
        )
    return Slots(
        torch.cat([key, take_rows(key, plan.focal), group_key], 2),
        torch.cat([value, take_rows(value, plan.focal), group_value], 2),
        bias,
    )


def group_weights(
    query: Tensor, key: Tensor, plan: Plan, *, weights: GroupWeights, scale: float
) -> Tensor:
    """(B, Hkv, G, m) float32 weights of each group's members; 0 for absent ones.

    `last_query` follows the paper: p = softmax of q_last·k_i·scale over the group, with q_last
    the query of the group's last token. Query heads that share the KV head average their weights
    (flexdga's choice; with one query head per KV head it is the paper's rule).
    """
    members = plan.members
    here = members >= 0
    if weights == "mean":
        return here.float() / here.sum(-1, keepdim=True).clamp(min=1)
    if weights == "importance":
        assert plan.member_score is not None  # checked where plans come in
        share = torch.where(here, plan.member_score + 1e-12, 0.0)
        return share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    kv_heads = key.shape[1]
    rep = query.shape[1] // kv_heads
    last = members.amax(-1)
    # Rows of all query heads of a KV head at the group's last token: (B, Hkv, rep, G, D).
    q_last = take_rows(query, last.repeat_interleave(rep, 1)).unflatten(1, (kv_heads, rep))
    k_members = take_rows(key, members)
    score = (k_members @ q_last.permute(0, 1, 3, 4, 2)).float() * scale  # (B, Hkv, G, m, rep)
    score = score.masked_fill(~here[..., None], float("-inf"))
    weight = torch.softmax(score, -2).mean(-1)
    return torch.where(here, weight, 0.0)  # a group without members has no softmax: 0, not NaN
