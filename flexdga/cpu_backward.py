"""Gradients of attention on CPU, where flex_attention has none (torch 2.13).

The forward pass is the compiled kernel's. The backward pass (`by_blocks.py`) computes the scores
again, over the blocks that queries see only; what is kept for it is query, key, value and the plan.
It is not compiled: its time goes into batched products and copies, and what Inductor could fuse
between them works on a few MB that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexdga.by_blocks import Choices, Pass
from flexdga.captures import captured_tensors
from flexdga.plan import Documents, Plan
from score_mods import ScoreMod

Kernel = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]
Planner = Callable[[Tensor, Tensor, Tensor, Documents], Plan]
_Dims = Sequence[int | None]
"""Which dimension of each input `torch.vmap` maps over."""
_Mapped = tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]
"""Outputs, and the dimension of each that is mapped over."""


def wants_gradient(score_mod: ScoreMod | None, *tensors: Tensor) -> bool:
    """Whether a gradient may be asked for, to these tensors or to what the score mod captures."""
    if not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in tensors) or bool(captured_tensors(score_mod))


def stands_apart(score_mod: ScoreMod | None, *tensors: Tensor) -> bool:
    """Whether autograd or a transform of `torch.func` has to see the call as one function.

    No compiled part can take the tensors of a transform.
    """
    core: Any = torch._C
    transformed = bool(core._are_functorch_transforms_active())
    return transformed or wants_gradient(score_mod, *tensors)


@torch.compiler.disable(
    reason="flexdga: flex_attention has no backward on CPU, and flexdga's own runs outside of the "
    "graph; expected torch.no_grad(), CUDA, or a compile without fullgraph=True"
)  # type: ignore[untyped-decorator]
def attend_on_cpu(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, plan: Plan, choices: Choices
) -> Tensor:
    """`kernel.attend` with gradients to query, key, value and what the score mod captures.

    Inside a `torch.compile` it breaks the graph. What `torch.vmap` maps over joins the batch.

    Args:
        kernel: computes the forward pass. For float64, which flex_attention does not take on CPU,
            the blocks of the backward pass do.
        query: (B, H, L, D) float32, bfloat16, float16 or float64, L in whole steps of the plan.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        plan: for this shape.
        choices: of the call.

    Returns:
        (B, H, L, Dv).

    Raises:
        NotImplementedError: the score mod depends on a tensor that requires a gradient and cannot
            be found in it; there is a score mod under `torch.vmap`; from `backward`, a gradient of
            the gradient is asked for.
    """
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    captured = captured_tensors(choices.score_mod) if torch.is_grad_enabled() else []
    job = _Job(kernel, choices, tuple(fields))
    out: Tensor = _Attend.apply(job, query, key, value, *fields.values(), *captured)
    return out


def plan_alone(
    planner: Planner, query: Tensor, key: Tensor, value: Tensor, docs: Documents
) -> Plan:
    """What the planner makes of tensors that want gradients, itself without any.

    `torch.func` unwraps the tensors for it, so that the planner's compiled parts can take them:
    those of a `torch.vmap` as one larger batch.
    """
    planning = _Planning(planner, docs.packed)
    made = _Planned.apply(planning, query, key, value, docs.first, docs.after)
    return Plan(**dict(zip(planning.fields, made)))


class _Planning:
    """What is no tensor: the planner, and the names of what came out."""

    def __init__(self, planner: Planner, packed: bool) -> None:
        self.planner, self.packed = planner, packed
        self.fields: list[str] = []


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(
        planning: _Planning, query: Tensor, key: Tensor, value: Tensor, first: Tensor, after: Tensor
    ) -> tuple[Tensor, ...]:
        docs = Documents(first, after, planning.packed)
        plan = planning.planner(query.detach(), key.detach(), value.detach(), docs)
        made = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
        planning.fields = [name for name, tensor in made.items() if tensor is not None]
        return tuple(made[name] for name in planning.fields)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, planning: _Planning, *tensors: Tensor) -> _Mapped:
        made = _Planned.apply(planning, *_folded(info, in_dims[1:], tensors))
        return _unfolded(info, made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * 6


class _Job(NamedTuple):
    """What is no tensor: the kernel, the choices, and the names of the plan's tensors."""

    kernel: Kernel
    choices: Choices
    fields: tuple[str, ...]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(job: _Job, query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> Tensor:
        query, key, value = query.detach(), key.detach(), value.detach()
        plan = Plan(**dict(zip(job.fields, others)))
        if query.dtype == torch.float64:
            return Pass(query, key, value, plan, job.choices).forward()
        return job.kernel(query, key, value, plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.job = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def vmap(
        info: Any, in_dims: _Dims, job: _Job, *tensors: Tensor | None
    ) -> tuple[Tensor | None, int | None]:
        if job.choices.score_mod is not None:
            # It would be told the batch of all samples, and its gradients would be their sum.
            raise NotImplementedError(
                "score_mod: expected None under torch.vmap on CPU, got "
                f"{type(job.choices.score_mod).__name__}"
            )
        out = _Attend.apply(job, *_folded(info, in_dims[1:], tensors))
        (mapped,), (dim,) = _unfolded(info, [out])
        return mapped, dim

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Backward.apply(ctx.job, grad, *ctx.saved_tensors)


class _Backward(torch.autograd.Function):
    """The gradients of `_Attend`: a function of its own, whose tensors `torch.func` unwraps."""

    @staticmethod
    def forward(
        job: _Job, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Tensor
    ) -> tuple[Tensor | None, ...]:
        plan = Plan(**dict(zip(job.fields, others)))
        # An autocast around the call would turn the products into bfloat16.
        with torch.autocast("cpu", enabled=False):
            work = Pass(query, key, value, plan, job.choices)
            grads = work.backward(grad, others[len(job.fields) :])
        return *grads[:3], *[None] * len(job.fields), *grads[3:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, job: _Job, *tensors: Tensor | None) -> _Mapped:
        return _unfolded(info, _Backward.apply(job, *_folded(info, in_dims[1:], tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            "dga_attention: on CPU its gradient has no gradient; expected create_graph=False"
        )


def _folded(info: Any, dims: _Dims, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors (B, ...) and the dimension that is mapped over, as one batch (N·B, ...)."""
    made: list[Tensor | None] = []
    for tensor, dim in zip(tensors, dims):
        if tensor is None:
            made.append(None)
        elif dim is None:  # a copy: a stride of 0 would be compiled anew
            made.append(tensor.repeat(info.batch_size, *[1] * (tensor.dim() - 1)))
        else:
            made.append(tensor.movedim(dim, 0).flatten(0, 1))
    return made


def _unfolded(info: Any, tensors: Sequence[Tensor | None]) -> _Mapped:
    """(N·B, ...) as (N, B, ...), and that the first dimension is the one that is mapped over."""
    made = tuple(t if t is None else t.unflatten(0, (info.batch_size, -1)) for t in tensors)
    return made, tuple(None if t is None else 0 for t in made)
