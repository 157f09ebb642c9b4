"""DGA as an attention implementation of transformers, `attn_implementation="flexdga"`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

import score_mods
from flexdga.attention import dga_attention
from flexdga.cache import DGALayer, layer_of
from flexdga.config import DGAConfig
from flexdga.cost_model import dense_below
from flexdga.exact import attend_all
from flexdga.report import LayerReport, about_slots
from flexdga.saying import warn_once
from score_mods import ScoreMod

NAME = "flexdga"
SAMPLE = 64
"""Queries at which a mask that is not known by name is compared with what documents give."""
SKIPS = {
    causal_mask_function: "allow_is_causal_skip",
    bidirectional_mask_function: "allow_is_bidirectional_skip",
}
"""What says that the caller, who may add to it, wants the whole mask even where it is plain."""
ODD_MASK = (
    "flexdga: a mask that is neither causal, nor within documents, nor padding; the layers that "
    "use it run exact dense attention"
)


class Settings:
    """What `wrap` leaves at an attention module: its configuration and its report."""

    def __init__(self, config: DGAConfig, row: LayerReport) -> None:
        self.config, self.row = config, row
        self.mods: dict[tuple[Any, ...], ScoreMod] = {}
        # Attention over shards (`parallel`), if the model's last forward pass was of one.
        self.sharded: Callable[..., Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied model has sinks of its own, and functions cannot be pickled."""
        return self.__dict__ | {"mods": {}, "sharded": None}


