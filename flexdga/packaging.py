"""`export` takes a model out of Python, as an AOTInductor package; `load` runs one."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.package.package import load_package, package_aoti
from torch.export import Dim, ExportedProgram, ShapesCollection

from flexdga import cpu_kernel
from flexdga.compiling import Options, all_compiled, compiled
from flexdga.lowering import OPERATOR

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

BATCH_AND_LENGTH = {1: (0, None), 2: (0, 1), 3: (0, 1), 4: (0, 2)}
"""Which dimensions of an input with so many are the batch and the length."""


def export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = True,
    decode: int | None = None,
    options: Options = None,
    processes: int | None = None,
) -> Path:
    """Compile a model ahead of time into one file that needs torch alone to run.

    The file is an AOTInductor package, for this machine's kind of processor: `flexdga.load` runs
    it, as `torch._inductor.aoti_load_package` and C++'s `AOTIModelPackageLoader` do. It holds the
    weights, and is made without gradients. Its inputs are to be contiguous, and of the examples'
    dtypes; it refuses others. Of a transformers model it is a prefill without a cache, whose only
    result is the first one of the model: the logits of a language model.

    With `dynamic`, batch and length are those of each call. There is then no branch on
    `DGAConfig.dense_below`: see `flexdga.lower`.

    With `decode`, a wrapped transformers model becomes two entry points of one package, to
    generate text with:

        prefill(tokens) -> logits, length, *state
        decode(token, length, *state) -> logits

    `tokens` is (B, L), `token` (B, 1), and the logits (B, 1, vocabulary) are those after the last
    token. `length` and `state` are what a `DGACache` holds of the text so far (window, slots, raw
    tokens to open again), in tensors of fixed size; `decode` changes them in place. It decodes as
    `dense_below=0` does, over texts without padding. Each entry point holds the weights.

    Args:
        model: a model that `flexdga.wrap` wrapped, or any module with `dga_attention` or
            `DGAttention` in it.
        example_inputs: of one call: a tensor, a sequence of them, or a mapping of names to them.
        path: where to write the package; ends in .pt2.
        dynamic: let batch and length vary, from 1 and 2 on. In an input, (B,), (B, L), (B, L, E) or
            (B, H, L, D), they are where these letters stand. Examples of one row are doubled for
            the tracing: the compiler would take one for a constant.
        decode: tokens that a generated text, prompt included, may grow to; in whole steps of the
            plan. None: no decoding.
        options: of Inductor, as in `torch.compile(options=...)`.
        processes: with `decode`, 2 compiles the two entry points at the same time, one of them in
            another process: nearly twice as fast on two cores, for a few seconds of work more, and
            another copy of the weights in memory and in a temporary file. None: 2 where there is
            much to compile, and another core.

    Returns:
        The path.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `path` cannot be written, an input has dimensions that `dynamic` does not know,
            batch or length are not the same in all inputs, or no attention of the model is DGA's.
        NotImplementedError: a dynamic length on CPU, without the repaired kernel; or, with
            `decode`, a layer whose state has no fixed size, and why.
    """
    target = _check_path(path)
    args, kwargs = _check_inputs(model, example_inputs)
    if processes not in (None, 1, 2):
        raise ValueError(f"processes: expected 1, 2 or None, got {processes!r}")
    if decode is not None:
        _check_decodes(model, args, kwargs, decode)
    shapes: Any = None
    if dynamic:
        args, kwargs, shapes = _dynamic(args, kwargs, decode)
        if (
            any(x.device.type == "cpu" for x in (*args, *kwargs.values()))
            and not cpu_kernel.available()
        ):
            raise NotImplementedError(
                "dynamic: flex_attention's own CPU kernel does not compile for a dynamic length "
                f"of an exported program, and flexdga's repair is for torch {cpu_kernel.VERIFIED} "
                f"without FLEXDGA_STOCK_CPU_KERNEL; expected dynamic=False with torch "
                f"{torch.__version__}"
            )
    with torch.no_grad():
        if decode is not None:
            programs = _generation(model, args[0], shapes, decode)
            files = all_compiled(programs, options, processes)
        else:
            program = torch.export.export(_prefill(model), args, kwargs, dynamic_shapes=shapes)
            _check_uses_dga(model, program)
            files = {"model": compiled("model", program, options)}
        package_aoti(str(target), files)
    return target


def load(path: str | os.PathLike[str], entry: str = "model") -> Callable[..., Any]:
    """The exported model, to be called as the model was with `example_inputs`.

    It raises a ValueError for an input that is not contiguous.

    Args:
        path: of the package.
        entry: of a package made with `decode`: `prefill` or `decode`.

    Raises:
        ValueError: there is no such file, or no such entry point in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"path: expected a package that flexdga.export wrote, got {path}")
    with zipfile.ZipFile(path) as archive:
        parts = [name.partition("data/aotinductor/")[2] for name in archive.namelist()]
    found = sorted({part.split("/")[0] for part in parts if "/" in part})
    if entry not in found:
        raise ValueError(f"entry: expected one of {found} for {path}, got {entry!r}")
    program = load_package(os.fspath(path), entry)

    def run(*args: Any, **kwargs: Any) -> Any:
        for name, x in [*enumerate(args), *kwargs.items()]:
            # Not made contiguous here: `decode` changes its state in place.
            if isinstance(x, Tensor) and not x.is_contiguous():
                raise ValueError(
                    f"input {name}: expected a contiguous tensor (x.contiguous() makes one), got "
                    f"{tuple(x.shape)} with strides {x.stride()}"
                )
        return program(*args, **kwargs)

    return run


