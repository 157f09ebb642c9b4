"""A transformers model whose attention `flexdga-bench paper` reads, or replaces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .workloads import QKV, check_plain

NAME = "flexdga_bench_paper"
Attend = Callable[[QKV], Tensor]
"""From the inputs of a layer's attention to its output, (B, H, L, D)."""

_attend: Attend | None = None
"""What the registered attention function does at present: transformers keeps only a name."""


@contextmanager
def attended_by(model: Any, attend: Attend) -> Iterator[None]:
    """Every attention layer of a model goes through `attend`; all of them must be plain causal."""
    global _attend
    before = model.config._attn_implementation
    _register()
    model.set_attn_implementation(NAME)
    _attend = attend
    try:
        yield
    finally:
        _attend = None
        model.set_attn_implementation(before)


def capture(model: Any, ids: Tensor) -> list[QKV]:
    """The inputs of each layer's attention, rotated, while the model reads (1, L) ids."""
    found: list[QKV] = []

    def attend(x: QKV) -> Tensor:
        found.append(x)
        return F.scaled_dot_product_attention(
            x.query, x.key, x.value, is_causal=True, scale=x.scale, enable_gqa=x.grouped
        )

    with torch.no_grad(), attended_by(model, attend):
        model(ids, use_cache=False, logits_to_keep=1)
    return found


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        check_plain(module, options)
        assert _attend is not None and attention_mask is None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _attend(QKV(query, key, value, scale, module.layer_idx))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # plain causal: no mask
