"""A transformers model over a sharded sequence: tokens and positions cut, logits put together.

A prompt is cut; new tokens after it, in a `DGACache`, are on every rank (`decoding.py`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flexdga.cache import CACHE_NAME, CACHE_NAMES, DGACache, DGALayer
from flexdga.config import DGAConfig
from flexdga.huggingface import Settings, sharded_masks
from flexdga.parallel.attention import parallel_attention
from flexdga.parallel.collectives import all_gather, all_reduce
from flexdga.parallel.decoding import ShardedCache
from flexdga.parallel.failures import watched
from flexdga.parallel.shards import Shards, group_of

GATHERED = ("logits", "last_hidden_state")


class ShardedForward:
    """Makes each forward pass of a model one over this rank's shard.

    Args:
        model: a wrapped decoder of transformers.
        settings: of its attention modules.
        mesh: over which sequences are sharded.
        balanced: as in `Shards`.
        gather: whether every rank gets whole logits.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: list[Settings],
        mesh: DeviceMesh | ProcessGroup,
        *,
        balanced: bool,
        gather: bool,
    ) -> None:
        self.settings, self.mesh = settings, mesh
        self.balanced, self.gather = balanced, gather
        self.signature = inspect.signature(type(model).forward)
        self.shards: Shards | None = None
        self.cut = False  # whether the current forward pass is over a shard
        self.kept: Tensor | None = None  # (k,) bool, which of the last tokens are this rank's
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def undo(self) -> None:
        """Restore the model's own forward pass."""
        for hook in self.hooks:
            hook.remove()
        for own in self.settings:
            own.sharded = None

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self.signature.bind(model, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        given.pop(next(iter(self.signature.parameters)))  # self
        if given.get("labels") is not None:
            raise ValueError(
                "labels: a sharded forward pass has none; expected a loss over the shard of the "
                "logits"
            )
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if cache is not None and not isinstance(cache, DGACache):
            raise ValueError(
                f"{CACHE_NAME}: expected a DGACache in a sharded model, got {type(cache).__name__}"
            )
        self.cut = cache is None or not cache.get_seq_length()
        if (
            cache is not None
            and self.cut
            and any(layer.record_past for layer in cache.layers if isinstance(layer, DGALayer))
        ):
            raise ValueError(
                f"{CACHE_NAME}: assisted generation guesses tokens with the prompt, and a "
                "sharded prompt cannot be taken back; expected the prompt before, as in "
                f"model(tokens[:, :-1], {CACHE_NAME}=cache), and then generate(tokens, "
                f"{CACHE_NAME}=cache, ...)"
            )
        if cache is not None and not self.cut:
            self._go_on(cache, given.get("input_ids"))
            return args, kwargs
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        length, device = tokens.shape[1], tokens.device
        shards = self._shards_of(length)
        ids = _documents(given.get("attention_mask"), given.get("position_ids"), length)
        if ids is not None:
            ids = ids.expand(tokens.shape[0], -1)
        for name in ("input_ids", "inputs_embeds"):
            if given.get(name) is not None:
                given[name] = shards.shard(given[name], 1)
        positions = given.get("position_ids")
        if positions is None:
            given["position_ids"] = shards.positions(device).clamp(max=length - 1)[None]
        else:
            given["position_ids"] = shards.shard(positions, 1)
        self._keep(given, shards, device)
        given |= {"attention_mask": None, "use_cache": cache is not None}
        for own in self.settings:
            own.sharded = _Call(shards, own.config, ids)
        sharded_masks(True)
        return (), given

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        sharded_masks(False)
        if not self.gather or output is None or self.shards is None or not self.cut:
            return output
        for name in GATHERED:
            part = getattr(output, name, None)
            if isinstance(part, Tensor):
                if part.requires_grad:
                    raise ValueError(
                        f"gather: gathered {name} have no gradient; expected gather=False, or "
                        "torch.no_grad()"
                    )
                output[name] = self._whole(part, self.shards)
        return output

    def _keep(self, given: dict[str, Any], shards: Shards, device: torch.device) -> None:
        """Make `logits_to_keep` the places of the last tokens in this rank's shard."""
        count, self.kept = given.get("logits_to_keep"), None
        if count is None or _is_zero(count):
            return
        if not self.gather or not isinstance(count, int):
            raise ValueError(
                f"logits_to_keep: expected a number, and gathered logits, got {count!r}, "
                f"gather={self.gather}"
            )
        last = torch.arange(max(shards.length - count, 0), shards.length, device=device)
        found = shards.positions(device) == last[:, None]
        given["logits_to_keep"] = found.int().argmax(-1)
        self.kept = found.any(-1)

    def _whole(self, part: Tensor, shards: Shards) -> Tensor:
        """The logits of all tokens, or of those to keep, on every rank."""
        if self.kept is None:
            return shards.unshard(part, 1)
        with watched(shards.group, "flexdga, logits"):
            mine = part.masked_fill(~self.kept[:, None], 0)
            return all_reduce(mine, "sum", shards.group, "logits")

    def _go_on(self, cache: DGACache, tokens: Tensor | None) -> None:
        """New tokens after a prompt: the same on every rank."""
        for layer in cache.layers:
            if isinstance(layer, DGALayer) and not isinstance(layer.cache, ShardedCache):
                raise ValueError(
                    f"{CACHE_NAME}: expected a cache that this sharded model filled itself"
                )
        for own in self.settings:
            own.sharded = None
        if tokens is None:
            return
        group = group_of(self.mesh)
        with watched(group, "flexdga, new tokens"):
            every = funcol.wait_tensor(all_gather(tokens[None], group, "new tokens"))
        if (every != every[:1]).any():
            raise ValueError(
                f"input_ids: expected the same new tokens on all ranks (when sampling, one seed "
                f"for all), got {every.tolist()}"
            )

    def _shards_of(self, length: int) -> Shards:
        if self.shards is None or self.shards.length != length:
            configs = [own.config for own in self.settings]
            self.shards = Shards(length, self.mesh, configs, balanced=self.balanced)
        return self.shards


class _Call:
    """Attention of one layer in a sharded forward pass."""

    def __init__(self, shards: Shards, config: DGAConfig, ids: Tensor | None) -> None:
        self.shards, self.config, self.ids = shards, config, ids

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        layer: DGALayer | None,
    ) -> Tensor:
        config, cache = self.config, None
        if layer is not None:
            key, value = layer.taken()
            config, old = layer.cache.config, layer.cache
            cache = layer.cache = ShardedCache(
                config, self.shards.group, max_length=old.max_length, int8=old.int8
            )
            cache.record_past = old.record_past
        return parallel_attention(
            query, key, value, self.shards, config=config, scale=scale, document_ids=self.ids,
            cache=cache,
        )  # fmt: skip


def _documents(mask: Tensor | None, positions: Tensor | None, length: int) -> Tensor | None:
    """(B, L) ids of documents: where positions begin again; -1 for padding."""
    ids = None
    if positions is not None:
        ids = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        ids = ids if ids.any() else None  # plain positions
    if mask is not None:
        if tuple(mask.shape[1:]) != (length,):
            raise ValueError(
                f"attention_mask: expected (B, {length}), got {tuple(mask.shape)}: a mask over "
                "pairs of tokens cannot be sharded"
            )
        if not mask.all():
            ids = torch.zeros_like(mask, dtype=torch.long) if ids is None else ids
            ids = torch.where(mask.bool(), ids, -1)
    return ids


def _is_zero(value: Any) -> bool:
    return isinstance(value, int) and value == 0
