"""From `torch.ops.flexdga.attention` in an exported program to planner and flex_attention.

What torch 2.13 asks for, and what is done about it:

1. A mod that captures tables of symbolic size cannot be traced: the tables are handed to the
   flex_attention operator as its own arguments (`_lift`).
2. Sizes such as L + (-L mod 32) make Inductor's algebra slow: the number of whole steps is read
   back from a tensor, which gives it a symbol of its own (`_Lowering.steps`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask

import flexdga.operator  # noqa: F401  (registers the operator)
from flexdga.attention import dense_attention
from flexdga.block_mask import block_mask
from flexdga.config import DGAConfig
from flexdga.cost_model import dense_below
from flexdga.indexing import filled
from flexdga.kernel import attend
from flexdga.plan import NEVER, Documents, Plan
from flexdga.planner import documents, plan_attention
from flexdga.saying import log
from flexdga.spelling import read
from flexdga.stretches import open_table

OPERATOR = torch.ops.flexdga.attention.default


def lower(program: ExportedProgram) -> ExportedProgram:
    """Turn each `torch.ops.flexdga.attention` into planner and flex_attention.

    AOTInductor, or any other compiler that knows flex_attention, can take the result; it cannot be
    saved by `torch.export.save`, and depends on nothing of flexdga. Layers whose plan depends on
    the documents alone share it.

    With a symbolic length no branch is taken at run time: a layer is dense where all lengths that
    the program allows are below `DGAConfig.dense_below`, and sparse otherwise, also for shorter
    texts. A warning says so; `dense_below=0` asks for it.

    Args:
        program: from `torch.export.export` or `torch.export.load`.

    Returns:
        Another program, without such nodes; the same one if it has none.

    Raises:
        TypeError: `program` is no ExportedProgram.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program: expected an ExportedProgram, got {type(program).__name__}")
    if not any(node.target is OPERATOR for node in program.graph.nodes):
        return program
    return program.run_decompositions(decomposition())


def decomposition() -> dict[Any, Callable[..., Any]]:
    """The operator in others, for one tracing; layers share what they can."""
    return {OPERATOR: _Lowering().attention}


