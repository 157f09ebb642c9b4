"""How much each key matters, estimated from a few probe queries instead of the L×L matrix.

Shape suffixes: B batch, G KV heads, R query heads per KV head, P probes, L tokens, N units,
U tokens of a unit, W tokens of a unit and its lookahead, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.indexing import take_rows

MIN_SEEN = 8
"""A mean over fewer far probes than this is taken as if there were this many (DESIGN: far-mean)."""
SUM_STAGE = 16
"""Tokens summed at a time over a prompt; its length in whole steps is a multiple of it."""
SMOOTHING = 5
"""Neighbouring tokens whose importance is averaged into a token's own."""
PEAK_WIDTH = 7
"""Neighbouring tokens whose highest weight counts for a token, with `peak` (SnapKV's pooling)."""


def prompt_importance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    after: Tensor,
    *,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Importance of every token, from probes over the whole prompt.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, D).
        first: (B, L) first token of each token's document.
        after: (B, L) first token after it; 0 for padding.
        config: `probes`, `probe_placement`, `importance`, `window`.
        is_causal: whether a probe sees only the tokens up to itself.
        scale: of the scores.

    Returns:
        (B, Hkv, L) float32.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    probe_BP, real_BP = probe_positions(after, config)
    index = probe_BP[:, None].expand(-1, heads, -1)
    q_BGXD = take_rows(query, index).view(batch, kv_heads, -1, head_dim)  # X = R·P
    score_BGRPL = (q_BGXD @ key.mT).view(batch, kv_heads, -1, config.probes, length).float() * scale

    pos = torch.arange(length, dtype=torch.int32, device=query.device)
    far_BPL = pos - probe_BP[:, :, None]
    start_BP, stop_BP = first.gather(1, probe_BP.long()), after.gather(1, probe_BP.long())
    seen_BPL = (pos >= start_BP[:, :, None]) & (pos < stop_BP[:, :, None]) & real_BP[:, :, None]
    if is_causal:
        seen_BPL = seen_BPL & (far_BPL <= 0)
    weight_BGRPL = attention_weights(score_BGRPL, seen_BPL[:, None, None], _total)
    weight_BGPL = over_heads(weight_BGRPL, config)
    beyond_BPL = seen_BPL & (far_BPL.abs() >= config.window)
    return _reduce(weight_BGPL, seen_BPL[:, None], beyond_BPL[:, None], value, config)


