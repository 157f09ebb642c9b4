"""From a plan to the output: compress, block mask, and one call of flex_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexdga import cpu_kernel
from flexdga.block_mask import block_mask
from flexdga.compress import Slots, compress
from flexdga.config import GroupWeights
from flexdga.indexing import heads_per_kv_head
from flexdga.plan import Plan, with_null_slot
from score_mods import ScoreMod, needs_null_slot

TRITON_TILE = 128
"""The largest tile that flex_attention chooses on CUDA by itself (torch 2.13)."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    weights: GroupWeights,
    mass: bool,
    block_size: tuple[int, int],
    scale: float,
    score_mod: ScoreMod | None,
    kernel_options: dict[str, Any] | None,
    mask: BlockMask | None = None,
) -> Tensor:
    """Attention of every query to the slots that the plan lets it see.

    It takes the few choices that it needs, not a config: other planners share its compilation.

    Args:
        query: (B, H, L, D), L in whole steps of the plan.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        plan: for this shape.
        weights: `DGAConfig.group_weights`.
        mass: whether `DGAConfig.group_bias` is `mass`.
        block_size: (query, key) tile of the kernel.
        scale: of the scores.
        score_mod: the user's, of token positions.
        kernel_options: for flex_attention.
        mask: `block_mask` of this plan, where it is made already.

    Returns:
        (B, H, L, Dv).
    """
    if needs_null_slot(score_mod):
        plan = with_null_slot(plan)
    slots = compress(query, key, value, plan, weights=weights, mass=mass, scale=scale)
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    slot_score_mod = _slot_score_mod(score_mod, plan, slots, query.shape[1])
    options: Any = _tiles(block_size) | (kernel_options or {})
    if query.device.type == "cpu":
        options |= cpu_kernel.mark(plain=slot_score_mod is None and scale > 0)
    if mask is None:
        mask = block_mask(plan, query.shape[1], block_size, backward=backward)
    out = flex_attention(
        query,
        slots.key,
        slots.value,
        score_mod=slot_score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
    )
    return out


def _tiles(block_size: tuple[int, int]) -> dict[str, int]:
    """Triton's tiles, forward and backward, where its own (128 at most) would not divide blocks.

    On CPU they are not looked at.
    """
    rows, columns = block_size
    if min(block_size) >= TRITON_TILE:
        return {}
    return {
        "BLOCK_M": min(rows, 128), "BLOCK_N": min(columns, 64),
        "BLOCK_M1": min(rows, 32), "BLOCK_N1": min(columns, 64),
        "BLOCK_M2": min(rows, 64), "BLOCK_N2": min(columns, 32),
    }  # fmt: skip


def _slot_score_mod(
    user: ScoreMod | None, plan: Plan, slots: Slots, query_heads: int
) -> ScoreMod | None:
    """The user's score mod at the slots' positions, then the groups' bias."""
    position, bias = plan.position, slots.bias
    rep = heads_per_kv_head(query_heads, position.shape[1])
    if user is None and bias is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        g = h // rep
        if user is not None:
            score = user(score, b, h, q, position[b, g, s])
        return score if bias is None else score + bias[b, g, s]

    return score_mod
