"""What Inductor (torch 2.13) is made to do for a package.

It remembers, looks at the package's inputs, and puts strides in order that it does not know.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from torch._inductor import ir, sizevars
from torch._inductor.codegen import cpp
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

CHECK_INPUT = """
auto check_input = [](AtenTensorHandle x, const char* name, int32_t expected) {
    bool contiguous;
    int32_t dtype;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(x, &contiguous));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &dtype));
    AOTI_RUNTIME_CHECK(contiguous, std::string(name) + ": expected a contiguous tensor");
    AOTI_RUNTIME_CHECK(dtype == expected, std::string(name) + ": expected another dtype");
};
"""

GUESS = 8192
"""For what depends on data."""


@contextlib.contextmanager
def long_memory() -> Iterator[None]:
    """Inductor forgets an index after 128 more; the layers of a model repeat them.

    Of 30 layers' prompt and step it asked for 27873 strides, 351 of which differ.
    """
    forgetful = [
        (module, name)
        for name in ("stride_at", "simplify_index_in_vec_range", "stride_at_vec_range")
        for module in (sizevars, cpp)
        if hasattr(getattr(module, name, None), "__wrapped__")
    ]
    before = [getattr(module, name) for module, name in forgetful]
    try:
        for (module, name), short in zip(forgetful, before):
            setattr(module, name, functools.cache(short.__wrapped__))
        yield
    finally:
        for (module, name), short in zip(forgetful, before):
            setattr(module, name, short)


@contextlib.contextmanager
def checked_inputs() -> Iterator[None]:
    """Packages refuse inputs of other strides or dtype, which they would read as their example's.

    AOTInductor's own checks are off unless a variable of the environment says otherwise, and refuse
    contiguous tensors too, of one row that was cut from a longer one.
    """
    stock = CppWrapperCpu.codegen_inputs

    def codegen_inputs(self: Any) -> None:
        if V.graph.aot_mode and not V.graph.is_const_graph:
            self.prefix.splice_aot(CHECK_INPUT)
            for number, (name, x) in enumerate(self.get_graph_inputs().items()):
                if isinstance(x, ir.TensorBox):
                    dtype = f"aoti_torch_dtype_{str(x.get_dtype()).removeprefix('torch.')}()"
                    self.prefix.writeline_aot(f'check_input({name}, "input {number}", {dtype});')
        stock(self)

    with patch.object(CppWrapperCpu, "codegen_inputs", codegen_inputs):
        yield


@contextlib.contextmanager
def ordered_strides() -> Iterator[None]:
    """Strides that depend on data are put in order by a guess at each; Inductor refuses to.

    It asks for the order where a matrix product reads rows of one head, (B, 1, N, D): they are as
    good as channels last. Any order is right.
    """
    stock = ir.FlexibleLayout.same_ordered

    def same_ordered(sizes: Any, stride: Any) -> Any:
        try:
            return stock(sizes, stride)
        except GuardOnDataDependentSymNode:
            guess = V.graph.sizevars.optimization_hint
            return stock(sizes, [guess(x, fallback=GUESS) for x in stride])

    with patch.object(ir.FlexibleLayout, "same_ordered", staticmethod(same_ordered)):
        yield
