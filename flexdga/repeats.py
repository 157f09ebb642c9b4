"""Layers that repeat themselves in a program are traced and compiled once, and called.

`folded` cuts a graph where modules of a list begin and end, and where tensors of the caller's are
changed in place, and puts a call in place of each piece that occurs more than once. To the compiler
a call is one operator without insides (`REGION`), until its own tracing is done; then `unfolding`
makes it an `invoke_subgraph`, whose subgraph Inductor lowers once. What AOTInductor (torch 2.13)
lacks, C++ of such a call, is here: a lambda beside the first.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, ir
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import EnterSubgraphLine, ExitSubgraphLine
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LEAST = 3
"""Pieces that occur less often stay where they are."""
INVOKE = torch.ops.higher_order.invoke_subgraph
_CHECK = torch.ops.aten._assert_tensor_metadata.default
_ASSERT = torch.ops.aten._assert_scalar.default

Known = dict[str, "_Piece"]


@torch.library.custom_op("flexdga::region", mutates_args=())
def region(tensors: Sequence[Tensor], sizes: Sequence[int], name: str) -> list[Tensor]:
    """A call of a piece of a graph, inside `unfolding` alone."""
    return _active[-1][name].graph(*tensors, *sizes)  # type: ignore[no-any-return]


REGION = torch.ops.flexdga.region.default
_active: list[Known] = []


@region.register_fake
def _outputs(tensors: Sequence[Tensor], sizes: Sequence[int], name: str) -> list[Tensor]:
    return _active[-1][name].like(tensors, sizes)


# Cutting


def folded(graph: fx.GraphModule) -> tuple[fx.GraphModule, Known]:
    """The graph with calls in place of pieces that repeat, and those by name.

    Args:
        graph: of an exported program: its nodes know their modules, its parameters are attributes.
            It loses its checks of dtypes, which hold once it is compiled.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_CHECK):
        graph.graph.erase_node(node)
    try:
        cut = _Cut(graph)
    except _Uncut:
        return graph, {}
    pieces: dict[tuple[str, int], _Piece] = {}
    for node in cut.module:
        place = cut.module[node], cut.stage[node]
        pieces.setdefault(place, _Piece(graph)).nodes.append(node)
    for piece in pieces.values():
        piece.close()
    count = Counter(piece.name for piece in pieces.values())
    called = {x: p for p in pieces.values() if p.name and count[p.name] >= LEAST for x in p.nodes}
    if not called:
        return graph, {}
    known = {piece.name: piece for piece in reversed(called.values())}
    return _calling(graph, cut, called), known


class _Uncut(Exception):
    """A graph that is left as it is."""


class _Cut:
    """Where the nodes of a graph belong.

    What changes a tensor in place is outside of all pieces. A stage is a number that grows along
    the data: nodes outside come before the pieces of their stage.

    Attributes:
        module: of nodes in pieces, the module of a list that they are of.
        stage: of all.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.module: dict[fx.Node, str] = {}
        self.stage: dict[fx.Node, int] = {}
        self.seen: dict[fx.Node, tuple[fx.Node, int]] = {}  # of what tensor, and of which version
        self.version: Counter[fx.Node] = Counter()
        readers: dict[fx.Node, list[fx.Node]] = {}
        present, base, last = "", 0, 0
        for node in graph.graph.nodes:
            self.stage[node] = 0
            if node.op != "call_function":
                self.seen[node] = node, 0
                if node.op == "output":
                    self._check_versions(node)
                continue
            self._check_versions(node)
            module, changes, inputs = _repeated(node), _changes(node), node.all_input_nodes
            if changes:
                module = ""
            elif not isinstance(node.meta.get("val"), Tensor):
                module = module if any(x in self.module for x in inputs) else ""
            if module and module != present:
                present, base = module, last + 1
            stage = base if module else 0
            for x in inputs:
                stage = max(stage, self.stage[x] + (self.module.get(x, module) != module))
            if changes:
                root = self._changed(node)
                for x in readers.pop(root, []):
                    stage = max(stage, self.stage[x] + (x in self.module))
            if module:
                self.module[node] = module
            for x in inputs:
                if x in self.seen:
                    readers.setdefault(self.seen[x][0], []).append(node)
            first = next(iter(inputs), None)
            if not changes and first in self.seen and _is_view(node):
                self.seen[node] = self.seen[first]
            self.stage[node] = stage
            last = max(last, stage)
        self._settle()

    def _check_versions(self, node: fx.Node) -> None:
        """Nobody reads a tensor under the name that it had before it was changed."""
        for x in node.all_input_nodes:
            root, version = self.seen.get(x, (x, 0))
            if self.version[root] != version:
                raise _Uncut

    def _changed(self, node: fx.Node) -> fx.Node:
        """The tensor that a node changes in place, which it is the next version of."""
        target = node.args[0]
        if not isinstance(target, fx.Node) or target not in self.seen or _is_view(target):
            raise _Uncut
        root = self.seen[target][0]
        self.version[root] += 1
        self.seen[node] = root, self.version[root]
        return root

    def _settle(self) -> None:
        """Nodes go on to where they are used, where that saves handing something over.

        Those are views, and what depends on nothing of its module. Views that several pieces use
        are outside: no result of a piece is another name of something.
        """
        free: set[fx.Node] = set()
        for node in self.module:
            for x in node.all_input_nodes:
                root = self.seen.get(x, (x, 0))[0]
                shared = len({self.module[y] for y in x.users if y in self.module}) > 1
                if x in self.module:
                    if x not in free:
                        break
                elif self.version[root] or not shared:
                    break
            else:
                free.add(node)
        for node, module in reversed(list(self.module.items())):
            if node.users and (node in free or _is_view(node)):
                users = {(self.module.get(x), self.stage[x]) for x in node.users}
                if all(at == module for at, _ in users) and (node in free or len(users) == 1):
                    self.stage[node] = min(stage for _, stage in users)
                elif _is_view(node) and (module, self.stage[node]) not in users:
                    del self.module[node]
                    self.stage[node] += 1


def _repeated(node: fx.Node) -> str:
    """The outermost module of a list that a node is of; "" for none."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    found = re.match(r"(.*?\.\d+)(\.|$)", path)
    return found[1] if found else ""


