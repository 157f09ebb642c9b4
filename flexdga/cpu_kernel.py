"""Repairs to flex_attention's CPU kernel, for the versions of torch where they were verified.

1. Speed. The fp32 kernel multiplies q·kᵀ by generated code that reaches half of what the machine
   can do. Here keys are transposed once, block by block, and ATen's own GEMM (`brgemm`), which the
   template takes for the second product already, takes the first as well.
2. Speed. Without a score mod the template still copies every score through the identity, scales it
   in a pass of its own, and allocates index vectors for each block. Here blocks that are seen whole
   do none of it, and one softmax goes over several key blocks: of each row and block it costs a
   pass over the output, and of 16 keys that was most of its time.
3. Speed. In blocks seen in part the template hands the mask its indices in vectors, so that every
   table is gathered, number by number. Here the mask computes them (`_with_places`).
4. Correctness. The template renames the symbols of its tile sizes by replacing text: `ks2` also
   inside `ks22`, and names the symbols of a table's size anew unless dynamo hands them in, so that
   a graph with dynamic shapes may not compile (`CppFlexAttentionTemplate.modification`).
5. Correctness. The template has buffers for as many threads as there are while it compiles. Where
   an exported program runs there may be more, which wrote beyond them (`OWN_THREADS`).
6. Compile time. Buffers in the source are numbered through the whole graph, so that no two layers
   of a model shared their kernel (`score_buf_idx`, `mask_buf_idx`).
7. Correctness. Inductor fuses what is computed of the output with the kernel, which then refuses.

1, 2 and 5 are edits of the template's text (`cpu_template.py`). All act only while Inductor lowers
a call that carries flexdga's mark in its `kernel_options`; everybody else's kernels stay as they
are. FLEXDGA_STOCK_CPU_KERNEL=1 switches them off. What moved what: bench/NOTES.md.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import threading
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from flexdga import cpu_template
from flexdga.saying import log, warn_once

VERIFIED = ("2.13.",)
"""Versions of torch on which the repairs were tested."""
PLAIN, SCORED = "plain", "scored"
"""The mark of a call whose scores are q·k times a positive scale, and of any other."""
_MARK = "FLEXDGA_CPU_KERNEL"
_SOURCES = (__file__, cpu_template.__file__)
_EDITION = f"-{zlib.crc32(b''.join(Path(name).read_bytes() for name in _SOURCES)):x}"
"""Part of the mark: Inductor's caches on disk do not see the edits, and outlive an update."""


def mark(*, plain: bool) -> dict[str, Any]:
    """Kernel options that ask for the repaired kernel, or none where it is not to be had.

    The mark is part of the graph, so that Inductor's caches tell repaired kernels from others.

    Args:
        plain: whether the scale is positive, so that what is masked may be scaled after it is
            masked, and there is no score mod.
    """
    return {_MARK: (PLAIN if plain else SCORED) + _EDITION} if available() else {}


@functools.cache
def ask_for_instructions() -> None:
    """Have Inductor find out which vector instructions there are, while Dynamo traces.

    It starts a process for each kind and waits: 16 s if they were never compiled for, then 1 to 2.
    """

    def ask() -> None:
        with contextlib.suppress(Exception):  # it will be raised again where the answer is needed
            from torch._inductor.cpu_vec_isa import pick_vec_isa

            pick_vec_isa()

    threading.Thread(target=ask, daemon=True).start()


def switched_off() -> bool:
    """Whether the environment asks for nothing of flexdga's own on CPU."""
    return os.environ.get("FLEXDGA_STOCK_CPU_KERNEL", "0") not in ("", "0")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the repairs are to be had; installs them on first use.

    A compiler that traces this runs it.
    """
    if switched_off():
        return False
    if not torch.__version__.startswith(VERIFIED):
        warn_once(
            f"flexdga: torch {torch.__version__} is not among the verified versions "
            f"({', '.join(VERIFIED)}…): the stock CPU kernel of flex_attention runs, a slower one"
        )
        return False
    _install()
    return True


@functools.cache
def products() -> str:
    """What this CPU multiplies fastest: `tiles` (AMX), `bytes` (AVX-512 VNNI), else `floats`."""
    if _has("_is_amx_tile_supported"):
        return "tiles"
    return "bytes" if _has("_is_vnni_supported") else "floats"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the kernel has fast products of this dtype.

    Of half precision it has those of AMX. Without them it takes twice as long as in float32.
    """
    if not available() or dtype not in _HALVES:
        return True
    return _has(_HALVES[dtype])


_HALVES = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}


def _has(capability: str) -> bool:
    return bool(getattr(torch.cpu, capability, bool)())


