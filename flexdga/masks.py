"""Reading a mask that somebody else made: causality, padding, or neither."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MASK_ELEMENTS = 1 << 24
"""Masks are read in blocks of at most so many elements: the temporaries stay small."""


class Mask(NamedTuple):
    """What a mask says.

    Attributes:
        is_causal: whether a query sees only the tokens up to itself.
        document_ids: (B, L) 0, or -1 for padding; None where there is none.
    """

    is_causal: bool
    document_ids: Tensor | None


def read_mask(mask: Tensor, batch: int, heads: int, length: int, keys: int) -> Mask | str:
    """Causality and padding of a mask for scores of these sizes, or why it has neither.

    A token is padding if it does not see itself; such a row may be empty instead of regular.

    Args:
        mask: bool, or floating point with 0 and -inf, that broadcasts to (B, H, L, KV).
        batch: B.
        heads: H.
        length: L, queries.
        keys: KV >= L; keys beyond the queries must be hidden.
    """
    if mask.requires_grad:
        return "mask is learned"
    if mask.dim() > 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return "mask of another shape or dtype"
    mask = mask[(None,) * (4 - mask.dim())]
    for dim in (0, 1):  # what is only repeated is read once
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    sizes = (batch, heads, length, keys)
    if any(got not in (1, wanted) for got, wanted in zip(mask.shape, sizes)):
        return "mask of another shape or dtype"
    mask = mask.expand(-1, -1, length, keys)
    real = _visible(mask[:, 0, :, :length].diagonal(dim1=-2, dim2=-1))
    index = torch.arange(length, device=mask.device)
    possible = [True, True]  # causal, or without causality
    step = max(1, MASK_ELEMENTS // (mask.shape[0] * mask.shape[1] * keys))
    for rows in index.split(step):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        block = mask[:, :, here]
        if block.shape[1] > 1 and not (block == block[:, :1]).all():
            return "mask differs between heads"
        seen = _visible(block[:, 0])
        if not (seen | _hidden(block[:, 0])).all():
            return "mask with values other than 0 and -inf"
        if seen[..., length:].any():
            return "mask admits keys beyond the queries"
        seen = seen[..., :length]
        empty = ~(seen.any(-1) | real[:, here])
        for i, past in enumerate((index <= rows[:, None], True)):
            regular = (seen == (real[:, None] & past)).all(-1)
            possible[i] = possible[i] and bool((regular | empty).all())
        if not any(possible):
            return "mask is not causal"
    if ((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any():
        return "padding inside a row"
    ids = None if real.all() else torch.where(real, 0, -1).expand(batch, -1)
    return Mask(possible[0], ids)


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _hidden(mask: Tensor) -> Tensor:
    # The lowest finite number stands for -inf in many models.
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
