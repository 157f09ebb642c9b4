"""How much arithmetic a method does, how fast, and how near that is to the machine's best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .measure import timed
from .session import Row
from .workloads import Shape

PEAK_ROUNDS = 9


@dataclasses.dataclass(frozen=True)
class RooflineRow:
    """One method at one length.

    Attributes:
        length: of the sequence.
        method: its name.
        gflop: of the two products (query and key, weights and value) of all score entries in the
            blocks that the kernel visits, in 10⁹ operations.
        gflops: the same by second, over all of the method's time.
        share: of `gemm_peak`.
        kernel_gflops: over its time without planning; as `gflops` where nothing is planned. None
            where planning, which is timed by calls of its own, seems to take longer than the whole.
        kernel_share: of `gemm_peak`; None likewise.
    """

    length: int
    method: str
    gflop: float
    gflops: float
    share: float
    kernel_gflops: float | None
    kernel_share: float | None


def peak_size(device: torch.device) -> int:
    """Rows of the matrices whose product is timed: it should take a millisecond or more."""
    return 2048 if device.type == "cpu" else 8192


def gemm_peak(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of the fastest of a few square matrix products, PyTorch's own."""
    size = peak_size(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    best = min(timed(lambda: a @ b, device) for _ in range(PEAK_ROUNDS))
    return 2 * size**3 / best / 1e9


def roofline(rows: Sequence[Row], shape: Shape, peak: float) -> list[RooflineRow]:
    """Rows with their arithmetic.

    Args:
        rows: what was timed.
        shape: of the queries.
        peak: `gemm_peak`.
    """
    found = []
    for row in rows:
        entries = row.computed * shape.batch * shape.heads * row.length * (row.length + 1) / 2
        gflop = entries * 4 * shape.head_dim / 1e9
        rate = gflop / row.median_ms * 1e3
        kernel_ms = row.median_ms - (row.planner_ms or 0)
        kernel = gflop / kernel_ms * 1e3 if kernel_ms > 0 else None
        share = None if kernel is None else kernel / peak
        found.append(RooflineRow(row.length, row.method, gflop, rate, rate / peak, kernel, share))
    return found
