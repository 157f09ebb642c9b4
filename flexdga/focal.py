"""Which tokens are focal: the most important ones of a prompt, or of each unit, and the sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.handover import handover, takeover
from flexdga.indexing import runs
from flexdga.plan import NEVER, Documents


def focal_of_prompt(score: Tensor, docs: Documents, config: DGAConfig, is_causal: bool) -> Tensor:
    """(B, Hkv, L) bool: the focal tokens of a whole prompt, from their importance."""
    length = score.shape[-1]
    index = torch.arange(length, dtype=torch.int32, device=score.device)
    # A token that no query sees past its handover would waste a focal slot.
    lives = handover(index, config) < docs.after
    if not is_causal:
        lives = lives | ((takeover(index, config) > docs.first) & (docs.after > 0))
    lives, sink = lives[:, None], is_sink(docs, config)[:, None]
    ranked = score.masked_fill(sink, torch.inf).masked_fill(~lives, -1.0)
    quota = _focal_quota(docs, config)
    if docs.packed:
        chosen = _top_of_each_document(ranked, docs.first, quota)
    else:
        most = length // config.step * config.focal_per_step
        chosen = top(ranked, most, quota.amax(-1)[:, None, None])
    return (chosen | sink) & lives


def focal_capacity(steps: int, config: DGAConfig) -> int:
    """Focal slots of a plan over so many steps, with room for the sinks."""
    room = steps * config.focal_per_step
    if config.focal_budget is not None:
        room = torch.sym_min(room, max(config.focal_budget, config.sinks))
    each = config.focal_per_unit if config.scope == "causal" else config.focal_per_step
    return room + max(config.sinks - each, 0)


def focal_counts(docs: Documents, config: DGAConfig) -> Tensor:
    """(B, N) int64: how many tokens of each unit are focal, where only documents decide that.

    So it is in `causal` scope, and where sinks alone are focal.
    """
    sink = units_of(is_sink(docs, config), config)
    if config.scope == "causal":
        lives = in_last_document(docs, config)
        most = (sink & lives).sum(-1).clamp(min=config.focal_per_unit)
        return torch.minimum(most, lives.sum(-1))
    index = torch.arange(docs.first.shape[-1], dtype=torch.int32, device=docs.first.device)
    return (sink & units_of(handover(index, config) < docs.after, config)).sum(-1)


def is_sink(docs: Documents, config: DGAConfig) -> Tensor:
    """(B, L) bool: the first tokens of each document."""
    index = torch.arange(docs.first.shape[-1], dtype=torch.int32, device=docs.first.device)
    return (docs.after > 0) & (index - docs.first < config.sinks)


def _focal_quota(docs: Documents, config: DGAConfig) -> Tensor:
    """(B, L) int64: focal tokens that each token's document earns, rounded down."""
    size = (docs.after - docs.first).clamp(min=0).long()
    if config.focal_budget is not None:
        total = (docs.after > 0).sum(-1, keepdim=True)
        return torch.minimum(size, config.focal_budget * size // total.clamp(min=1))
    top, bottom = config.focal_share
    return size * top // bottom


def top(score: Tensor, most: int, quota: Tensor | None = None) -> Tensor:
    """Mask of the `most` highest entries of the last dimension, or the first `quota` of them."""
    best = score.topk(most, dim=-1).indices
    among = torch.ones_like(best, dtype=torch.bool)
    if quota is not None:
        among = torch.arange(most, device=score.device) < quota
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, among.expand_as(best))


def _top_of_each_document(score: Tensor, first: Tensor, quota: Tensor) -> Tensor:
    """Mask of the highest entries of each document, as many as its (B, L) quota says."""
    first, quota = (t[:, None].expand_as(score) for t in (first, quota))
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, first.gather(-1, order).argsort(dim=-1, stable=True))
    rank = torch.arange(score.shape[-1], device=score.device) - runs(first.gather(-1, order))[0]
    among = rank < quota.gather(-1, order)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, among)


def units_of(x: Tensor, config: DGAConfig) -> Tensor:
    """(..., L) to (..., N, U)."""
    return x.unflatten(-1, (-1, config.unit_size))


def in_last_document(docs: Documents, config: DGAConfig) -> Tensor:
    """(B, N, U) bool: tokens in the document of their unit's last real token.

    The unit's other documents end inside it, so no query is left to see their slots.
    """
    first = units_of(docs.first, config)
    real = first != NEVER
    return real & (first == torch.where(real, first, -NEVER).amax(-1, keepdim=True))
