"""Exact attention where no plan is: few queries over a cache, or a mask that DGA cannot express."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from score_mods import ScoreMod, is_elementwise, needs_null_slot


def attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
) -> Tensor:
    """Attention of every query to every key, plus a bias. It forms H·Q·S scores.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        bias: (B, H or Hkv or 1, Q or 1, S) in the dtype of the query, added to the scores; -inf
            hides a key. Every query must see one key at least.
        scale: of the scores.
        score_mod: of positions.
        query_position: (Q,) for the score mod.
        key_position: (B, Hkv, S) for the score mod.

    Returns:
        (B, H, Q, Dv).
    """
    batch, heads, count, _ = query.shape
    kv_heads = key.shape[1]
    rep = heads // kv_heads
    if score_mod is None:
        # The query heads of a KV head become rows of one head: its keys are read once.
        rows = query.reshape(batch, kv_heads, rep * count, -1)
        if rep > 1 and bias.shape[1] == heads:
            bias = bias.expand(-1, -1, count, -1).reshape(batch, kv_heads, rep * count, -1)
        elif rep > 1 and bias.shape[2] > 1:
            bias = bias.unsqueeze(2).expand(-1, -1, rep, -1, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
        return out.view(batch, heads, count, -1)
    assert query_position is not None and key_position is not None
    if needs_null_slot(score_mod):
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        bias, key_position = F.pad(bias, (0, 1)), F.pad(key_position, (0, 1), value=-1)
    k, v, place = (t.repeat_interleave(rep, 1) for t in (key, value, key_position))
    score = (query @ k.mT).float() * scale
    score = _modify(score, score_mod, query_position, place)
    score = score + (bias if bias.shape[1] in (1, heads) else bias.repeat_interleave(rep, 1))
    return torch.softmax(score, -1).to(v) @ v


def _modify(score: Tensor, score_mod: ScoreMod, query_position: Tensor, place: Tensor) -> Tensor:
    """The score mod over (B, H, Q, S) scores: it is written for one score, as FlexAttention's."""
    b, h, s = (torch.arange(score.shape[i], device=score.device) for i in (0, 1, 3))
    if is_elementwise(score_mod):
        at = (b[:, None, None, None], h[:, None, None], query_position[:, None])
        return score_mod(score, *at, place[:, :, None])

    def one(x: Tensor, b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return score_mod(x, b, h, q, place[b, h, s])

    every: Callable[..., Tensor] = one
    for dims in (
        (0, None, None, None, 0), (0, None, None, 0, None),
        (0, None, 0, None, None), (0, 0, None, None, None),
    ):  # fmt: skip
        every = torch.vmap(every, in_dims=dims)
    with TransformGetItemToIndex():
        return every(score, b, h, query_position, s)
