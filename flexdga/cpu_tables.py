"""The kernel's tables of blocks on CPU, listed by `cpu_tables.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from flexdga import cpp

NAME = "cpu_tables"
"""Of the source."""


def list_kinds(kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row of (rows, N) uint8 has a 1, and where a 2.

    Returns:
        (2, rows) int32 counts of both, and a table of each, (≥ rows, W) int32, W odd: compilers
        take sizes that are equal by chance for the same. A view of N columns of it ends inside.
    """
    counts = _count_kinds(kinds)
    part, whole = _list_kinds(kinds, int(counts.amax()) // 16 * 16 + 17)
    return counts, part, whole


@torch.library.custom_op("flexdga::cpu_count_kinds", mutates_args=(), device_types="cpu")
def _count_kinds(kinds: Tensor) -> Tensor:
    counts = _no_counts(kinds)
    cpp.call(NAME, "flexdga_count_kinds", kinds, counts, kinds.shape)
    return counts


@_count_kinds.register_fake
def _no_counts(kinds: Tensor) -> Tensor:
    return kinds.new_empty(2, kinds.shape[0], dtype=torch.int32)


@torch.library.custom_op("flexdga::cpu_list_kinds", mutates_args=(), device_types="cpu")
def _list_kinds(kinds: Tensor, width: int) -> tuple[Tensor, Tensor]:
    part, whole = _no_lists(kinds, width)
    cpp.call(NAME, "flexdga_list_kinds", kinds, part, whole, (*kinds.shape, width))
    return part, whole


@_list_kinds.register_fake
def _no_lists(kinds: Tensor, width: int) -> tuple[Tensor, Tensor]:
    shape = kinds.shape[0] + -(-kinds.shape[1] // width), width
    part, whole = (kinds.new_zeros(shape, dtype=torch.int32) for _ in range(2))
    return part, whole
