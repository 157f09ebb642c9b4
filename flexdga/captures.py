"""The tensors that a score mod takes from its surroundings, and that want a gradient."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from score_mods import ScoreMod


def captured_tensors(mod: ScoreMod | None) -> list[Tensor]:
    """Tensors that require a gradient in a score mod's closure, defaults, globals or object.

    Raises:
        NotImplementedError: the mod depends on another tensor that requires a gradient.
    """
    if mod is None:
        return []
    found: dict[int, Tensor] = {}
    _collect(mod, found, set())
    _check_all_found(mod, list(found.values()))
    return list(found.values())


def _collect(thing: Any, found: dict[int, Tensor], seen: set[int]) -> None:
    if id(thing) in seen or isinstance(thing, (type, types.ModuleType)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.requires_grad:
            found[id(thing)] = thing
        return
    for part in _parts(thing):
        _collect(part, found, seen)


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, types.FunctionType):
        cells = []
        for cell in thing.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # a name that has no value yet
                continue
        names = thing.__globals__
        used = [names[name] for name in thing.__code__.co_names if name in names]
        # Of globals tensors alone: functions of libraries lead to everything there is.
        used = [value for value in used if isinstance(value, (Tensor, nn.Module))]
        return [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *used]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    call = vars(type(thing)).get("__call__")
    return [call, getattr(thing, "__dict__", {})]


def _check_all_found(mod: ScoreMod, found: list[Tensor]) -> None:
    """Ask autograd what one score depends on."""
    device = found[0].device if found else "cpu"
    with torch.enable_grad():
        place = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(4)]
        score = mod(torch.zeros((), device=device), *place)
    if score.grad_fn is None:
        return
    known = {id(t) for t in found}
    stops = {t.grad_fn for t in found if t.grad_fn is not None}
    todo, done = [score.grad_fn], set()
    while todo:
        node = todo.pop()
        if node in done or node in stops:
            continue
        done.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise NotImplementedError(
                f"score_mod: it depends on a tensor {tuple(leaf.shape)} that requires a gradient "
                f"and is in neither its closure, its defaults, its globals nor its object; "
                f"expected to find it there"
            )
        todo += [parent for parent, _ in node.next_functions if parent is not None]
