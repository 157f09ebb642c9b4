"""What planning takes longest for, on CPU and in one pass: `cpu_planning.cpp`, built on first use.

Openings by exact estimates: the best key of each unit is found where the products are made, so that
no score is ever written to memory, and threads wait for each other once. It takes a fifth of the
time that products, maxima and the graph of `openings` take one after the other. Estimates are
products of integers: in tiles of bfloat16 (AMX) or of bytes (AVX-512 VNNI) where the CPU has them,
else in float32, and the same in all three. Rule and roundings are those of `opening.py`; only sums
of masses and scores of near tokens come in another order, and of units known by their boxes sixteen
count as so many of their mean where none can be expected to be worth opening. That is less than
they hold, so that a few more units open (bench/RESEARCH.md, *Old units, sixteen at a time*). Where
C++ is not to be had (`cpp.py`), `opening.py` does it in PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga import cpp
from flexdga.config import DGAConfig
from flexdga.plan import Documents

NAME = "cpu_planning"
"""Of the source."""
TILE = 32
"""Numbers of a key that a tile holds."""


def decides(query: Tensor, config: DGAConfig) -> bool:
    """Whether what is here is for such a call."""
    return (
        query.device.type == "cpu"
        and config.open_by == "exact"
        and config.open_units is None
        and cpp.available(NAME)
    )


def openings_on_cpu(
    query: Tensor,
    key: Tensor,
    docs: Documents,
    home: Tensor,
    *,
    near: tuple[int, int],
    config: DGAConfig,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """`openings` of a whole sequence: (B, H, T, N) int32.

    Args:
        query: (B, H, L, D), L in whole steps of the plan.
        key: (B, Hkv, L, D).
        docs: the documents.
        home: (B, N) int32, `Units.first`.
        near: `NEAR` and `SEGMENT` of `estimates.py`.
        config: the choices, for which `decides`.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
    """
    inputs = _in_tiles(query).float(), _in_tiles(key).bfloat16(), docs.first, home
    size = config.block_size[1]
    least = math.log(config.open_mass) if config.open_mass else -math.inf
    since: Tensor = _openings(
        *(x.contiguous() for x in inputs), list(config.block_size), config.window,
        [tokens // size for tokens in near], scale, least, is_causal, config.scope == "prompt",
    )  # fmt: skip
    return since


def best_keys_on_cpu(query: Tensor, key: Tensor, *, config: DGAConfig, scale: float) -> Tensor:
    """(B, H, C, N) float32, the best score of each unit's keys: for few queries, and a cache.

    Args:
        query: (B, H, C, D).
        key: (B, Hkv, N·U, D) bfloat16.
        config: the choices, for which `decides`.
        scale: of the scores.
    """
    key = _in_tiles(key)
    key = key if key.stride()[2:] == (key.shape[3], 1) else key.contiguous()
    query = _in_tiles(query).float().contiguous()
    best: Tensor = _best_keys(query, key.flatten(0, 1), config.block_size[1], scale)
    return best


# Operators, so that tensors without memory (FakeTensor) are told apart.


@torch.library.custom_op("flexdga::cpu_openings", mutates_args=(), device_types="cpu")
def _openings(
    query: Tensor,
    key: Tensor,
    first: Tensor,
    home: Tensor,
    block_size: list[int],
    window: int,
    known: list[int],
    scale: float,
    least: float,
    is_causal: bool,
    prompt: bool,
) -> Tensor:
    since = _no_openings(query, key, first, home, block_size)
    (batch, heads, length, dim), kv_heads = query.shape, key.shape[1]
    numbers = batch, kv_heads, heads // kv_heads, length, dim, *block_size, window, *known
    cpp.call(
        NAME, "flexdga_openings", query, key, first, home, since, numbers, scale, least,
        is_causal, prompt,
    )  # fmt: skip
    return since


@_openings.register_fake
def _no_openings(
    query: Tensor, key: Tensor, first: Tensor, home: Tensor, block_size: list[int], *rest: Any
) -> Tensor:
    batch, heads, length, _ = query.shape
    shape = batch, heads, length // block_size[0], home.shape[1]
    return query.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("flexdga::cpu_best_keys", mutates_args=(), device_types="cpu")
def _best_keys(query: Tensor, key: Tensor, size: int, scale: float) -> Tensor:
    best, heads = _no_best_keys(query, key, size, scale), key.shape[0]
    rows = query.shape[:3].numel() // heads
    sizes = heads, rows, query.shape[3], best.shape[3], size, key.stride(0)
    cpp.call(NAME, "flexdga_best_keys", query, key, best, sizes, scale)
    return best


@_best_keys.register_fake
def _no_best_keys(query: Tensor, key: Tensor, size: int, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[1] // size)


def _in_tiles(x: Tensor) -> Tensor:
    """(..., D), filled up to whole tiles."""
    missing = -x.shape[-1] % TILE
    return F.pad(x, (0, missing)) if missing else x
