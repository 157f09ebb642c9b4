"""Gradients on CPU of attention to slots that were made elsewhere; autograd takes them there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.by_blocks import Choices, Pass
from flexdga.compress import Slots
from flexdga.plan import Plan

Kernel = Callable[[Tensor, Slots, Plan], Tensor]


def joined_slots(keys: list[Tensor], values: list[Tensor], made: list[Tensor]) -> Slots:
    """Raw keys and values in parts, and then keys, values and perhaps bias of other slots."""
    key, bias = torch.cat([*keys, made[0]], 2), None
    if len(made) > 2:
        raw = key.shape[2] - made[0].shape[2]
        bias = F.pad(made[2].squeeze(-1), (raw, 0))
    return Slots(key, torch.cat([*values, made[1]], 2), bias)


def attend_given_on_cpu(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    made: list[Tensor],
    plan: Plan,
    choices: Choices,
) -> Tensor:
    """`cpu_backward.attend_on_cpu` where slots are not pooled from these keys and values.

    Args:
        kernel: computes the forward pass, except for float64.
        query: (B, H, Q, D), of the first Q raw tokens.
        key: (B, Hkv, L, D) raw.
        value: (B, Hkv, L, Dv) raw.
        made: keys, values and perhaps bias (B, Hkv, S - L, ·) of the other slots.
        plan: which queries see them.
        choices: of the call.

    Raises:
        NotImplementedError: from `backward`, a gradient of the gradient is asked for.
    """
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    job = _Job(kernel, choices, tuple(fields))
    out: Tensor = _Attend.apply(job, query, key, value, *fields.values(), *made)
    return out


class _Job(NamedTuple):
    kernel: Kernel
    choices: Choices
    fields: tuple[str, ...]

    def split(self, others: tuple[Tensor, ...]) -> tuple[Plan, list[Tensor]]:
        """The plan, and the slots that were made."""
        count = len(self.fields)
        return Plan(**dict(zip(self.fields, others))), [t.detach() for t in others[count:]]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: _Job, query: Tensor, key: Tensor, value: Tensor, *others: Tensor
    ) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(query, key, value, *others)
        plan, made = job.split(others)
        query, key, value = query.detach(), key.detach(), value.detach()
        if query.dtype == torch.float64:
            return Pass(query, key, value, plan, job.choices, made).forward()
        return job.kernel(query, joined_slots([key], [value], made), plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "parallel_attention: on CPU its gradient has no gradient; expected "
                "create_graph=False"
            )
        query, key, value, *others = ctx.saved_tensors
        plan, made = ctx.job.split(tuple(others))
        leaves = [t.requires_grad_() for t in made]
        with torch.autocast("cpu", enabled=False):
            work = Pass(query, key, value, plan, ctx.job.choices, leaves)
            grads = work.backward(grad, [])
        none: list[Tensor | None] = [None] * len(ctx.job.fields)
        return None, *grads, *none, *[t.grad for t in leaves]