def settings_of(module: nn.Module) -> Settings:
    """The module's settings; defaults where a model was not wrapped, but set to `flexdga`."""
    found = getattr(module, "_flexdga", None)
    if found is None:
        found = Settings(DGAConfig(), LayerReport(type(module).__name__, True, "default config"))
        module._flexdga = found  # type: ignore[assignment]
    assert isinstance(found, Settings)
    return found


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with the arguments and the result of transformers' interface.

    Layers with masks of their own (sliding windows, masks that mix directions) arrive with a
    (B, 1, Q, KV) mask and run exact dense attention, as do layers over somebody else's cache.

    Args:
        module: the attention module.
        query: (B, H, Q, D).
        key: (B, Hkv, KV, D).
        value: (B, Hkv, KV, Dv).
        attention_mask: what `mask` made.
        dropout: expected to be 0: plans and dropout of weights do not go together.
        scaling: of the scores.
        is_causal: overrides the module's own.
        softcap: Gemma 2's.
        s_aux: (H,) GPT-OSS's attention sinks.
        position_bias: not supported; sliding and dense layers alone take it.
        kwargs: what other implementations want.

    Returns:
        (B, Q, H, Dv) and None: weights are never formed.

    Raises:
        NotImplementedError: dropout, a position bias, or a mask that needs keys already pooled.
    """
    own = settings_of(module)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = layer_of(key)
    if own.sharded is not None:
        return _over_shards(
            own, layer, query, key, value, dropout, scaling, softcap, s_aux, position_bias
        )
    if layer is None and attention_mask is None and causal and 1 < query.shape[2] < key.shape[2]:
        # Without a mask, keys beyond the queries are the room of a static cache that was empty.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    foreign = layer is None and key.shape[2] != query.shape[2]
    if foreign or (attention_mask is not None and attention_mask.dim() == 4):
        if layer is not None:
            raise NotImplementedError(
                "attention_mask: a mask over pairs of tokens cannot be applied to a DGACache, "
                "whose old keys are pooled; pass a (B, L) padding mask, or use_cache=False"
            )
        if own.row.wrapped and not foreign and kwargs.get("sliding_window") is None:
            warn_once(ODD_MASK)
        own.row.passed += 1
        return _dense(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=causal, softcap=softcap, s_aux=s_aux,
            position_bias=position_bias, **kwargs,
        )  # fmt: skip
    if dropout:
        raise NotImplementedError(
            f"attention_dropout: DGA has no dropout of attention weights, got {dropout}; set it to "
            f"0 in the model's config, or call model.eval()"
        )
    if position_bias is not None:
        raise NotImplementedError(
            f"position_bias: {type(module).__name__} adds a bias to the scores of pairs of "
            f"tokens, which DGA cannot pool; keep this model's own attention"
        )
    mod = _score_mod(own, softcap, s_aux)
    if layer is not None:
        out = layer.attend(query, scale=scaling, score_mod=mod, document_ids=attention_mask)
    else:
        out = dga_attention(
            query, key, value, config=own.config, is_causal=causal, scale=scaling, score_mod=mod,
            document_ids=attention_mask,
        )  # fmt: skip
    if not torch.compiler.is_compiling():
        _count(own, query, key, layer)
    return out.transpose(1, 2).contiguous(), None


def _over_shards(
    own: Settings,
    layer: DGALayer | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    *others: Any,
) -> tuple[Tensor, None]:
    if dropout or any(other is not None for other in others):
        raise NotImplementedError(
            "mesh: attention over shards has no dropout, soft cap, attention sinks or position "
            "bias; expected a model without them"
        )
    assert own.sharded is not None
    out = own.sharded(query, key, value, scaling, layer)
    own.row.replaced += own.row.wrapped
    own.row.passed += not own.row.wrapped
    return out.transpose(1, 2).contiguous(), None


def sharded_masks(on: bool) -> None:
    """While a forward pass runs over shards, which know their documents, there are no masks."""
    _sharded[0] = on


_sharded = [False]


def _count(own: Settings, query: Tensor, key: Tensor, layer: DGALayer | None) -> None:
    row = own.row
    if not row.wrapped:  # exact by its configuration
        row.passed += 1
        return
    row.replaced += 1
    if layer is None:
        row.tokens, row.dense_below = key.shape[2], dense_below(own.config, query, key)
        row.slots = about_slots(own.config, row.tokens, row.dense_below)
    else:
        row.tokens, row.slots, row.dense_below = layer.counts()


def _score_mod(own: Settings, softcap: float | None, s_aux: Tensor | None) -> ScoreMod | None:
    """The layer's score mod. Made once: a compiled kernel knows it by its identity."""
    if softcap is None and s_aux is None:
        return None
    which = (softcap, id(s_aux))
    if which not in own.mods:
        mods = [] if softcap is None else [score_mods.softcap(softcap)]
        if s_aux is not None:
            mods.append(score_mods.attention_sinks(s_aux))
        own.mods[which] = score_mods.compose(*mods)
    return own.mods[which]


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact attention: transformers' own, or in plain PyTorch where scores are modified."""
    if softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return out, None
    count, total = query.shape[2], key.shape[2]
    place = torch.arange(total, dtype=torch.int32, device=key.device)
    if mask is None:
        mask = torch.ones(1, 1, count, total, dtype=torch.bool, device=key.device)
        mask = mask.tril() if is_causal and count > 1 else mask
    bias = mask.to(query.dtype)
    if mask.dtype == torch.bool:
        mask = mask | ~mask.any(-1, keepdim=True)  # a row of padding may see nothing, not NaN
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    out = attend_all(
        query, key, value, bias, scale=scale,
        score_mod=_score_mod(settings_of(module), softcap, s_aux),
        query_position=place[total - count :], key_position=place.expand(*key.shape[:3]),
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What `attention` needs of a mask, with the arguments of transformers' interface.

    Returns:
        None for plain attention in the direction of the module; (B, Q) int32 document ids,
        negative for padding; or a (B, 1, Q, KV) bool mask where that is not enough, with a
        warning, once, unless the layer is one of a sliding window.
    """

    def exact() -> Tensor | None:
        made: Tensor | None = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            local_size=local_size, **kwargs,
        )  # fmt: skip
        return made

    if _sharded[0]:
        return None
    skip = SKIPS.get(mask_function, "")
    if local_size is not None or q_length != kv_length or not kwargs.get(skip, True):
        return exact()
    real = None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if not torch.compiler.is_compiling() and real.all():
            real = None
    if skip:
        return None if real is None else real.int() - 1
    ids = None
    if not kwargs.get("use_vmap", False) and not kv_offset:
        ids = _documents(mask_function, batch_size, q_length, kwargs.get("device", "cpu"))
    if ids is None:
        warn_once(ODD_MASK)
        made = exact()
        if made is None:  # by now nothing may rely on a module's own direction
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            made = exact()
        return made
    return ids if real is None else torch.where(real, ids, -1)


def _documents(
    mask_function: Callable[..., Any], batch: int, length: int, device: torch.device | str
) -> Tensor | None:
    """(B, L) document ids that give this mask together with causality, or None if none do."""
    b = torch.arange(batch, device=device)[:, None, None, None]
    at = torch.arange(length, device=device)
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)

    def seen(q: Tensor, kv: Tensor) -> Tensor:
        found: Tensor = mask_function(b, head, q, kv)
        return found.expand(torch.broadcast_shapes(b.shape, q.shape, kv.shape))

    # A document begins where a token does not see the one before it.
    q = at.view(1, 1, -1, 1)
    joined = seen(q, (q - 1).clamp(min=0))[:, 0, :, 0]
    ids = (~joined).cumsum(-1).to(torch.int32)
    if torch.compiler.is_compiling():
        return ids
    some = at[:: max(length // SAMPLE, 1)]
    want = (ids[:, some, None] == ids[:, None]) & (at <= some[:, None])
    got = seen(some.view(1, 1, -1, 1), at.view(1, 1, 1, -1))[:, 0]
    return ids if torch.equal(want, got) else None


def register() -> None:
    """Make the implementation known to transformers, attention and mask both."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


register()