def unit_importance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    *,
    config: DGAConfig,
    lookahead: int,
    scale: float,
) -> Tensor:
    """Importance of every token within its unit, from probes before the unit's handover.

    The probes look at the band from the unit's first token to themselves, so that the work is
    linear in L and nothing after the handover is read.

    Args:
        query: (B, H, N·U, D), whole units.
        key: (B, Hkv, N·U, D).
        value: (B, Hkv, N·U, D).
        first: (B, N·U) first token of each token's document.
        config: `probes`, `unit_size`, `importance`, `window`.
        lookahead: tokens between a unit's last token and its handover.
        scale: of the scores.

    Returns:
        (B, Hkv, N, U) float32.
    """
    batch, heads, total, head_dim = query.shape
    kv_heads, unit = key.shape[1], config.unit_size
    units, width = total // unit, unit + lookahead
    offset_W = torch.arange(width, dtype=torch.int32, device=query.device)
    count = min(config.probes, width)
    offset_P = (
        torch.arange(count, dtype=torch.int32, device=query.device) + 1
    ) * width // count - 1
    base_N = torch.arange(units, dtype=torch.int32, device=query.device)[:, None] * unit
    # A unit whose lookahead passes the end is never handed over: what it reads there is unused.
    band_NW = (base_N + offset_W).clamp(max=total - 1)
    probe_NP = (base_N + offset_P).clamp(max=total - 1)

    q = take_rows(query, probe_NP.expand(batch, heads, -1, -1))
    q_BGRNPD = q.view(batch, kv_heads, -1, units, count, head_dim)
    k_BGNWD = take_rows(key, band_NW.expand(batch, kv_heads, -1, -1))
    score_BGRNPW = (q_BGRNPD @ k_BGNWD.mT[:, :, None]).float() * scale

    doc_BNW = first[:, band_NW.flatten().long()].view(batch, units, width)
    doc_BNP = first[:, probe_NP.flatten().long()].view(batch, units, count)
    gap_PW = offset_P[:, None] - offset_W
    seen_BNPW = (gap_PW >= 0) & (doc_BNP[..., None] == doc_BNW[:, :, None])
    weight_BGRNPW = attention_weights(score_BGRNPW, seen_BNPW[:, None, None])
    weight_BGNPW = over_heads(weight_BGRNPW, config)
    # No probe is a whole window away from the last tokens of a unit: half a window has to do.
    beyond_BNPW = seen_BNPW & (gap_PW >= config.window // 2)
    v = value.view(batch, kv_heads, units, unit, -1)
    mine = (..., slice(unit))  # of the band, the unit itself
    return _reduce(
        weight_BGNPW[mine], seen_BNPW[:, None][mine], beyond_BNPW[:, None][mine], v, config
    )


def probe_positions(after: Tensor, config: DGAConfig) -> tuple[Tensor, Tensor]:
    """(B, P) positions of the probes among each row's real tokens, and which are not repeats."""
    rank = (after > 0).cumsum(-1, dtype=torch.int32)
    count = rank[:, -1:]
    k = torch.arange(config.probes, dtype=torch.int32, device=after.device)
    if config.probe_placement == "tail":
        nth = count - config.probes + k + 1
    else:
        nth = (k + 1) * count.long() // config.probes  # k·count may pass int32
    nth = nth.clamp(min=0)
    real = torch.diff(nth, dim=-1, prepend=torch.zeros_like(nth[:, :1])) > 0
    # The nth real token of a row: rank is sorted, so its place is a binary search away.
    position = torch.searchsorted(rank, nth.to(torch.int32).clamp(min=1)).to(torch.int32)
    return position.clamp(max=after.shape[-1] - 1), real


def attention_weights(
    score: Tensor,
    seen: Tensor,
    total: Callable[[Tensor], Tensor] = lambda x: x.sum(-1),
    highest: Callable[[Tensor], Tensor] = lambda x: x.amax(-1),
) -> Tensor:
    """Softmax over what is seen; `total` and `highest` may look beyond these keys."""
    top = highest(score.masked_fill(~seen, float("-inf")))[..., None]
    weight = torch.where(seen, torch.exp(score - top), 0.0)
    return weight / total(weight)[..., None].clamp(min=1e-30)


def _total(x: Tensor) -> Tensor:
    """Sum over the tokens, in two stages: Inductor compiles anew for sums of more than 4096."""
    return x.unflatten(-1, (-1, SUM_STAGE)).sum(-1).sum(-1)


def over_heads(weight: Tensor, config: DGAConfig) -> Tensor:
    """(B, G, R, ...) to (B, G, ...): the query heads of a KV head choose together."""
    return weight.amax(2) if config.importance == "peak" else weight.mean(2)


def _reduce(
    weight: Tensor, seen: Tensor, beyond: Tensor, value: Tensor, config: DGAConfig
) -> Tensor:
    """(..., P, K) weights of probes on keys to (..., K) importance, by `config.importance`."""
    norm = value.float().norm(dim=-1) if config.importance == "far_mean" else None
    return over_neighbours(over_probes(weight, seen, beyond, config), norm, config)


def over_probes(weight: Tensor, seen: Tensor, beyond: Tensor, config: DGAConfig) -> Tensor:
    """(..., P, K) weights of probes on keys to (..., K), each key's own."""
    if config.importance == "sum":
        return torch.where(seen, weight, 0.0).sum(-2)
    if config.importance == "peak":
        return torch.where(seen, weight, 0.0).amax(-2)
    count = beyond.sum(-2).clamp(min=min(MIN_SEEN, config.probes))
    return torch.where(beyond, weight, 0.0).sum(-2) / count


def over_neighbours(own: Tensor, norm: Tensor | None, config: DGAConfig) -> Tensor:
    """(..., K) from `over_probes` to importance; `norm` (..., K) of values is for `far_mean`."""
    rows = own.reshape(-1, 1, own.shape[-1])
    if config.importance == "peak":
        return F.max_pool1d(rows, PEAK_WIDTH, 1, PEAK_WIDTH // 2).view_as(own)
    if norm is None:
        return own
    pool = F.avg_pool1d(rows, SMOOTHING, 1, SMOOTHING // 2, count_include_pad=False)
    return norm * (own + pool.view_as(own))
