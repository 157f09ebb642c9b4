"""Rows of numbers as int8, with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127
ROUND_UP = 1 + 2**-7
"""A scale rounded to bfloat16 (8 bits) after this is no smaller than it was: nothing is cut off."""


def pack(x: Tensor, scale_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(..., D) to int8 (..., D) and scales (..., 1): off by half a scale at most.

    Args:
        x: the rows.
        scale_dtype: of the scales; None = that of `x`. bfloat16 halves their bytes.
    """
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / MOST
    if scale_dtype is not None and scale_dtype != x.dtype:
        scale = (scale * ROUND_UP).to(scale_dtype)
    return (x / scale.to(x.dtype)).round().to(torch.int8), scale


def unpack(number: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows again, in `dtype`."""
    return number.to(dtype) * scale.to(dtype)
