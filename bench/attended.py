"""A transformers model whose attention the benchmarks read, or replace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError
from .workloads import QKV

NAME = "flexdga_bench"
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
        model.base_model(ids, use_cache=False)
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
        _check_plain(module, options)
        assert _attend is not None and attention_mask is None
        out = _attend(QKV(query, key, value, scaling, module.layer_idx))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # plain causal: no mask


def _check_plain(module: Any, options: dict[str, Any]) -> None:
    """Fail if a layer asks of attention what is not plain and causal."""
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise UsageError(
                f"--model: layer {module.layer_idx} is no plain causal attention, it has "
                f"{name}={options[name]}; expected a model without"
            )