def whole_steps(length: int, step: int, least: int = 1) -> int:
    """How many steps hold a sequence, `least` or more; of a symbolic length a symbol of its own."""
    if isinstance(length, int):
        return max(-(-length // step), least)
    steps: Any = torch.full((), torch.sym_max(-(-length // step), least)).item()
    torch._check(steps >= least)
    torch._check(steps * step - length >= 0)
    found: int = steps
    return found


class _Lowering:
    """One program being lowered: numbers and plans that its layers share."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Any] = {}
        self.warned = False

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        document_ids: Tensor | None,
        lengths: Tensor | None,
        config: str,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        """The operator, in plain functions."""
        chosen = read(config)
        batch, _, length, _ = query.shape
        docs = documents(document_ids, lengths, (batch, length), query.device)
        alone = document_ids is None and lengths is None
        with torch.no_grad():
            if self.is_dense(chosen, query, key):
                out = dense_attention(query, key, value, None if alone else docs, is_causal, scale)
                return out.contiguous()
            step = chosen.step
            fill = self.steps(length, step, at_least=chosen.open_units or 0) * step - length
            docs = Documents(filled(docs.first, 1, fill, NEVER), filled(docs.after, 1, fill, 0),
                             docs.packed)  # fmt: skip
            query, key, value = (filled(x, 2, fill, 0) for x in (query, key, value))
            plan, mask = self.plan(query, key, value, docs, chosen, is_causal, scale, alone)
            with _traceable_flex_attention():
                out = attend(
                    query, key, value, plan,
                    weights=chosen.group_weights, mass=chosen.group_bias == "mass",
                    block_size=chosen.block_size, scale=scale, score_mod=None,
                    kernel_options=None, mask=mask,
                )  # fmt: skip
            return out.narrow(2, 0, length).contiguous()

    def is_dense(self, config: DGAConfig, query: Tensor, key: Tensor) -> bool:
        """Whether exact dense attention takes this place, whatever the length will be."""
        length, below = query.shape[2], dense_below(config, query, key)
        if config.prefill == "dense" or below >= NEVER or statically_known_true(length < below):
            return True
        if not self.warned and not statically_known_true(length >= below):
            self.warned = True
            log.warning(
                "flexdga: a lowered program has no branch for lengths below dense_below=%d: it "
                "takes the sparse path there too, where dga_attention would be dense", below
            )  # fmt: skip
        return False

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        docs: Documents,
        config: DGAConfig,
        is_causal: bool,
        scale: float,
        alone: bool,
    ) -> tuple[Plan, BlockMask]:
        """The plan with whole key blocks of slots, and its mask, shared where they can be."""
        shared = alone and not config.needs_importance and config.grouping == "sequence"
        where = (query.shape[0], query.shape[1], key.shape[1], query.shape[2], query.device)
        place = self.place("plan", *where, dataclasses.replace(config, open_mass=0.0), is_causal)
        found: tuple[Plan, BlockMask | None] | None = self.known.get(place) if shared else None
        if found is None:
            plan = plan_attention(
                query, key, value, docs, config=config, is_causal=is_causal, scale=scale
            )
            plan = _in_whole_blocks(plan, config.block_size[1])
            mask = None if config.opens else block_mask(plan, query.shape[1], config.block_size)
            found = self.known[place] = plan, mask
        plan, mask = found
        if mask is None:
            table = open_table(
                query, key, docs, config=config, is_causal=is_causal, scale=scale, run=_plainly,
                alone=True,
            )  # fmt: skip
            plan = dataclasses.replace(plan, open=table)
            mask = block_mask(plan, query.shape[1], config.block_size)
        return plan, mask

    def steps(self, length: int, step: int, at_least: int) -> int:
        """How many steps hold the sequence, two or more: a number, or a symbol of its own."""
        least = max(at_least, 2)
        if isinstance(length, int):
            return max(-(-length // step), least)
        place = self.place("steps", length, step, least)
        if place not in self.known:
            self.known[place] = whole_steps(length, step, least)
        found: int = self.known[place]
        return found

    def place(self, *what: Any) -> tuple[Any, ...]:
        """A key for `known`: values belong to the trace in which they were made."""
        mode: Any = get_proxy_mode()
        return (id(mode.tracer), *(str(x) for x in what))


def _plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _in_whole_blocks(plan: Plan, block: int) -> Plan:
    """The plan with empty slots more, at least one, up to whole key blocks of slots.

    They are groups, or focal slots where nothing is grouped: then no group has to be computed.
    """
    compressed = plan.num_slots - plan.length
    count = (compressed // block + 1) * block - compressed
    torch._check(count >= 1)
    made = dataclasses.replace(
        plan,
        start=filled(plan.start, 2, count, NEVER),
        end=filled(plan.end, 2, count, 0),
        position=filled(plan.position, 2, count, -1),
    )
    if statically_known_true(plan.members.shape[2] == 0):
        return dataclasses.replace(made, focal=filled(plan.focal, 2, count, -1))
    score = plan.member_score
    made = dataclasses.replace(
        made,
        members=filled(plan.members, 2, count, -1),
        member_score=None if score is None else filled(score, 2, count, 0),
    )
    torch._check(made.members.shape[2] != 0)
    return made


@contextlib.contextmanager
def _traceable_flex_attention() -> Iterator[None]:
    """flex_attention as one operator with all tables among its arguments, not compiled itself."""
    stock: Any = vars(torch_flex)["flex_attention_hop"]

    def flex_attention(
        query: Tensor, key: Tensor, value: Tensor, score_mod: Any, mask: Any, *rest: Any
    ) -> Any:
        score_mod, score_tables = _lift(score_mod)
        mask_mod, mask_tables = _lift(mask[-1])
        mask = (*mask[:-1], mask_mod)
        return stock(query, key, value, score_mod, mask, *rest, score_tables, mask_tables)

    with (
        patch.object(torch_flex, "flex_attention_hop", flex_attention),
        # Its own torch.compile, which it skips so, refuses sizes read from tensors.
        patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
    ):
        yield


def _lift(mod: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A mod whose tables, captured by it or by functions it captures, are arguments after its own.

    Returns:
        The mod and the tables.
    """
    tables: list[Tensor] = []

    def rebuilt(function: Any) -> Callable[[tuple[Tensor, ...]], Any]:
        def cell(content: Any) -> Callable[[tuple[Tensor, ...]], Any]:
            if isinstance(content, Tensor):
                index = len(tables)
                tables.append(content)
                return lambda given: given[index]
            if isinstance(content, types.FunctionType):
                return rebuilt(content)
            return lambda given: content

        cells = [cell(c.cell_contents) for c in function.__closure__ or ()]

        def make(given: tuple[Tensor, ...]) -> Any:
            closure = tuple(types.CellType(c(given)) for c in cells)
            code, scope = function.__code__, function.__globals__
            return types.FunctionType(code, scope, function.__name__, None, closure)

        return make

    make, own = rebuilt(mod), mod.__code__.co_argcount
    return lambda *args: make(args[own:])(*args[:own]), tuple(tables)
