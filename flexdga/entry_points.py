"""A transformers model in two parts to export: a prompt, and one token more; their state between.

Both are plain modules of tensors: what a cache keeps is an output of the first, and an argument of
the second, which changes it in place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from flexdga.cache import CACHE_NAME, DGALayer
from flexdga.huggingface import Settings
from flexdga.lowering import whole_steps
from flexdga.static_cache import remember, step
from flexdga.static_layout import Layout, State
from flexdga.wrap_huggingface import attention_modules
from score_mods import ScoreMod


class StaticLayer(DGALayer):
    """One layer's tensors, in the place of a cache layer of transformers.

    Args:
        layout: their sizes.
        shared: what the layers share.
        state: from a prompt; empty for one to come.
    """

    def __init__(self, layout: Layout, shared: Shared, state: State) -> None:
        self.layout, self.shared, self.state = layout, shared, state
        self.waiting = []

    @property
    def is_initialized(self) -> bool:
        """Whether it has seen a token."""
        return bool(self.state)

    def counts(self) -> tuple[int, int, int]:
        """Room for tokens, the columns that stand for them, and no length that would be short."""
        return self.layout.capacity, self.layout.ring + self.layout.slots, 0

    def get_seq_length(self) -> int:
        """Not known to Python: positions are given to the model."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for the new tokens alone."""
        return query_length, 0

    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Attention of the queries whose keys and values `update` took."""
        key, value = self.taken()
        if score_mod is not None or document_ids is not None:
            raise NotImplementedError(
                "decode: exported decoding knows neither score mods (soft capping, attention "
                "sinks in the score) nor padding; expected a model and inputs without them"
            )
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        if self.state:
            time, seen = self.shared.time, self.shared.seen
            assert time is not None
            return step(query, key, value, self.state, time, self.layout, scale, seen)
        length = self.shared.filled_length(key.shape[2], self.layout)
        out, made = remember(query, key, value, length, self.layout, scale)
        self.state.update(made)
        return out


class Shared:
    """What all layers of one call need to know of it.

    Args:
        time: () int64 position of a step's token; None for a prompt.
        seen: the same as a number.
    """

    def __init__(self, time: Tensor | None = None, seen: int | None = None) -> None:
        self.time, self.seen = time, seen
        self.lengths: dict[int, int] = {}

    def filled_length(self, length: int, layout: Layout) -> int:
        """A prompt's length in whole steps, one symbol for all layers."""
        if layout.step not in self.lengths:
            steps = whole_steps(length, layout.step, least=2)
            torch._check(steps * layout.step <= layout.capacity)
            self.lengths[layout.step] = steps * layout.step
        return self.lengths[layout.step]


class _Entry(nn.Module):
    """A model over a decode cache of fixed size.

    Args:
        model: wrapped by `flexdga.wrap`.
        capacity: tokens that a text may grow to.

    Raises:
        NotImplementedError: a layer of the model cannot be decoded so.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        super().__init__()
        self.model, self.capacity = model, capacity
        self.layouts = _layouts(model, capacity)


class Prompt(_Entry):
    """Tokens to the logits after the last of them, and the state."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """(B, L) tokens to (B, 1, vocabulary) logits, their number, and each layer's tensors."""
        length = tokens.shape[1]
        torch._check(length <= self.capacity)
        shared = Shared()
        for layout in self.layouts:  # before the first layer, so that all layers are alike
            if not layout.dense:
                shared.filled_length(length, layout)
        layers = [StaticLayer(layout, shared, {}) for layout in self.layouts]
        logits = _logits(self.model, tokens, layers, logits_to_keep=1)
        state = [t for layer in layers for t in layer.state.values()]
        return logits, torch.full((), length, device=tokens.device), *state


class Step(_Entry):
    """One token more, and the state, to the logits after it."""

    def forward(self, token: Tensor, length: Tensor, *state: Tensor) -> Tensor:
        """(B, 1) tokens to (B, 1, vocabulary) logits; `length` and `state` change in place."""
        seen: Any = length.item()
        torch._check(seen >= 1)
        torch._check(seen < self.capacity)
        time = length.clone()
        shared, layers = Shared(time, seen), []
        for layout in self.layouts:
            own, state = state[: len(layout.names)], state[len(layout.names) :]
            layers.append(StaticLayer(layout, shared, dict(zip(layout.names, own))))
        logits: Tensor = _logits(self.model, token, layers, position_ids=time.view(1, 1))
        length.add_(1)
        return logits


def _logits(model: PreTrainedModel, tokens: Tensor, layers: list[StaticLayer], **more: Any) -> Any:
    more[CACHE_NAME] = Cache(layers=list(layers))
    out = model(tokens, use_cache=True, return_dict=True, **more)
    return out.logits


def _layouts(model: PreTrainedModel, capacity: int) -> list[Layout]:
    layouts = []
    for name, module in attention_modules(model):
        settings = getattr(module, "_flexdga", None)
        if not isinstance(settings, Settings):
            raise ValueError(f"model: expected one that flexdga.wrap wrapped; {name} is not")
        if "sliding" in settings.row.why or not getattr(module, "is_causal", False):
            raise NotImplementedError(
                f"decode: {name} is not a causal layer of DGA's or a dense one "
                f"({settings.row.why}); expected a model without such layers"
            )
        layouts.append(Layout(settings.config, capacity))
    return layouts
