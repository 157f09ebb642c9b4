"""The `BlockMask` of a `Plan`, from the intervals of whole key blocks: nothing Q×KV is formed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdga.indexing import compact, heads_per_kv_head
from flexdga.plan import NEVER, Plan


def visible_blocks(plan: Plan, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which key blocks the query blocks touch, and which of them they see whole.

    Args:
        plan: the intervals.
        block_size: (query, key) tile.

    Returns:
        Two (B, Hkv, query blocks, key blocks) bool: touched in part, seen whole. Exclusive.
    """
    query_block, key_block = block_size
    pad = (0, -plan.num_slots % key_block)
    start = F.pad(plan.start, pad, value=NEVER).unflatten(-1, (-1, key_block))
    end = F.pad(plan.end, pad).unflatten(-1, (-1, key_block))
    earliest, latest_start = (t[..., None, :] for t in (start.amin(-1), start.amax(-1)))
    earliest_end, latest_end = (t[..., None, :] for t in (end.amin(-1), end.amax(-1)))
    rows = plan.length // query_block
    q0 = torch.arange(rows, dtype=torch.int32, device=start.device)[:, None] * query_block
    q1 = q0 + query_block - 1
    touched = (q1 >= earliest) & (q0 < latest_end)
    whole = (q0 >= latest_start) & (q1 < earliest_end)
    return touched & ~whole, whole


def block_mask(
    plan: Plan, query_heads: int, block_size: tuple[int, int], *, backward: bool = False
) -> BlockMask:
    """The mask of `plan` for `query_heads` heads, for flex_attention over the slots.

    `backward` adds the transposed tables that a gradient needs.
    """
    start, end = plan.start, plan.end
    rep = heads_per_kv_head(query_heads, start.shape[1])

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        g = h // rep
        return (start[b, g, s] <= q) & (q < end[b, g, s])

    part, whole = (_as_table(t.repeat_interleave(rep, 1)) for t in visible_blocks(plan, block_size))
    return BlockMask.from_kv_blocks(
        kv_num_blocks=part[0],
        kv_indices=part[1],
        full_kv_num_blocks=whole[0],
        full_kv_indices=whole[1],
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(plan.length, plan.num_slots),
        compute_q_blocks=backward,
    )


def _as_table(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(..., Q, KV) bool to how many each row has, and which come first: int32 both."""
    order = compact(blocks, blocks.shape[-1]).clamp(min=0)
    return blocks.sum(-1, dtype=torch.int32), order.contiguous()
