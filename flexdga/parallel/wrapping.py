"""A transformers model over a sharded sequence: tokens and positions cut, logits put together."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flexdga.config import DGAConfig
from flexdga.huggingface import Settings, sharded_masks
from flexdga.parallel.attention import parallel_attention
from flexdga.parallel.shards import Shards

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
        for name in ("labels", "past_key_values", "logits_to_keep"):
            if given.get(name) is not None and not _is_zero(given[name]):
                raise ValueError(
                    f"{name}: a sharded forward pass has none; expected a loss over "
                    "the shard of the logits, and a prefill without cache"
                )
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
        given |= {"attention_mask": None, "use_cache": False}
        for own in self.settings:
            own.sharded = _Call(shards, own.config, ids)
        sharded_masks(True)
        return (), given

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        sharded_masks(False)
        if not self.gather or output is None or self.shards is None:
            return output
        for name in GATHERED:
            part = getattr(output, name, None)
            if isinstance(part, Tensor):
                if part.requires_grad:
                    raise ValueError(
                        f"gather: gathered {name} have no gradient; expected gather=False, or "
                        "torch.no_grad()"
                    )
                output[name] = self.shards.unshard(part, 1)
        return output

    def _shards_of(self, length: int) -> Shards:
        if self.shards is None or self.shards.length != length:
            configs = [own.config for own in self.settings]
            self.shards = Shards(length, self.mesh, configs, balanced=self.balanced)
        return self.shards


class _Call:
    """Attention of one layer in a sharded forward pass."""

    def __init__(self, shards: Shards, config: DGAConfig, ids: Tensor | None) -> None:
        self.shards, self.config, self.ids = shards, config, ids

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return parallel_attention(
            query, key, value, self.shards, config=self.config, scale=scale, document_ids=self.ids
        )


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
