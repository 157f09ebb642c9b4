from __future__ import annotations

import torch
from torch import Tensor

from flexdga import DGAConfig

SMALL = {
    "block_size": (16, 16),
    "unit_size": 32,
    "group_size": 8,
    "window": 16,
    "dense_below": 0,
    "focal_ratio": 1 / 16,
    "rest": "group",
    "open_units": 0,
}
"""Settings under which a few hundred tokens show every feature."""


def small(**changes) -> DGAConfig:
    return DGAConfig(**(SMALL | changes))


def by_landmarks(**changes) -> DGAConfig:
    """What `flexdga.parallel` and GPUs take."""
    return DGAConfig.auto(0.15, **({"open_by": "landmarks", "dense_below": 0} | changes))


def qkv(batch=1, heads=2, kv_heads=2, length=200, head_dim=32, dtype=torch.float32) -> list[Tensor]:
    shapes = [(batch, h, length, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative Frobenius error against float64, three times the largest measured over these tests:
float32 9e-7 (sums of a few hundred products), float16 9e-4 and bfloat16 7e-3 (the dtype's own
rounding of q, k, v is shared with the oracle; what is left is that of pooled keys, weights and the
output: a few units of 2^-11 and 2^-8)."""
