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
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.plan import Documents
from flexdga.saying import warn_once

SOURCE = Path(__file__).with_suffix(".cpp")
TILE = 32
"""Numbers of a key that a tile holds."""


def decides(query: Tensor, config: DGAConfig) -> bool:
    """Whether `openings_on_cpu` is for such a call."""
    return (
        query.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and config.open_by == "exact"
        and config.open_units is None
        and available()
    )


def available() -> bool:
    """Whether there is a library to call."""
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
    query, key = _in_tiles(query), _in_tiles(key)
    (batch, heads, length, dim), kv_heads = query.shape, key.shape[1]
    (rows, size), library = config.block_size, _library()
    assert library is not None
    since = torch.empty(batch, heads, length // rows, length // size, dtype=torch.int32)
    inputs = (query.float(), key.bfloat16(), docs.first, home)
    tensors = [x.contiguous() for x in inputs]
    numbers = (
        batch, kv_heads, heads // kv_heads, length, dim, rows, size, config.window,
        torch.get_num_threads(),
    )  # fmt: skip
    least = math.log(config.open_mass) if config.open_mass else -math.inf
    library.flexdga_openings(
        *(_address(x) for x in (*tensors, since)),
        (ctypes.c_int64 * len(numbers))(*numbers),
        ctypes.c_float(scale),
        ctypes.c_float(least),
        int(is_causal),
        int(config.scope == "prompt"),
    )
    return since


def best_keys_on_cpu(query: Tensor, key: Tensor, *, config: DGAConfig, scale: float) -> Tensor:
    """(B, H, C, N) float32, the best score of each unit's keys: for few queries, and a cache.

    Args:
        query: (B, H, C, D).
        key: (B, Hkv, N·U, D) bfloat16.
        config: the choices, for which `decides`.
        scale: of the scores.
    """
    query, key = _in_tiles(query), _in_tiles(key)
    (batch, heads, count, dim), kv_heads, size = query.shape, key.shape[1], config.block_size[1]
    key = key.reshape(batch * kv_heads, *key.shape[2:])
    key = key if key.stride()[1:] == (dim, 1) else key.contiguous()
    units, library = key.shape[1] // size, _library()
    assert library is not None
    rows, best = query.float().contiguous(), query.new_empty(batch, heads, count, units).float()
    numbers = (
        key.shape[0], heads // kv_heads * count, dim, units, size, key.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    library.flexdga_best_keys(
        *(_address(x) for x in (rows, key, best)),
        (ctypes.c_int64 * len(numbers))(*numbers),
        ctypes.c_float(scale),
    )
    return best


def list_kinds(kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row of (rows, N) uint8 has a 1, and where a 2.

    Returns:
        (2, rows) int32 counts of both, and a table of each, (≥ rows, W) int32, W odd: compilers
        take sizes that are equal by chance for the same. A view of N columns of it ends inside.
    """
    library, (rows, blocks) = _library(), kinds.shape
    assert library is not None
    sizes = ctypes.c_int64(rows), ctypes.c_int64(blocks)
    threads = ctypes.c_int64(torch.get_num_threads())
    counts = torch.empty(2, rows, dtype=torch.int32)
    library.flexdga_count_kinds(_address(kinds), *sizes, _address(counts), threads)
    width = int(counts.amax()) // 16 * 16 + 17
    part, whole = (
        torch.zeros(rows + -(-blocks // width), width, dtype=torch.int32) for _ in range(2)
    )
    library.flexdga_list_kinds(
        _address(kinds), *sizes, _address(part), _address(whole), ctypes.c_int64(width), threads
    )
    return counts, part, whole


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _in_tiles(x: Tensor) -> Tensor:
    """(..., D), filled up to whole tiles."""
    missing = -x.shape[-1] % TILE
    return F.pad(x, (0, missing)) if missing else x


@functools.cache
def _library() -> Any:
    """What was compiled; None where it is not to be had."""
    if os.environ.get("FLEXDGA_STOCK_CPU_KERNEL", "0") not in ("", "0") or sys.platform == "win32":
        return None
    from torch._inductor.codecache import CppCodeCache

    try:
        library = CppCodeCache.load(SOURCE.read_text())
    except Exception as error:  # of whatever compiler there is
        warn_once(f"flexdga: {SOURCE.name} did not compile, so planning is slower: {error}")
        return None
    return library if library.flexdga_ready() else None