def _changes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return any(x.alias_info is not None for x in schema.returns)


class _Piece:
    """A part of a graph that can be called: from tensors, then sizes, to a list of tensors.

    Attributes:
        nodes: its own.
        name: shared by all that do the same; "" for what cannot be called.
    """

    def __init__(self, owner: fx.GraphModule) -> None:
        self.owner = owner
        self.nodes: list[fx.Node] = []
        self.tensors: list[fx.Node] = []
        self.sizes: list[fx.Node] = []
        self.outputs: list[fx.Node] = []
        self.name = ""
        self._made: dict[str, list[Tensor]] = {}

    def close(self) -> None:
        """Find arguments, results and name."""
        mine, index, lines = set(self.nodes), {}, []
        for node in self.nodes:
            for x in node.all_input_nodes:
                if x not in mine and x not in index:
                    value = _value(x, self.owner)
                    if isinstance(value, fx.GraphModule):
                        index[x] = _Name(hashlib.sha256(value.code.encode()).hexdigest())
                    elif isinstance(value, (torch.SymInt, int)):
                        self.sizes.append(x)
                        index[x] = _Name(f"size{len(self.sizes)}")
                    elif isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value):
                        self.tensors.append(x)
                        index[x] = _Name(f"tensor{len(self.tensors)}")
                    else:
                        return
            given = node.args[:1] if node.target is _ASSERT else node.args  # the rest is its text
            args = fx.map_arg((given, node.kwargs), index.__getitem__)
            index[node] = _Name(f"x{len(lines)}")
            lines.append(f"{node.target} {args}")
        self.outputs = [x for x in self.nodes if any(user not in mine for user in x.users)]
        single = all(isinstance(x.meta.get("val"), Tensor) for x in self.outputs)
        if single and self.tensors and self.outputs:
            lines += [_look(_value(x, self.owner)) for x in (*self.tensors, *self.sizes)]
            lines += [index[x] for x in self.outputs]
            self.name = "region_" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @functools.cached_property
    def graph(self) -> fx.GraphModule:
        """The piece by itself."""
        graph, root = fx.Graph(), {}
        known = {x: graph.placeholder(x.name) for x in (*self.tensors, *self.sizes)}
        for node in self.nodes:
            for x in node.all_input_nodes:
                if x not in known:
                    root[str(x.target)] = _value(x, self.owner)
                    known[x] = graph.get_attr(str(x.target))
            known[node] = graph.node_copy(node, known.__getitem__)
        graph.output([known[x] for x in self.outputs])
        return fx.GraphModule(root, graph)

    def like(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Tensors as it returns, for such arguments."""
        key = str([_look(x) for x in (*tensors, *sizes)])
        if key not in self._made:
            env: Any = detect_fake_mode(tensors).shape_env
            with env.ignore_fresh_unbacked_symbols(), torch.no_grad():
                self._made[key] = self.graph(*tensors, *sizes)
        return [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            for x in self._made[key]
        ]

    def traced(self, arguments: Sequence[Any], more: Mapping[Any, Any]) -> fx.GraphModule:
        """The piece in operators that Inductor knows."""
        table = {**select_decomp_table(), **more}
        with detect_fake_mode(arguments), torch.no_grad():
            graph = make_fx(self.graph, table, _allow_non_fake_inputs=True)(*arguments)
        _separate(graph.graph)
        graph.graph.eliminate_dead_code()
        compile_fx.view_to_reshape(graph)
        graph = compile_fx._recursive_joint_graph_passes(graph)
        output = graph.graph.output_node()
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=True)
        return graph


def _separate(graph: fx.Graph) -> None:
    """Results are copied that are other names of arguments or of other results."""
    output, roots, results = graph.output_node(), set(graph.find_nodes(op="placeholder")), []
    for x in output.args[0]:
        root = x
        while _is_view(root):
            root = root.args[0]
        if root in roots:
            with graph.inserting_before(output):
                copied = graph.call_function(torch.ops.aten.clone.default, (x,))
            copied.meta, x = {"val": x.meta["val"]}, copied
        roots.add(root)
        results.append(x)
    output.args = (results,)


class _Name(str):
    """Written without quotes."""

    __repr__ = str.__str__


def _value(node: fx.Node, owner: Any) -> Any:
    if node.op != "get_attr":
        return node.meta.get("val")
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    return owner


def _look(x: Any) -> str:
    """All that tracing depends on."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {x.device} {list(x.shape)} {list(x.stride())}"
    return str(x)


def _calling(
    graph: fx.GraphModule, cut: _Cut, called: Mapping[fx.Node, _Piece]
) -> fx.GraphModule:
    """The graph with calls of pieces in place of their nodes, and all in the order of stages."""
    made, known = fx.Graph(), {}
    nodes = list(graph.graph.nodes)
    free = [x for x in nodes if x.op != "call_function"]
    rest = [x for x in nodes if x.op == "call_function"]
    rest.sort(key=lambda x: (cut.stage[x], x in cut.module))
    for node in [*free[:-1], *rest, free[-1]]:
        piece = called.get(node)
        if piece is None:
            known[node] = made.node_copy(node, known.__getitem__)
        elif node is piece.nodes[0]:
            given = [[known[x] for x in part] for part in (piece.tensors, piece.sizes)]
            call = made.call_function(REGION, (*given, piece.name))
            for i, x in enumerate(piece.outputs):
                known[x] = made.call_function(operator.getitem, (call, i))
    new = fx.GraphModule(graph, made)
    new.meta = dict(graph.meta)
    made._codegen = copy.deepcopy(graph.graph._codegen)
    new.recompile()
    return new


# Calling


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
        # Not before: Inductor runs all subgraphs again and again, while it knows what calls return.
        _unfold(graph.graph, known, table)

    _active.append(known)
    try:
        with (
            patch.dict(select_decomp_table(), table),
            patch.object(compile_fx, "_recursive_post_grad_passes", passes),
            patch.object(CppWrapperCpu, "codegen_invoke_subgraph", _invoke),
        ):
            yield
    finally:
        _active.pop()


def _unfold(graph: fx.Graph, known: Known, table: Mapping[Any, Any]) -> None:
    owner: Any = graph.owning_module
    for node in graph.find_nodes(op="call_function", target=REGION):
        tensors, sizes, name = node.args
        values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (*tensors, *sizes)]
        if not hasattr(owner, name):
            setattr(owner, name, known[name].traced(values, table))
        with graph.inserting_before(node):
            found = graph.get_attr(name)
            call = graph.call_function(INVOKE, (found, name, *tensors, *sizes))
        call.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _invoke(self: Any, call: ir.InvokeSubgraph) -> None:
    """C++ of a call: the subgraph as a lambda, written where it is called first."""
    given = [x.codegen_reference() for x in call.inputs]
    made = [x.get_name() for x in call.outputs]
    for name in made:
        self.writeline(f"RAIIAtenTensorHandle {name};")
    subgraph: Any = call.subgraph
    function = f"call_{subgraph.graph.name}"
    taken = [isinstance(x, ir.TensorBox) for x in subgraph.graph.graph_inputs.values()]
    tensors = [x for x, is_tensor in zip(given, taken) if is_tensor]
    written = vars(self).setdefault("flexdga_written", set())
    if function not in written:
        written.add(function)
        # One array for the arguments, of which sizes are known by their names.
        place = {i: f"given[{sum(taken[:i])}]" for i, is_tensor in enumerate(taken) if is_tensor}
        self.writeline(
            f"auto {function} = [&](std::array<AtenTensorHandle, {len(tensors)}> given, "
            f"std::array<RAIIAtenTensorHandle*, {len(made)}> made) {{"
        )
        self.writeline(EnterSubgraphLine(self, subgraph.graph))
        self.codegen_subgraph(
            subgraph,
            [place.get(i, "") for i in range(len(taken))],
            [f"(*made[{i}])" for i in range(len(made))],
        )
        self.writeline(ExitSubgraphLine(self))
        self.writeline("};")
    self.writeline(
        f"{function}({{{{{', '.join(tensors)}}}}}, {{{{{', '.join('&' + x for x in made)}}}}});"
    )
