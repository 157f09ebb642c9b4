"""`dga_attention` and `make_plan`: planner → plan → slots → block mask → kernel, as one graph."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdga.block_mask import kinds_of_blocks, listed
from flexdga.by_blocks import Choices
from flexdga.checks import check_inputs, check_plan
from flexdga.config import DGAConfig, as_constant
from flexdga.cost_model import dense_below
from flexdga.cpu_backward import attend_on_cpu, plan_alone, stands_apart, wants_gradient
from flexdga.cpu_kernel import ask_for_instructions
from flexdga.estimates import near_log_scores
from flexdga.folding import by_kv_head, in_parts
from flexdga.indexing import filled
from flexdga.kernel import attend, attend_slots
from flexdga.opening import openings
from flexdga.plan import NEVER, Documents, Plan
from flexdga.planner import dense_plan, documents, plan_attention
from flexdga.saying import first_time
from flexdga.spelling import spell
from flexdga.stretches import open_table, prepared
from score_mods import ScoreMod, needs_null_slot

DEFAULT = DGAConfig()
"""Made here, for a compiler cannot make one."""
LEAK = (
    "flexdga: training with scope='prompt', in which later tokens help to decide what earlier ones "
    "see: a language model can learn from that leak what it will not have when it generates. "
    "DGAConfig(scope='causal') has none."
)
RECOMPILE_LIMIT = 64
"""Compiled variants kept for planning and for attending: one per config, dtype and head layout."""


@overload
def dga_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: DGAConfig | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    score_mod: ScoreMod | None = ...,
    document_ids: Tensor | None = ...,
    lengths: Tensor | None = ...,
    plan: Plan | None = ...,
    return_plan: Literal[False] = ...,
    kernel_options: dict[str, Any] | None = ...,
) -> Tensor: ...
@overload
def dga_attention(
    query: Tensor, key: Tensor, value: Tensor, *, config: DGAConfig | None = ...,
    is_causal: bool = ..., scale: float | None = ..., score_mod: ScoreMod | None = ...,
    document_ids: Tensor | None = ..., lengths: Tensor | None = ..., plan: Plan | None = ...,
    return_plan: Literal[True], kernel_options: dict[str, Any] | None = ...,
) -> tuple[Tensor, Plan]: ...  # fmt: skip
def dga_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: DGAConfig | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    document_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    plan: Plan | None = None,
    return_plan: bool = False,
    kernel_options: dict[str, Any] | None = None,
) -> Tensor | tuple[Tensor, Plan]:
    """Dynamic Group Attention over a whole sequence: SDPA's arguments, fewer keys.

    Compiles itself on first use, once for all batches, lengths and head counts of one ratio; inside
    somebody else's `torch.compile` it becomes part of their graph, and in `torch.export` one node
    of it, `torch.ops.flexdga.attention` (see `flexdga.lower`), unless a score_mod, a plan or kernel
    options come with it. Sequences shorter than `config.dense_below` take exact dense attention:
    by default those over which DGA is expected to be slower. Grouped-query attention is recognised
    by the head counts.

    Gradients flow to query, key and value, through focal copies and groups (their weights and
    their bias too), and to floating-point tensors that the score mod captures. What is chosen is
    discrete and has none. Where gradients are wanted, a config of `prompt` scope that lets later
    tokens decide what earlier ones see warns, once. On CPU gradients are flexdga's own
    (`cpu_backward.py`): a `torch.compile` around them breaks its graph there, and gradients of
    gradients raise; what `torch.vmap` maps over joins the batch. Under autocast the tensors are
    cast as SDPA casts them.

    Args:
        query: (B, H, L, D) float32, bfloat16 or float16, on CPU also float64 (slower, for checks
            of gradients); rotated already if the model rotates.
        key: (B, Hkv, L, D), Hkv divides H.
        value: (B, Hkv, L, Dv).
        config: the choices; None = `DGAConfig()`.
        is_causal: False lets every query see its whole document (`prompt` scope only).
        scale: of the scores; None = 1/√D.
        score_mod: a FlexAttention score_mod, written for token positions: flexdga hands it the
            position of the slot in place of kv_idx, and where a group stands for several tokens
            their mean position.
        document_ids: (B, L) integers, equal within a document and never decreasing; negative for
            padding, on whichever side. Tokens see their own document only; padding gives 0.
        lengths: (B,) integers, real tokens of each right-padded row; instead of `document_ids`.
        plan: use this plan and do not make one; its documents and causality hold, so neither
            `document_ids`, `lengths` nor `is_causal=False` may come with it.
        return_plan: also return the plan.
        kernel_options: passed to flex_attention.

    Returns:
        (B, H, L, Dv) in the dtype of the query, or a tuple of it and the `Plan`.

    Raises:
        ValueError: shapes, devices, documents or arguments do not fit together.
        TypeError: an argument is of the wrong type or dtype.
        NotImplementedError: on CPU, the score mod depends on a tensor that requires a gradient
            and cannot be found in it, or it comes under `torch.vmap`.
    """
    given, config = config or DEFAULT, _checked(config)
    query, key, value = _as_autocast(query, key, value)
    check_inputs(query, key, value, config, is_causal, scale, score_mod, document_ids, lengths)
    if plan is not None:
        check_plan(plan, query, key, config, is_causal, document_ids, lengths)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    bare = score_mod is None and plan is None and not return_plan and not kernel_options
    if bare and torch.compiler.is_exporting():
        node: Tensor = torch.ops.flexdga.attention(
            query, key, value, document_ids, lengths, spell(given), is_causal, scale
        )
        return node
    batch, _, length, _ = query.shape
    short = plan is None and length < dense_below(given, query, key)
    dense = plan is None and (short or config.prefill == "dense")
    exact = dense and score_mod is None and not return_plan
    if exact and document_ids is None and lengths is None:
        return dense_attention(query, key, value, None, is_causal, scale)
    docs = documents(document_ids, lengths, (batch, length), query.device)
    if exact:
        return dense_attention(query, key, value, docs, is_causal, scale)
    leaks = plan is None and not dense and is_causal and config.looks_ahead
    if leaks and wants_gradient(None, query, key, value):
        _warn_of_leak()
    inputs = (*_in_steps(query, key, value, docs, config), plan)

    def planned(
        query: Tensor, key: Tensor, value: Tensor, docs: Documents, plan: Plan | None
    ) -> tuple[Tensor, Plan]:
        if dense:
            plan = dense_plan(docs, key.shape[1], is_causal=is_causal)
        elif plan is None:
            plan = _plan(query, key, value, docs, config, is_causal, scale)
        return _attend(query, key, value, plan, config, scale, score_mod, kernel_options), plan

    with _without_autocast(query.device.type):
        if torch.compiler.is_compiling() or score_mod is not None:  # it asks for the head
            out, plan = planned(*inputs)
        elif return_plan or stands_apart(None, query, key, value):
            out, plan = by_kv_head(planned, *inputs)
        else:
            table = inputs[0].shape[2] ** 2 // math.prod(config.block_size)
            out = in_parts(lambda *rows: planned(*rows)[0], *inputs, table=table)
    out = out[:, :, :length]
    if not return_plan:
        return out
    assert plan is not None
    return out, plan


def make_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: DGAConfig | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Plan:
    """The plan that `dga_attention` would use, alone. Arguments and errors as there.

    `config.dense_below` plays no part: a short sequence is planned like a long one.
    """
    config = _checked(config)
    check_inputs(query, key, value, config, is_causal, scale, None, document_ids, lengths)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    docs = documents(document_ids, lengths, (query.shape[0], query.shape[2]), query.device)
    inputs = (*_in_steps(query, key, value, docs, config), None)

    def planned(query: Tensor, key: Tensor, value: Tensor, docs: Documents, _: object) -> Plan:
        return _plan(query, key, value, docs, config, is_causal, scale)

    return planned(*inputs) if torch.compiler.is_compiling() else by_kv_head(planned, *inputs)


def _checked(config: DGAConfig | None) -> DGAConfig:
    if config is None:
        config = DEFAULT
    elif not isinstance(config, DGAConfig):
        raise TypeError(f"config: expected a DGAConfig, got {type(config).__name__}")
    return as_constant(config) if torch.compiler.is_compiling() else config


def _in_steps(
    query: Tensor, key: Tensor, value: Tensor, docs: Documents, config: DGAConfig
) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """Everything padded to whole steps of the plan."""
    length, step = query.shape[2], config.step
    # Not `-length % step`: of that a compiler does not see that one step at least is filled.
    fill = (length + step - 1) // step * step - length
    if torch.compiler.is_compiling():
        # Never by nothing: whether there is something is what it would compile once more for.
        fill = (length // step + 1) * step - length
    elif length <= step:
        fill += step  # two steps at least: our own compilations would specialise on one

    def padded(x: Tensor, dim: int, value: int = 0) -> Tensor:
        if not torch.compiler.is_compiling() and fill == 0:
            return x.contiguous()  # as `cat` below: other strides would be compiled anew
        return filled(x, dim, fill, value)

    docs = Documents(padded(docs.first, 1, NEVER), padded(docs.after, 1), docs.packed)
    return padded(query, 2), padded(key, 2), padded(value, 2), docs


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    config: DGAConfig,
    scale: float,
    score_mod: ScoreMod | None,
    kernel_options: dict[str, Any] | None,
) -> Tensor:
    """Attention to the slots of a plan, by the kernel; on CPU with gradients of our own."""
    choices = Choices(
        config.group_weights, config.group_bias == "mass", config.block_size, scale, score_mod
    )
    kernel = functools.partial(
        run_kernel, attend, **choices._asdict(), kernel_options=kernel_options
    )
    if query.device.type != "cpu":
        return kernel(query, key, value, plan)
    if query.dtype == torch.float64 or stands_apart(score_mod, query, key, value):
        return attend_on_cpu(kernel, query, key, value, plan, choices)
    with torch.no_grad():  # one compilation, whoever calls; the kernel refuses what wants gradients
        return kernel(query.detach(), key.detach(), value.detach(), plan)


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents,
    config: DGAConfig,
    is_causal: bool,
    scale: float,
) -> Plan:
    def planner(query: Tensor, key: Tensor, value: Tensor, docs: Documents) -> Plan:
        # Sinks and a window are a dozen small tensors: on CPU not worth a compilation's seconds.
        small = config.only_sinks and query.device.type == "cpu"
        make = plan_attention if small else functools.partial(_run, plan_attention)
        plan = make(query, key, value, docs, config=config, is_causal=is_causal, scale=scale)
        if not config.opens:
            return plan
        table = open_table(
            query, key, docs, config=config, is_causal=is_causal, scale=scale, run=_run,
            alone=torch.compiler.is_exporting(),
        )  # fmt: skip
        return dataclasses.replace(plan, open=table)

    # Which tokens are chosen is discrete. Detached, so that training shares the compilation.
    eager = not torch.compiler.is_compiling()
    if eager and query.device.type == "cpu" and stands_apart(None, query, key, value):
        return plan_alone(planner, query, key, value, docs)
    with torch.no_grad():
        return planner(query.detach(), key.detach(), value.detach(), docs)


_compile: Any = torch.compile  # its annotations lag behind its arguments
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _compile(
        function,
        fullgraph=True,
        dynamic=False,  # but for the dimensions that `_run` marks
        isolate_recompiles=True,
        recompile_limit=RECOMPILE_LIMIT,
    )
    for function in (
        plan_attention,
        near_log_scores,
        openings,
        prepared,
        kinds_of_blocks,
        attend,
        attend_slots,
    )
}


def run_kernel(
    function: Callable[..., Tensor],
    *args: Any,
    block_size: tuple[int, int],
    score_mod: ScoreMod | None,
    **kwargs: Any,
) -> Tensor:
    """`_run` of `attend` or `attend_slots`; on CPU the tables of blocks are listed before."""
    query, plan = args[0], args[-1]
    eager = not torch.compiler.is_compiling()
    if eager and query.device.type == "cpu" and not needs_null_slot(score_mod):
        kwargs["tables"] = listed(_run(kinds_of_blocks, query, plan, block_size=block_size))
    out: Tensor = _run(function, *args, block_size=block_size, score_mod=score_mod, **kwargs)
    return out


def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a part of the way compiled; inside somebody else's compile, as part of their graph.

    Planning and attending are compiled apart: kernels are compiled once for all planners, and
    what depends on a table's size reads one symbol.
    """
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    if args[0].device.type == "cpu":
        ask_for_instructions()
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, _mark_dynamic, (args, kwargs))
    by_unit = [plan.open for plan in args if isinstance(plan, Plan)] + [kwargs.get("far")]
    by_unit += [kwargs["columns"].may_coarse] if kwargs.get("columns") else []
    for table in by_unit:
        if table is not None:
            torch._dynamo.maybe_mark_dynamic(table, 3)  # the units too grow with the length
    return _compiled[function](*args, **kwargs)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Exact attention by SDPA."""
    # Numbers: compilers take heads for symbols too, but no symbolic bool for `enable_gqa`.
    gqa = operator.index(query.shape[1]) != operator.index(key.shape[1])
    if docs is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=gqa
        )
    index = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
    first, after = docs.first[:, None], docs.after[:, None]
    start = torch.maximum(index, first) if is_causal else first
    mask = (start <= index[:, None]) & (index[:, None] < after)
    # A row of padding sees itself, so that no backend has to divide by nothing; then it is zeroed.
    mask = mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:, None], scale=scale, enable_gqa=gqa
    )
    return out.masked_fill((docs.after == 0)[:, None, :, None], 0)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as SDPA takes them under autocast; what is wrong with them is said later."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _without_autocast(device: str) -> AbstractContextManager[object]:
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_of_leak() -> None:
    """Say once that training sees the future; a compiler that traces this runs it."""
    if first_time(LEAK):
        warnings.warn(LEAK, stacklevel=3)


def _mark_dynamic(tensor: Tensor) -> Tensor:
    """A view to compile for: batch and length vary from call to call, heads and head_dim do not.

    The mark stays on the view, so that the caller's own compilations do not see it.
    """
    view = tensor.view_as(tensor)
    for dim in {1: (0,), 2: (0, 1)}.get(tensor.dim(), (0, 2)):
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(view, dim)
    return view
