"""Layers that repeat themselves in a program are traced and compiled once, and called.

`folded` cuts a graph where modules of a list begin and end, and where tensors of the caller's are
changed in place, and puts a call in place of each piece that occurs more than once. A layer that
stores its keys before it attends becomes

    call of the piece before -> write, outside of pieces -> call of the piece after

and so do all layers like it, of the same two pieces. To a compiler a call is one operator without
insides (`REGION`) until its own tracing is done: see `calls.py`.
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

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LEAST = 2
"""Pieces that occur less often stay where they are."""
_CHECK = torch.ops.aten._assert_tensor_metadata.default
_ASSERT = torch.ops.aten._assert_scalar.default

Known = dict[str, "Piece"]


@torch.library.custom_op("flexdga::region", mutates_args=())
def region(tensors: Sequence[Tensor], sizes: Sequence[int], name: str) -> list[Tensor]:
    """A call of a piece of a graph, inside `callable_pieces` alone."""
    made: list[Tensor] = _active[-1][name].graph(*tensors, *sizes)
    return made


REGION = torch.ops.flexdga.region.default
_active: list[Known] = []


@region.register_fake
def _like(tensors: Sequence[Tensor], sizes: Sequence[int], name: str) -> list[Tensor]:
    return _active[-1][name].like(tensors, sizes)


@contextlib.contextmanager
def callable_pieces(known: Known) -> Iterator[None]:
    """Calls in a graph find these pieces."""
    _active.append(known)
    try:
        yield
    finally:
        _active.pop()


# Cutting


def folded(graph: fx.GraphModule) -> tuple[fx.GraphModule, Known]:
    """The graph with calls in place of pieces that repeat, and those by name.

    Args:
        graph: of an exported program: its nodes know their modules, its parameters are attributes.
            It loses its checks of dtypes, which hold once it is compiled.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_CHECK):
        graph.graph.erase_node(node)
    every = [_value(x, graph) for x in graph.graph.nodes]
    if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in every):
        return graph, {}  # not tried
    try:
        cut = _Cut(graph)
    except _UncutError:
        return graph, {}
    pieces: dict[tuple[str, int], Piece] = {}
    for node in cut.module:
        place = cut.module[node], cut.stage[node]
        pieces.setdefault(place, Piece(graph)).nodes.append(node)
    for piece in pieces.values():
        piece.close()
    count = Counter(piece.name for piece in pieces.values())
    called = {x: p for p in pieces.values() if p.name and count[p.name] >= LEAST for x in p.nodes}
    if not called:
        return graph, {}
    known = {piece.name: piece for piece in reversed(called.values())}
    return _calling(graph, cut, called), known


class _UncutError(Exception):
    """A graph that is left as it is."""


class _Cut:
    """Where the nodes of a graph belong.

    What changes a tensor in place is outside of all pieces. Nodes are put in order again by their
    stages, and in a stage those outside come before its pieces. So a stage is no less than those of
    a node's inputs, and one more

    - than that of an input in a piece of another module, or in any if the node is outside,
    - than that of a piece that reads what the node then changes,
    - than all before, where a module begins.

    Nodes of one module and one stage are a piece.

    Attributes:
        module: of nodes in pieces, the module of a list that they are of.
        stage: of all.
        seen: of nodes that are, or may be, a tensor of the caller's: which, after how many changes.
        version: how often each of these tensors was changed so far.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.module: dict[fx.Node, str] = {}
        self.stage: dict[fx.Node, int] = {}
        self.seen: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.version: Counter[fx.Node] = Counter()
        readers: dict[fx.Node, list[fx.Node]] = {}
        stored = _stored(graph.graph)
        present, base, last = "", 0, 0
        for node in graph.graph.nodes:
            self.stage[node] = 0
            self._check_versions(node)
            if node.op != "call_function":
                self.seen[node] = node, 0
                inner = _value(node, graph)
                if isinstance(inner, fx.GraphModule) and any(map(_changes, inner.graph.nodes)):
                    raise _UncutError
                continue
            module, changes, inputs = _repeated(node), _changes(node), node.all_input_nodes
            if changes or node in stored:
                module = ""
            elif not isinstance(node.meta.get("val"), Tensor):
                # Sizes of what is outside are computed there: all layers share them.
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
            if not changes and first in self.seen and is_view(node):
                self.seen[node] = self.seen[first]
            self.stage[node] = stage
            last = max(last, stage)
        self._settle()

    def _check_versions(self, node: fx.Node) -> None:
        """Nobody reads a tensor under the name that it had before it was changed."""
        for x in node.all_input_nodes:
            root, version = self.seen.get(x, (x, 0))
            if self.version[root] != version:
                raise _UncutError

    def _changed(self, node: fx.Node) -> fx.Node:
        """The tensor that a node changes in place, which it is the next version of."""
        target = node.args[0]
        if not isinstance(target, fx.Node) or target not in self.seen or is_view(target):
            raise _UncutError
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
            if node.users and (node in free or is_view(node)):
                users = {(self.module.get(x), self.stage[x]) for x in node.users}
                if all(at == module for at, _ in users) and (node in free or len(users) == 1):
                    self.stage[node] = min(stage for _, stage in users)
                elif is_view(node) and (module, self.stage[node]) not in users:
                    del self.module[node]
                    self.stage[node] += 1


def _repeated(node: fx.Node) -> str:
    """The outermost module of a list that a node is of; "" for none."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    found = re.match(r"(.*?\.\d+)(\.|$)", path)
    return found[1] if found else ""


