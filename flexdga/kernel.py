"""From a plan to the output: compress, block mask, and one call of flex_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexdga import cpu_kernel
from flexdga.block_mask import Tables, block_mask
from flexdga.compress import Slots, compress
from flexdga.config import GroupWeights
from flexdga.indexing import heads_per_kv_head
from flexdga.plan import Plan, with_null_slot
from score_mods import ScoreMod, needs_null_slot

TRITON_TILE = 128
"""The largest tile of flex_attention's own choices for its backward on CUDA (torch 2.13)."""


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
    tables: Tables | None = None,
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
        tables: or else its tables, for a score mod without a null slot.

    Returns:
        (B, H, L, Dv).
    """
    if needs_null_slot(score_mod):
        plan = with_null_slot(plan)
    slots = compress(query, key, value, plan, weights=weights, mass=mass, scale=scale)
    return attend_slots(
        query, slots, plan, block_size=block_size, scale=scale, score_mod=score_mod,
        kernel_options=kernel_options, mask=mask, tables=tables,
    )  # fmt: skip


def attend_slots(
    query: Tensor,
    slots: Slots,
    plan: Plan,
    *,
    block_size: tuple[int, int],
    scale: float,
    score_mod: ScoreMod | None,
    kernel_options: dict[str, Any] | None,
    mask: BlockMask | None = None,
    tables: Tables | None = None,
) -> Tensor:
    """`attend` to slots that are made already.

    Args:
        query: (B, H, Q, D), Q in whole steps of the plan: of its first Q raw tokens.
        slots: of the plan.
        plan: which queries see them.
        block_size: (query, key) tile of the kernel.
        scale: of the scores.
        score_mod: the user's, of positions as the plan has them.
        kernel_options: for flex_attention.
        mask: `block_mask` of this plan, where it is made already.
        tables: or else its tables.

    Returns:
        (B, H, Q, Dv). CPUs without fast products of half precision compute it in float32.
    """
    slot_score_mod = _slot_score_mod(score_mod, plan, slots, query.shape[1])
    on_cpu = query.device.type == "cpu"
    wanted = (query, slots.key, slots.value)
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in wanted)
    table_size = None
    if backward and not on_cpu and mask is None:
        table_size = _backward_blocks(block_size, query.dtype)
    options: Any = dict(kernel_options or {})
    if on_cpu:
        options |= cpu_kernel.mark(plain=slot_score_mod is None and scale > 0)
    else:
        options = _merged(_triton_options(table_size or block_size, query), options)
    if mask is None:
        mask = block_mask(
            plan,
            query.shape[1],
            block_size,
            backward=backward,
            table_size=table_size,
            queries=query.shape[2],
            tables=tables,
        )
    inputs = (query, slots.key, slots.value)
    if on_cpu and not cpu_kernel.multiplies(query.dtype):
        inputs = (query.float(), slots.key.float(), slots.value.float())
    out = flex_attention(
        *inputs,
        score_mod=slot_score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != slots.key.shape[1],
        kernel_options=options,
    )
    return out.to(query.dtype)


def _triton_options(block_size: tuple[int, int], query: Tensor) -> dict[str, Any]:
    """Tiles, warps and stages for flex_attention on CUDA, that divide the mask's blocks.

    Its own choices (torch 2.13) are made for masks of a comparison or two. Ours gather from tables
    for every score: with them a kernel of 128 × 128 blocks spilled 20 KB a thread, and asked for
    more shared memory than an H100 has. These fit, and spill little (bench/RESULTS.md).
    """
    rows, columns = block_size
    width = query.shape[-1] * query.element_size() // 2  # head_dim in half precision
    m, n = (128, 64) if width <= 64 else (64, 64) if width <= 128 else (64, 32)
    m, n = min(m, rows), min(n, columns)
    inner = 64 if width <= 64 else 32  # the loop's tile in the backward kernel, of 64 at most
    m2, n1 = min(64, rows), min(64, columns)
    return {
        # One kernel for all lengths: the one for less than 128 queries takes other tiles.
        "BACKEND": "TRITON",
        "fwd_BLOCK_M": m, "fwd_BLOCK_N": n,
        "fwd_num_warps": 8 if m >= 64 else 4, "fwd_num_stages": 2 if m >= 64 else 3,
        "bwd_BLOCK_M1": min(inner, rows, n1), "bwd_BLOCK_N1": n1,
        "bwd_BLOCK_M2": m2, "bwd_BLOCK_N2": min(inner, columns, m2),
        "bwd_num_warps": 8, "bwd_num_stages": 2,
    }  # fmt: skip


def _merged(ours: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The caller's kernel options, and ours for what they leave open.

    A name without `fwd_` or `bwd_` speaks for both. FORCE_USE_FLEX_ATTENTION is an old way to
    choose a BACKEND, and may not come with one.
    """
    said = {*given, "BACKEND"} if "FORCE_USE_FLEX_ATTENTION" in given else set(given)
    left = {
        k: v for k, v in ours.items() if k.removeprefix("fwd_").removeprefix("bwd_") not in said
    }
    return left | given


def _backward_blocks(block_size: tuple[int, int], dtype: torch.dtype) -> tuple[int, int] | None:
    """Larger blocks for a mask with gradients, where Triton's backward wants them.

    Its lowering (torch 2.13) drops every choice of tiles that does not divide the mask's blocks
    before it looks at the tiles that we ask for, and is left without any: tiles of up to 128 in
    half precision, of 16 in float32.
    """
    if dtype == torch.float32 or min(block_size) >= TRITON_TILE:
        return None
    return max(block_size[0], TRITON_TILE), max(block_size[1], TRITON_TILE)


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
