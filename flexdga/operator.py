"""`torch.ops.flexdga.attention`: `dga_attention` as one operator, one node of an exported graph."""

from __future__ import annotations

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
    with torch.no_grad():  # a backward through the operator is refused below
        out = dga_attention(
            query, key, value, config=read(config), is_causal=is_causal, scale=scale,
            document_ids=document_ids, lengths=lengths,
        )  # fmt: skip
    return out.contiguous()


@attention.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(
        "torch.ops.flexdga.attention has no backward: an exported program is for inference; "
        "expected torch.no_grad(), or flexdga.dga_attention for training"
    )


attention.register_autograd(_backward)
