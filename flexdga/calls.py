"""What Inductor makes of the calls that `repeats.py` puts into a graph.

When its own tracing is done, a call becomes an `invoke_subgraph`, whose subgraph Inductor lowers
once. What AOTInductor (torch 2.13) lacks, C++ of such a call, is here: a lambda beside the first.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, ir
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import EnterSubgraphLine, ExitSubgraphLine
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering, SubgraphLowering
from torch.fx.experimental.proxy_tensor import make_fx

from flexdga.repeats import REGION, Known, Piece, callable_pieces, is_view, look

INVOKE = torch.ops.higher_order.invoke_subgraph


@contextlib.contextmanager
def unfolding(known: Known, table: Mapping[Any, Any]) -> Iterator[None]:
    """Inductor finds subgraphs behind the calls of pieces.

    Args:
        known: from `folded`.
        table: decompositions of operators that Inductor does not know.
    """
    stock = compile_fx._recursive_post_grad_passes

    def passes(graph: fx.GraphModule, is_inference: bool = False) -> None:
        stock(graph, is_inference)
        # Not before: Inductor would run each subgraph again and again, to know what it returns.
        _unfold(graph, known, table)

    with (
        callable_pieces(known),
        patch.dict(select_decomp_table(), table),
        patch.object(compile_fx, "_recursive_post_grad_passes", passes),
        patch.object(CppWrapperCpu, "codegen_invoke_subgraph", _invoke),
        patch.object(SubgraphLowering, "allocate_non_dup_const_name", _constant),
    ):
        yield


def _unfold(owner: Any, known: Known, table: Mapping[Any, Any]) -> None:
    graph: fx.Graph = owner.graph
    for node in graph.find_nodes(op="call_function", target=REGION):
        tensors, sizes, name = node.args
        values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (*tensors, *sizes)]
        kind = hashlib.sha256(str([look(x) for x in values]).encode()).hexdigest()
        label = f"{name}_{kind[:8]}"
        if not hasattr(owner, label):
            setattr(owner, label, _traced(known[name], values, table))
        with graph.inserting_before(node):
            call = graph.call_function(INVOKE, (graph.get_attr(label), label, *tensors, *sizes))
        call.meta = {"val": node.meta["val"], "eager_input_vals": ((None, None, *values), {})}
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _traced(piece: Piece, arguments: Sequence[Any], table: Mapping[Any, Any]) -> fx.GraphModule:
    """A piece as Inductor lowers graphs: in operators that it knows, and after its passes."""
    every: Any = {**select_decomp_table(), **table}
    mode: Any = detect_fake_mode(arguments)
    with mode, torch.no_grad():
        graph = make_fx(piece.graph, every, _allow_non_fake_inputs=True)(*arguments)
    _separate(graph.graph)
    graph.graph.eliminate_dead_code()
    view_to_reshape(graph)
    graph = compile_fx._recursive_joint_graph_passes(graph)
    graph.graph.output_node().meta["user_visible_output_idxs"] = list(range(len(piece.outputs)))
    compile_fx._recursive_record_original_output_strides(graph)
    compile_fx._recursive_post_grad_passes(graph, is_inference=True)
    return graph


def _separate(graph: fx.Graph) -> None:
    """Results are copied that are other names of arguments or of other results."""
    output: Any = graph.output_node()
    roots, results = set(graph.find_nodes(op="placeholder")), []
    for x in output.args[0]:
        root = x
        while is_view(root):
            root = root.args[0]
        if root in roots:
            with graph.inserting_before(output):
                copied = graph.call_function(torch.ops.aten.clone.default, (x,))
            copied.meta, x = {"val": x.meta["val"]}, copied
        roots.add(root)
        results.append(x)
    output.args = (results,)


def _constant(self: Any, name: str | None, data: torch.Tensor) -> str:
    """A constant that lowering makes is the whole program's: C++ of it names no other."""
    root = self
    while isinstance(root, SubgraphLowering):
        root = root.parent
    made: str = GraphLowering.allocate_non_dup_const_name(root, name, data)
    for table in ("constants", "constant_reprs", "allocated_constant_name"):
        getattr(self, table)[made] = getattr(root, table)[made]
    return made


def _invoke(self: Any, call: Any) -> None:
    """C++ of a call: the subgraph as a lambda, written where it is called first."""
    graph = call.subgraph.graph
    is_tensor = [isinstance(x, ir.TensorBox) for x in graph.graph_inputs.values()]
    given = [x.codegen_reference() for x, good in zip(call.inputs, is_tensor) if good]
    made = [x.get_name() for x in call.outputs]
    for name in made:
        self.writeline(f"RAIIAtenTensorHandle {name};")
    function, written = f"call_{graph.name}", vars(self).setdefault("flexdga_written", set())
    if function not in written:
        written.add(function)
        # Sizes are known by their names.
        inner = [f"given[{sum(is_tensor[:i])}]" for i in range(len(is_tensor))]
        self.writeline(
            f"auto {function} = [&](std::array<AtenTensorHandle, {len(given)}> given, "
            f"std::array<RAIIAtenTensorHandle*, {len(made)}> made) {{"
        )
        self.writeline(EnterSubgraphLine(self, graph))
        self.codegen_subgraph(call.subgraph, inner, [f"(*made[{i}])" for i in range(len(made))])
        self.writeline(ExitSubgraphLine(self))
        self.writeline("};")
    pointers = ", ".join(f"&{name}" for name in made)
    self.writeline(f"{function}({{{{{', '.join(given)}}}}}, {{{{{pointers}}}}});")