def _stored(graph: fx.Graph) -> set[fx.Node]:
    """What is stored in the caller's tensors at the end, of a graph that changes nothing before.

    Inductor writes it in place, but not across the bounds of a piece.
    """
    found: set[fx.Node] = set()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        x: Any = node.args[1]
        while x.target is torch.ops.aten.index_copy.default:
            found.add(x)
            x = x.args[0]
    return found


def _changes(node: fx.Node) -> bool:
    """Whether a node changes a tensor in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def is_view(node: fx.Node) -> bool:
    """Whether a node may be another name of its first argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return any(x.alias_info is not None for x in schema.returns)


class Piece:
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
        """Find arguments, results and name: a hash of what is done, and to tensors of what kind."""
        mine, lines = set(self.nodes), list[str]()
        index: dict[fx.Node, _Name] = {}
        for node in self.nodes:
            for x in node.all_input_nodes:
                if x not in mine and x not in index:
                    value = _value(x, self.owner)
                    if isinstance(value, fx.GraphModule):
                        inner = "".join(
                            part.code
                            for part in value.modules()
                            if isinstance(part, fx.GraphModule)
                        )
                        index[x] = _Name(hashlib.sha256(inner.encode()).hexdigest())
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
            lines += [look(_value(x, self.owner)) for x in (*self.tensors, *self.sizes)]
            lines += [index[x] for x in self.outputs]
            self.name = "region_" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @functools.cached_property
    def graph(self) -> fx.GraphModule:
        """The piece by itself."""
        graph, root = fx.Graph(), dict[str, Any]()
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
        key = str([look(x) for x in (*tensors, *sizes)])
        if key not in self._made:
            mode: Any = detect_fake_mode(tensors)
            with mode.shape_env.ignore_fresh_unbacked_symbols(), torch.no_grad():
                self._made[key] = self.graph(*tensors, *sizes)
        return [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            for x in self._made[key]
        ]


class _Name(str):
    """Written without quotes."""

    __repr__ = str.__str__


def _value(node: fx.Node, owner: Any) -> Any:
    if node.op != "get_attr":
        return node.meta.get("val")
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    return owner


def look(x: Any) -> str:
    """All that tracing depends on."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {x.device} {list(x.shape)} {list(x.stride())}"
    return str(x)


def _calling(graph: fx.GraphModule, cut: _Cut, called: Mapping[fx.Node, Piece]) -> fx.GraphModule:
    """The graph with calls of pieces in place of their nodes, and all in the order of stages."""
    made, known = fx.Graph(), dict[fx.Node, fx.Node]()
    nodes = list(graph.graph.nodes)
    free = [x for x in nodes if x.op != "call_function"]
    rest = [x for x in nodes if x.op == "call_function"]
    rest.sort(key=lambda x: (cut.stage[x], x in cut.module))
    for node in [*free[:-1], *rest, free[-1]]:
        piece = called.get(node)
        if piece is None:
            known[node] = made.node_copy(node, known.__getitem__)
        elif node is piece.nodes[0]:
            tensors, sizes = ([known[x] for x in part] for part in (piece.tensors, piece.sizes))
            call = made.call_function(REGION, (tensors, sizes, piece.name))
            for i, x in enumerate(piece.outputs):
                known[x] = made.call_function(operator.getitem, (call, i))
    new = fx.GraphModule(graph, made)
    new.meta = dict(graph.meta)
    made._codegen = copy.deepcopy(graph.graph._codegen)
    new.recompile()
    return new
