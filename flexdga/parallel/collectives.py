"""The collectives of PyTorch that shards speak through, with gradients, and what they send.

All are `torch.distributed._functional_collectives`. Gradients are summed in float32 at least, and
their collectives are watched as those of the forward pass are.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import ProcessGroup

from flexdga.parallel.failures import watched

_counters: list[Counter[str]] = []


@contextlib.contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Count the bytes that this rank sends to others, by what they are.

    What is gathered counts once for each rank that gets it.
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def all_gather(x: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """Every rank's `x` (N, ...), one after the other: (W·N, ...). Gradients come back summed."""
    if torch.is_grad_enabled() and x.requires_grad:
        gathered: Tensor = _AllGather.apply(x, group, what)
        return gathered
    return _gather(x.detach(), group, what)


def all_to_all(
    x: Tensor, send: list[int], receive: list[int], group: ProcessGroup, what: str
) -> Tensor:
    """Rows of `x` (P, ...) to other ranks: `send[r]` of them, in order, to rank r.

    Returns:
        (sum of `receive`, ...): `receive[r]` rows from rank r, in order of ranks.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        exchanged: Tensor = _AllToAll.apply(x, send, receive, group, what)
        return exchanged
    return _exchange(x.detach(), send, receive, group, what)


def all_reduce(x: Tensor, how: str, group: ProcessGroup, what: str) -> Tensor:
    """The `sum` or `max` of every rank's `x`, the same on all of them; without gradient."""
    world = dist.get_world_size(group)
    _count(what, 2 * _bytes(x) * (world - 1) // world)  # around a ring, or as much
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), how, group))


def _gather(x: Tensor, group: ProcessGroup, what: str) -> Tensor:
    _count(what, _bytes(x) * (dist.get_world_size(group) - 1))
    return funcol.all_gather_single(x.contiguous(), 0, group)


def _exchange(
    x: Tensor, send: list[int], receive: list[int], group: ProcessGroup, what: str
) -> Tensor:
    others = sum(send) - send[dist.get_rank(group)]
    _count(what, others * math.prod(x.shape[1:]) * x.element_size())
    return funcol.all_to_all_single(x.contiguous(), receive, send, group)


def _count(what: str, size: int) -> None:
    for counter in _counters:
        counter[what] += size


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, what: str) -> Tensor:
        ctx.group, ctx.what, ctx.dtype = group, what, x.dtype
        return funcol.wait_tensor(_gather(x, group, what))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        what = f"gradient of {ctx.what}"
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        with watched(ctx.group, f"flexdga, {what}"):
            world = dist.get_world_size(ctx.group)
            _count(what, _bytes(wide) // world * (world - 1))
            mine = funcol.wait_tensor(funcol.reduce_scatter_single(wide, "sum", 0, ctx.group))
        return mine.to(ctx.dtype), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: ProcessGroup, what: str
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.what = send, receive, group, what
        return funcol.wait_tensor(_exchange(x, send, receive, group, what))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        what = f"gradient of {ctx.what}"
        with watched(ctx.group, f"flexdga, {what}"):
            back = _exchange(grad, ctx.receive, ctx.send, ctx.group, what)
            return funcol.wait_tensor(back), None, None, None, None
