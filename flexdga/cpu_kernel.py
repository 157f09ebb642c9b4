"""Two repairs to flex_attention's CPU kernel, for the versions of torch where they were verified.

1. Speed. Inductor generates the kernel's q·kᵀ with a register block of 1×16, which leaves most
   of the machine idle; with 8×32 the same kernel is about 1.5 times as fast.
   (`CppFlexAttentionTemplate.micro_gemm_define`, `GemmBlocking(1, 16, 1)`.)
2. Correctness. The template renames the symbols of its tile sizes by replacing text: `ks2` also
   inside `ks22`, so that a graph with dynamic shapes may not compile
   (`CppFlexAttentionTemplate.modification`).

Both act only while Inductor lowers a call that carries flexdga's mark in its `kernel_options`;
everybody else's kernels stay as they are. FLEXDGA_STOCK_CPU_KERNEL=1 switches them off.
"""

from __future__ import annotations

import logging
import os
from typing import Any
from unittest.mock import patch

import torch

VERIFIED = ("2.13.",)
"""Versions of torch on which the repairs were tested."""
REGISTER_BLOCK = (8, 32)
"""Rows and columns; 6×48 gave wrong results at lengths it does not divide."""
_MARK = "FLEXDGA_REGISTER_BLOCK"

_log = logging.getLogger("flexdga")


def mark() -> dict[str, Any]:
    """Kernel options that ask for the repaired kernel, or none where it is not to be had.

    The mark is part of the graph, so that Inductor's caches tell repaired kernels from others.
    """
    return {_MARK: REGISTER_BLOCK} if _available() else {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _available() -> bool:
    """Install the repairs on first use; a compiler that traces this runs it."""
    if os.environ.get("FLEXDGA_STOCK_CPU_KERNEL", "0") not in ("", "0"):
        return False
    if not torch.__version__.startswith(VERIFIED):
        if "unverified" not in _said:
            _said.add("unverified")
            _log.warning(
                "flexdga: torch %s is not among the verified versions (%s…): the stock CPU kernel "
                "of flex_attention runs, which is slower",
                torch.__version__,
                ", ".join(VERIFIED),
            )
        return False
    _install()
    return True


_said: set[str] = set()


def _install() -> None:
    if "installed" in _said:
        return
    import torch._inductor.lowering  # noqa: F401, I001  (before the next: they import each other)
    from torch._inductor.codegen import cpp, cpp_flex_attention_template as template
    from torch._inductor.kernel.flex import flex_attention

    lowering: Any = flex_attention
    flex: Any = template.CppFlexAttentionTemplate
    stock_lower, stock_init = lowering.lower_cpu, flex.__init__
    stock_modification, stock_micro_gemm = flex.modification, flex.micro_gemm_define
    stock_blocking = vars(template)["GemmBlocking"]
    marked = False

    def lower_cpu(*args: Any) -> Any:
        nonlocal marked
        marked = _MARK in args[6]  # the kernel options
        try:
            return stock_lower(*args)
        finally:
            marked = False

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        self.flexdga = marked  # the source is rendered again later, when lower_cpu has returned

    def modification(self: Any, *args: Any) -> Any:
        class KernelGroup(cpp.KernelGroup):
            """Knows the tile sizes by their final names before it invents any."""

            def __init__(group) -> None:  # noqa: N805  (self is the template)
                super().__init__()
                names = ("cur_qSplitSize", "cur_kvSplitSize")
                group.args.sizevars.update(zip(self.block_vars, names))

        with patch.object(cpp, "KernelGroup", KernelGroup if self.flexdga else cpp.KernelGroup):
            return stock_modification(self, *args)

    def micro_gemm_define(self: Any, kernel_name: str) -> Any:
        def blocking(*stock: int) -> Any:
            rows, columns = REGISTER_BLOCK if self.flexdga else stock[:2]
            return stock_blocking(rows, columns, stock[2])

        with patch.object(template, "GemmBlocking", blocking):
            return stock_micro_gemm(self, kernel_name)

    lowering.lower_cpu = lower_cpu
    flex.__init__, flex.modification = init, modification
    flex.micro_gemm_define = micro_gemm_define
    _said.add("installed")
    _log.info("flexdga: CPU kernels use a register block of %d×%d", *REGISTER_BLOCK)
