"""`torch.ops.flexdga.attention`: `dga_attention` as one operator, one node of an exported graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flexdga.attention import dga_attention
from flexdga.spelling import read


@torch.library.custom_op("flexdga::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_ids: Tensor | None,
    lengths: Tensor | None,
    config: str,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """`dga_attention` in the types of an operator's schema.

    `torch.export` finds it in place of every `dga_attention` that has neither a score_mod, a plan
    nor kernel options, so that the program can be saved; `flexdga.lower` takes it apart again.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        document_ids: (B, L) or None.
        lengths: (B,) or None.
        config: as `flexdga.spelling.spell` writes it.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.

    Returns:
        (B, H, L, Dv), contiguous.
    """
    with torch.no_grad():  # gradients are `attention_backward`'s
        out = dga_attention(
            query, key, value, config=read(config), is_causal=is_causal, scale=scale,
            document_ids=document_ids, lengths=lengths,
        )  # fmt: skip
    return out.contiguous()


@attention.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.custom_op("flexdga::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_ids: Tensor | None,
    lengths: Tensor | None,
    config: str,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: attention is computed once more, and goes backward.

    Args:
        grad: (B, H, L, Dv), of the output.
        query: (B, H, L, D), and all that follows as `attention` had it.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        document_ids: (B, L) or None.
        lengths: (B,) or None.
        config: as `flexdga.spelling.spell` writes it.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.

    Returns:
        Three tensors of the shapes of query, key and value, contiguous.
    """
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    with _recording():
        out = dga_attention(
            *inputs, config=read(config), is_causal=is_causal, scale=scale,
            document_ids=document_ids, lengths=lengths,
        )  # fmt: skip
        made = torch.autograd.grad(out, inputs, grad)
    d_query, d_key, d_value = (x.contiguous() for x in made)
    return d_query, d_key, d_value


@attention_backward.register_fake
def _shapes(grad: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.new_empty(x.shape) for x in inputs[:3])
    return query, key, value


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd again, below which torch runs operators."""
    hidden = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        hidden = hidden.remove(getattr(torch._C.DispatchKey, key))
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, hidden), torch.enable_grad():
        yield


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.choices = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    made = torch.ops.flexdga.attention_backward(grad, *ctx.saved_tensors, *ctx.choices)
    return *made, None, None, None, None, None


attention.register_autograd(_backward, setup_context=_remember)