def _generation(
    model: nn.Module, tokens: Tensor, shapes: Any, capacity: int
) -> Iterator[tuple[str, ExportedProgram]]:
    """Prompt and step of a transformers model, one after the other."""
    from flexdga.entry_points import Prompt, Step

    given: Any = model
    prompt, step = Prompt(given, capacity), Step(given, capacity)
    prefill = torch.export.export(prompt, (tokens,), dynamic_shapes=shapes)
    yield "prefill", prefill
    made = [node.meta["val"] for node in prefill.graph.output_node().args[0]]
    batch = tokens.shape[0]
    state = [_like(x, batch) for x in made[1:]]
    state[0].fill_(tokens.shape[1])
    token: Tensor = tokens[:, :1].clone()
    where: Any = None
    if shapes is not None:
        where, rows = ShapesCollection(), Dim("batch", min=1)
        for x in (token, *state):
            if x.dim():
                where[x] = {0: rows}
    yield "decode", torch.export.export(step, (token, *state), dynamic_shapes=where)


def _like(fake: Tensor, batch: int) -> Tensor:
    """Zeros of a tensor of the prompt's program, whose batch alone may be a symbol."""
    shape = [batch, *fake.shape[1:]] if fake.dim() else []
    return torch.zeros(shape, dtype=fake.dtype, device=fake.device)


class _Prefill(nn.Module):
    """A transformers model without a cache: its first output alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.can_generate():  # type: ignore[operator]
            kwargs["use_cache"] = False
        return self.model(*args, **kwargs, return_dict=False)[0]


def _prefill(model: nn.Module) -> nn.Module:
    if sys.modules.get("transformers") is None:
        return model
    from transformers import PreTrainedModel

    return _Prefill(model) if isinstance(model, PreTrainedModel) else model


def _check_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {target}")
    if not target.parent.is_dir():
        raise ValueError(f"path: expected a folder that exists, got {target}")
    return target


def _check_inputs(model: nn.Module, inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, Sequence):
        args = tuple(inputs)
    else:
        raise TypeError(
            f"example_inputs: expected a tensor, a sequence or a mapping of tensors, got "
            f"{type(inputs).__name__}"
        )
    for x in (*args, *kwargs.values()):
        if not isinstance(x, Tensor):
            raise TypeError(f"example_inputs: expected tensors, got {type(x).__name__} among them")
    if not args and not kwargs:
        raise ValueError("example_inputs: expected at least one tensor, got none")
    args = tuple(x.contiguous() for x in args)
    return args, {name: x.contiguous() for name, x in kwargs.items()}


def _check_decodes(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], capacity: int
) -> None:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers model with decode={capacity}, got "
            f"{type(model).__name__}"
        )
    if kwargs or len(args) != 1 or args[0].dim() != 2 or args[0].is_floating_point():
        raise ValueError(
            "example_inputs: expected token ids (B, L) alone with decode, got "
            f"{[tuple(x.shape) for x in args]} {sorted(kwargs)}"
        )
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise TypeError(f"decode: expected a number of tokens, got {capacity!r}")
    if args[0].shape[1] > capacity:
        raise ValueError(
            f"decode: expected room for the example's {args[0].shape[1]} tokens, got {capacity}"
        )


def _dynamic(
    args: tuple[Tensor, ...], kwargs: dict[str, Tensor], longest: int | None
) -> tuple[tuple[Tensor, ...], dict[str, Tensor], ShapesCollection]:
    """The inputs, rows doubled where there is one, and which of their dimensions may vary."""
    every = [*args, *kwargs.values()]
    found: dict[str, set[int]] = {"batch": set(), "length": set()}
    for x in every:
        if x.dim() not in BATCH_AND_LENGTH:
            raise ValueError(
                f"example_inputs: expected 1 to 4 dimensions with dynamic=True, got "
                f"{tuple(x.shape)}"
            )
        for name, dim in zip(found, BATCH_AND_LENGTH[x.dim()]):
            if dim is not None:
                found[name].add(x.shape[dim])
    for name, got in found.items():
        if len(got) > 1:
            raise ValueError(
                f"example_inputs: expected one {name} in all of them with dynamic=True, got "
                f"{sorted(got)}"
            )
    if min(found["length"], default=2) < 2:
        raise ValueError("example_inputs: expected a length of at least 2, got 1")
    rows = 2 if found["batch"] == {1} else 1
    args = tuple(torch.cat([x] * rows) for x in args)
    kwargs = {name: torch.cat([x] * rows) for name, x in kwargs.items()}
    sizes = Dim("batch", min=1), Dim("length", min=2, max=longest)
    shapes = ShapesCollection()
    for x in (*args, *kwargs.values()):
        where = BATCH_AND_LENGTH[x.dim()]
        shapes[x] = {dim: size for dim, size in zip(where, sizes) if dim is not None}
    return args, kwargs, shapes


def _check_uses_dga(model: nn.Module, program: ExportedProgram) -> None:
    for part in program.graph_module.modules():
        for node in getattr(part, "graph", torch.fx.Graph()).nodes:
            if node.target in (OPERATOR, torch.ops.higher_order.flex_attention):
                return
    raise ValueError(
        f"model: expected one with DGA in it (flexdga.wrap(model) puts it there), but no attention "
        f"of {type(model).__name__} goes through dga_attention"
    )