@functools.cache
def _install() -> None:
    import torch._inductor.lowering  # noqa: F401, I001  (before the next: they import each other)
    from torch._inductor import config
    from torch._inductor.codegen import cpp, cpp_flex_attention_template as template
    from torch._inductor.kernel.flex import flex_attention

    lowering: Any = flex_attention
    fusion: Any = cpp
    flex: Any = template.CppFlexAttentionTemplate
    stock_lower, stock_init = lowering.lower_cpu, flex.__init__
    stock_modification, stock_choose = flex.modification, flex.choose_flex_template
    stock_text = template.FLEX_ATTENTION_TEMPLATE
    texts = {SCORED: cpu_template.scored(stock_text), PLAIN: cpu_template.plain(stock_text)}
    marked = ""

    def lower_cpu(*args: Any) -> Any:
        nonlocal marked
        marked = args[6].get(_MARK, "").removesuffix(_EDITION)  # of the kernel options
        try:
            return stock_lower(*args)
        finally:
            marked = ""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        self.flexdga = marked  # the source is rendered again later, when lower_cpu has returned
        if marked:  # numbers of buffers of the whole graph: layers would not share their kernel
            self.score_buf_idx, self.mask_buf_idx = 0, 1

    def choose_flex_template(self: Any, *args: Any) -> Any:
        text = stock_choose(self, *args)
        self.flexdga_prefill = self.flexdga and text == stock_text
        if self.flexdga_prefill:
            text = texts[self.flexdga]
        return cpu_template.OWN_THREADS + text if self.flexdga else text

    def modification(self: Any, buffer: Any, name: str, number: int) -> Any:
        places: dict[Any, str] = {}
        if self.flexdga_prefill and name == self.mask_buf_name:
            buffer, places = _with_places(buffer, self)

        class KernelGroup(cpp.KernelGroup):
            """Knows the tile sizes by their final names before it invents any."""

            def __init__(group) -> None:  # noqa: N805  (self is the template)
                super().__init__()
                # The kernel's own names; what `torch.export` traced is not handed in by name.
                sizes = {s for x in self.input_nodes for n in x.get_size() for s in _symbols(n)}
                names = ("cur_qSplitSize", "cur_kvSplitSize")
                group.args.sizevars.update({s: f"k{s}" for s in sizes})
                group.args.sizevars.update(zip(self.block_vars, names))
                group.args.sizevars.update(places)

        with (
            patch.object(cpp, "KernelGroup", KernelGroup if self.flexdga else cpp.KernelGroup),
            config.patch(assert_indirect_indexing=config.assert_indirect_indexing and not places),
        ):
            return stock_modification(self, buffer, name, number)

    stock_fuses = fusion.template_fusion_with_epilogues_supported

    def fuses(node: Any, epilogues: Any) -> tuple[bool, bool]:
        kernel = getattr(node.get_template_node(), "template", None)
        return (False, False) if getattr(kernel, "flexdga", "") else stock_fuses(node, epilogues)

    fusion.template_fusion_with_epilogues_supported = fuses
    lowering.lower_cpu = lower_cpu
    flex.__init__, flex.modification = init, modification
    flex.choose_flex_template = choose_flex_template
    log.info("flexdga: flex_attention's CPU kernel is repaired for flexdga's own calls")


def _with_places(buffer: Any, template: Any) -> tuple[Any, dict[Any, str]]:
    """The mask's buffer with indices where it loaded them, and the symbols that these use.

    An index that is computed turns reads of a table into vector loads, or into one for the whole
    block; what is loaded from a vector of indices is gathered, number by number.
    """
    from torch._inductor.ops_handler import WrapperHandler
    from torch._inductor.utils import sympy_index_symbol_with_prefix
    from torch._inductor.virtualized import V
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.symbol import SymT
    from torch.utils._sympy.value_ranges import ValueRanges

    symbols = [sympy_index_symbol_with_prefix(SymT.UNBACKED_INT, _PLACES + i) for i in range(4)]
    b, h, row, column = symbols
    blocks = (template.q_block_size, template.kv_block_size)
    ranges = V.graph.sizevars.shape_env.var_to_range
    ranges.update({symbol: ValueRanges(0, int_oo) for symbol in symbols})
    ranges.update({v: ValueRanges(2, most) for v, most in zip(template.block_vars, blocks)})
    base = {"b": b, "h": h, "q_idx": row * blocks[0], "kv_idx": column * blocks[1]}

    class Handler(WrapperHandler):
        def load(self, name: str, index: Any) -> Any:
            if name in base:
                return self._inner.index_expr(base[name] + index, torch.int64)
            return self._inner.load(name, index)

    inner = buffer.data.inner_fn

    def inner_fn(index: Any) -> Any:
        with V.set_ops_handler(Handler(V.get_ops_handler())):
            return inner(index)

    placed = copy.copy(buffer)
    placed.data = dataclasses.replace(buffer.data, inner_fn=inner_fn)
    return placed, dict(zip(symbols, ("i", "j", "k", "cur_n")))  # the template's own names


_PLACES = 10**6
"""Number of the first of these symbols: beyond all that a graph has."""


def _symbols(size: Any) -> Any:
    """The symbols of a size, in a fixed order; none of a plain number."""
    return sorted(getattr(size, "free_symbols", ()), key=str)
