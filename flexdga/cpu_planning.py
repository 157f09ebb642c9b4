"""What planning takes longest for, on CPU and in one pass: `cpu_planning.cpp`, built on first use.

Openings by exact estimates: the best key of each unit is found where the products are made, so that
no score is ever written to memory, and threads wait for each other once. It takes a fifth of the
time that products, maxima and the graph of `openings` take one after the other. CPUs that multiply
tiles of bfloat16 (AMX) do so, others use float32. Rule and roundings are those of `opening.py`;
sums come in another order. And the kernel's tables of blocks, which are lists, not arithmetic.

Compiled by Inductor's own C++ builder, into its cache. FLEXDGA_STOCK_CPU_KERNEL=1 switches it off:
then, and on Windows, `opening.py` and `block_mask.py` do it in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.cpu_kernel import switched_off
from flexdga.plan import Documents
from flexdga.saying import warn_once

SOURCE = Path(__file__).with_suffix(".cpp")
TILE = 32
"""Numbers of a key that a tile holds."""


def decides(query: Tensor, config: DGAConfig) -> bool:
    """Whether what is here is for such a call."""
    return (
        query.device.type == "cpu"
        and config.open_by == "exact"
        and config.open_units is None
        and available()
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether there is a library to call. A compiler that traces this runs it."""
    return _library() is not None


def openings_on_cpu(
    query: Tensor,
    key: Tensor,
    docs: Documents,
    home: Tensor,
    *,
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
        config: the choices, for which `decides`.
        is_causal: whether queries see only the tokens up to themselves.
        scale: of the scores.
    """
    inputs = _in_tiles(query).float(), _in_tiles(key).bfloat16(), docs.first, home
    least = math.log(config.open_mass) if config.open_mass else -math.inf
    since: Tensor = _openings(
        *(x.contiguous() for x in inputs), list(config.block_size), config.window, scale, least,
        is_causal, config.scope == "prompt",
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


def list_kinds(kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row of (rows, N) uint8 has a 1, and where a 2.

    Returns:
        (2, rows) int32 counts of both, and a table of each, (≥ rows, W) int32, W odd: compilers
        take sizes that are equal by chance for the same. A view of N columns of it ends inside.
    """
    counts = _count_kinds(kinds)
    part, whole = _list_kinds(kinds, int(counts.amax()) // 16 * 16 + 17)
    return counts, part, whole


# Operators, so that tensors without memory (FakeTensor) are told apart.


@torch.library.custom_op("flexdga::cpu_openings", mutates_args=(), device_types="cpu")
def _openings(
    query: Tensor,
    key: Tensor,
    first: Tensor,
    home: Tensor,
    block_size: list[int],
    window: int,
    scale: float,
    least: float,
    is_causal: bool,
    prompt: bool,
) -> Tensor:
    since = _no_openings(query, key, first, home, block_size)
    (batch, heads, length, dim), kv_heads = query.shape, key.shape[1]
    numbers = batch, kv_heads, heads // kv_heads, length, dim, *block_size, window
    _library().flexdga_openings(
        *(_address(x) for x in (query, key, first, home, since)),
        _sizes(*numbers),
        ctypes.c_float(scale),
        ctypes.c_float(least),
        int(is_causal),
        int(prompt),
    )
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
    sizes = _sizes(heads, rows, query.shape[3], best.shape[3], size, key.stride(0))
    _library().flexdga_best_keys(
        *(_address(x) for x in (query, key, best)), sizes, ctypes.c_float(scale)
    )
    return best


@_best_keys.register_fake
def _no_best_keys(query: Tensor, key: Tensor, size: int, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[1] // size)


@torch.library.custom_op("flexdga::cpu_count_kinds", mutates_args=(), device_types="cpu")
def _count_kinds(kinds: Tensor) -> Tensor:
    counts = _no_counts(kinds)
    _library().flexdga_count_kinds(_address(kinds), _address(counts), _sizes(*kinds.shape))
    return counts


@_count_kinds.register_fake
def _no_counts(kinds: Tensor) -> Tensor:
    return kinds.new_empty(2, kinds.shape[0], dtype=torch.int32)


@torch.library.custom_op("flexdga::cpu_list_kinds", mutates_args=(), device_types="cpu")
def _list_kinds(kinds: Tensor, width: int) -> tuple[Tensor, Tensor]:
    part, whole = _no_lists(kinds, width)
    sizes = _sizes(*kinds.shape, width)
    _library().flexdga_list_kinds(_address(kinds), _address(part), _address(whole), sizes)
    return part, whole


@_list_kinds.register_fake
def _no_lists(kinds: Tensor, width: int) -> tuple[Tensor, Tensor]:
    shape = kinds.shape[0] + -(-kinds.shape[1] // width), width
    part, whole = (kinds.new_zeros(shape, dtype=torch.int32) for _ in range(2))
    return part, whole


def _sizes(*sizes: int) -> Any:
    """As C++ takes them, the number of threads behind them."""
    numbers = *sizes, torch.get_num_threads()
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _in_tiles(x: Tensor) -> Tensor:
    """(..., D), filled up to whole tiles."""
    missing = -x.shape[-1] % TILE
    return F.pad(x, (0, missing)) if missing else x


@functools.cache
def _library() -> Any:
    """What was compiled; None where it is not to be had."""
    if switched_off() or sys.platform == "win32":
        return None
    from torch._inductor.codecache import CppCodeCache

    try:
        library = CppCodeCache.load(SOURCE.read_text())
    except Exception as error:  # of whatever compiler there is
        warn_once(f"flexdga: {SOURCE.name} did not compile, so planning is slower: {error}")
        return None
    return library if library.flexdga_ready() else None
