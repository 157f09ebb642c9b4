"""`DGACache`: a decode cache of all layers, for transformers models and by itself."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flexdga.config import DGAConfig, LayerRule
from flexdga.decode import LayerCache
from flexdga.storage import CacheMemory
from score_mods import ScoreMod

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CACHE_NAMES = ("past_key_values", "cache")
"""What transformers calls the argument: the first until 5.23; since then it warns of that."""
CACHE_NAME = CACHE_NAMES[-1]
try:
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
    from transformers.masking_utils import create_causal_mask

    CACHE_NAME = CACHE_NAMES["cache" in inspect.signature(create_causal_mask).parameters]
except ImportError:  # by itself the cache needs nothing of transformers
    Cache = CacheLayerMixin = object

DENSE = DGAConfig.dense()
"""A layer left dense: no text is long enough for it."""


class DGALayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `DGACache`: what transformers asks of a cache layer, and a `LayerCache`.

    `update` only hands over the new keys and values; the attention function that gets them next
    also has the queries, without which nothing can be stored or attended to.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self, config: DGAConfig, max_length: int | None = None, int8: bool = False
    ) -> None:
        self.cache = LayerCache(config, max_length=max_length, int8=int8)
        # One or none. A list: what is stored in an attribute of such an object, Dynamo (torch 2.13)
        # forgets once its graph has a flex_attention.
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def __repr__(self) -> str:
        return f"DGALayer(seen={self.cache.seen}, slots={self.cache.num_slots})"

    @property
    def is_initialized(self) -> bool:
        """Whether it has seen a token."""
        return self.cache.seen > 0

    @property
    def record_past(self) -> bool:
        """Whether tokens that come now can be cropped, whatever they set off."""
        return self.cache.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.cache.record_past = value

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs."""
        self.cache.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: buffers are made when the first tokens come."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values (B, Hkv, Q, D) of new tokens, and give them back."""
        global _last_updated
        self._check_attended()
        self.waiting.append((key_states, value_states))
        _last_updated = self
        return key_states, value_states

    # It branches on what is pooled when: a graph break in each layer, and not one for each step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Attention of the queries whose keys and values `update` took; see `LayerCache.attend`."""
        key, value = self.taken()
        return self.cache.attend(
            query, key, value, scale=scale, score_mod=score_mod, document_ids=document_ids
        )

    def counts(self) -> tuple[int, int, int]:
        """Tokens so far, columns that stand for them, and of how many tokens all would be kept."""
        return self.cache.seen, self.cache.num_slots + self.cache.num_raw, self.cache.below

    def taken(self) -> tuple[Tensor, Tensor]:
        """The keys and values that `update` took, once."""
        global _last_updated
        _last_updated = None
        if not self.waiting:
            raise ValueError("query: expected cache.update(key, value) before the query")
        return self.waiting.pop()

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.cache.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for the new tokens alone: the cache knows what came before them."""
        self._check_attended()
        return query_length, self.cache.seen

    def reset(self) -> None:
        """Forget everything."""
        self.waiting.clear()
        self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (a negative number, as transformers has it)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: expected minus the number of tokens, got {tokens_to_remove}"
            )
        self.cache.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with these sequences of the batch."""
        self.cache.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self.cache.select(torch.arange(self.cache.batch_size)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        self.cache.select(torch.arange(self.cache.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        """Not available."""
        raise NotImplementedError("DGACache: layers cannot be offloaded")

    def _check_attended(self) -> None:
        if self.waiting:
            raise RuntimeError(
                "DGACache: the last keys and values were never attended to. The model must run "
                "with flexdga's attention (flexdga.wrap(model), or attn_implementation='flexdga') "
                "over the very keys that update returned, or dga_decode follow each update"
            )


_last_updated: DGALayer | None = None


def layer_of(key: Tensor) -> DGALayer | None:
    """The cache layer whose `update` returned this very tensor just now."""
    layer = _last_updated
    if layer is None or not layer.waiting or layer.waiting[0][0] is not key:
        return None
    return layer


class DGACache(Cache):  # type: ignore[misc]
    """Keys and values of all layers while decoding, a fraction of the dense ones.

    Old tokens are kept as focal tokens and groups, and recent ones raw; the raw keys and values
    of what is grouped are freed. A step costs O(slots + window). In a transformers model it takes
    the place of `DynamicCache` (`cache=DGACache(config, model_config=model.config)`),
    where `flexdga.wrap` puts it by itself. Alone: `cache.update(key, value, layer_idx)`, then
    `dga_decode(query, cache, layer_idx)`, for a prompt as for each step.

    Args:
        config: the choices; None = `DGAConfig()`.
        model_config: of a transformers model: its sliding-window layers then get the caches they
            always have. Without it, layers are made as they come.
        layers: another configuration for some layers, by number; None from it leaves one dense.
        max_length: tokens to make room for at once, so that no buffer grows while decoding.
        kv_dtype: `int8` keeps the keys and values of slots (focal tokens and groups) so, with a
            scale for each slot and head, and restores them for each query. The raw window stays
            as it is; `DGAConfig.keep_raw` says how tokens to open again are kept.

    Raises:
        TypeError: `config` is no DGAConfig.
        ValueError: `kv_dtype` is neither None nor `int8`, or the model caches latents, not keys
            and values (DeepSeek).
    """

    def __init__(
        self,
        config: DGAConfig | None = None,
        *,
        model_config: PreTrainedConfig | None = None,
        layers: LayerRule | None = None,
        max_length: int | None = None,
        kv_dtype: Literal["int8"] | None = None,
    ) -> None:
        if kv_dtype not in (None, "int8"):
            raise ValueError(f"kv_dtype: expected 'int8' or None, got {kv_dtype!r}")
        config = DGAConfig() if config is None else config
        if not isinstance(config, DGAConfig):
            raise TypeError(f"config: expected a DGAConfig, got {type(config).__name__}")

        def make(index: int) -> DGALayer:
            chosen = config if layers is None else layers(index)
            return DGALayer(DENSE if chosen is None else chosen, max_length, kv_dtype == "int8")

        made: list[Any] = []
        if getattr(model_config, "kv_lora_rank", None) is not None:
            raise ValueError(
                f"model_config: {type(model_config).__name__} has latent attention, which caches "
                f"something else than keys and values; expected a model without kv_lora_rank, or "
                f"the model's own cache (prompts go through DGA also then)"
            )
        if model_config is not None:
            made = list(DynamicCache(config=model_config).layers)
            made = [
                make(i) if type(layer) is DynamicLayer else layer for i, layer in enumerate(made)
            ]
        if Cache is object:
            self.layers: list[Any] = made
        else:
            super().__init__(layers=made)
        self._make = make

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hand the keys and values (B, Hkv, Q, D) of new tokens to a layer."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self._make(len(self.layers)))
        updated: tuple[Tensor, Tensor] = self.layers[layer_idx].update(
            key_states, value_states, *args, **kwargs
        )
        return updated

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many keys a mask is made for, and the first one's position."""
        if layer_idx >= len(self.layers):
            return query_length, 0
        sizes: tuple[int, int] = self.layers[layer_idx].get_mask_sizes(query_length)
        return sizes

    def memory(self) -> CacheMemory:
        """Bytes kept by the layers that DGA manages, and what dense attention would keep."""
        parts = [layer.cache.memory() for layer in self.layers if isinstance(layer, DGALayer)]
        return CacheMemory(*(sum(each) for each in zip((0, 0, 0), *parts)))


def dga_decode(
    query: Tensor,
    cache: DGACache,
    layer_idx: int = 0,
    *,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens to a cache, after `cache.update(key, value, layer_idx)`.

    Args:
        query: (B, H, Q, D) of the tokens that `update` brought: a prompt, a chunk of one, or one
            generated token.
        cache: the cache.
        layer_idx: which of its layers.
        scale: of the scores; None = 1/√D.
        score_mod: of token positions, as in `dga_attention`.
        document_ids: (B, Q), negative for padding.

    Returns:
        (B, H, Q, Dv).

    Raises:
        ValueError: there was no `update` before, or shapes do not fit.
        TypeError: `cache` is no DGACache.
    """
    if not isinstance(cache, DGACache):
        raise TypeError(f"cache: expected a DGACache, got {type(cache).__name__}")
    if not 0 <= layer_idx < len(cache.layers):
        raise ValueError(
            f"layer_idx: expected one of the cache's {len(cache.layers)} layers, got {layer_idx}"
        )
    layer = cache.layers[layer_idx]
    if not isinstance(layer, DGALayer):
        raise ValueError(f"layer_idx: layer {layer_idx} is a {type(layer).__name__}, not DGA's")
    return layer.attend(query, scale=scale, score_mod=score_mod, document_ids=document_ids)
