"""DGA in any PyTorch model that calls F.scaled_dot_product_attention, without editing it.

While the model's forward runs, a TorchFunctionMode receives its SDPA calls. Those over a whole
sequence go to `dga_attention`; the others are passed on, and the report says why.
"""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from flexdga.attention import dga_attention
from flexdga.checks import DTYPES
from flexdga.config import DGAConfig, LayerRule
from flexdga.cost_model import dense_below
from flexdga.masks import Mask, read_mask
from flexdga.report import LayerReport, about_slots

DECODE = "decode step"


def wrap_plain(
    model: nn.Module,
    config: DGAConfig,
    layers: LayerRule | None = None,
    *,
    bidirectional: bool = False,
) -> PlainWrapping:
    """Send the whole-sequence SDPA calls of a model's forward through `dga_attention`.

    Taken are calls with is_causal=True, or with a mask that, when compared, is the causal one:
    alone, with padding at either end of a row, or over a static cache whose first L keys belong to
    the L queries. Where padding was, the output is 0. All else is passed on unchanged: decode
    steps, other masks, dropout, other dtypes. Inside torch.compile no mask can be compared, and
    only is_causal=True is taken.

    Args:
        model: whose `forward` calls F.scaled_dot_product_attention, itself or through
            nn.MultiheadAttention. Other methods and other models are left alone.
        config: the choices for all calls.
        layers: the choices for the i-th call of a forward pass instead; None = leave it dense.
        bidirectional: also take calls without causality, with as many queries as keys, under a
            config of `prompt` scope. Cross-attention between sequences of equal length looks the
            same: set it for encoders only.

    Returns:
        The wrapping, which stands in place of `model.forward`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the model, or a part of it, is wrapped already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(config, DGAConfig):
        raise TypeError(f"config: expected a DGAConfig, got {type(config).__name__}")
    if layers is not None and not callable(layers):
        raise TypeError(f"layers: expected a callable or None, got {type(layers).__name__}")
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), PlainWrapping):
            where = f"its part {name!r}" if name else "it"
            raise ValueError(f"model: expected one not wrapped yet, but {where} is wrapped already")
    wrapping = PlainWrapping(model, config, layers, bidirectional)
    model.__dict__["forward"] = wrapping
    return wrapping


def unwrap_plain(model: nn.Module, wrapping: PlainWrapping) -> None:
    """Give the model its own forward back; nothing of the wrapping is left.

    Raises:
        ValueError: the model does not carry this wrapping.
    """
    if model.__dict__.get("forward") is not wrapping:
        raise ValueError("model: expected one that carries this wrapping, got one that does not")
    if wrapping.instance_forward:
        model.__dict__["forward"] = wrapping.__wrapped__
    else:
        del model.__dict__["forward"]


class PlainWrapping:
    """Stands in place of a model's `forward`, and keeps count of its SDPA calls.

    Attributes:
        rows: one for each SDPA call of a forward pass, in order. Calls inside torch.compile are
            counted once, when they are traced, and without their length.
    """

    _numbers = itertools.count()

    def __init__(
        self, model: nn.Module, config: DGAConfig, layers: LayerRule | None, bidirectional: bool
    ) -> None:
        self.rows: list[LayerReport] = []
        self.config, self.layers, self.bidirectional = config, layers, bidirectional
        self.instance_forward = "forward" in model.__dict__
        self.__wrapped__: Callable[..., Any] = model.forward  # inspect.signature follows it
        self._register()

    def _register(self) -> None:
        self.name = f"wrapping {next(self._numbers)}"
        _wrappings[self.name] = self

    @property
    def __code__(self) -> types.CodeType:
        """Of the model's own forward, whose place it takes: torch.export asks a forward for it."""
        return self.__wrapped__.__code__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied model counts for itself."""
        self.__dict__.update(state)
        self._register()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, its SDPA calls intercepted.

        Raises:
            RuntimeError: no SDPA call was made, or not one could be replaced: what came out is
                not what the user asked for.
        """
        if not torch.compiler.is_compiling() and any(
            isinstance(mode, _Interceptor) for mode in _get_current_function_mode_stack()
        ):
            raise RuntimeError(
                "flexdga: a wrapped model runs inside the forward of a wrapped model; expected one "
                "of the two to be wrapped"
            )
        interceptor = _Interceptor(self)
        with interceptor:
            out = self.__wrapped__(*args, **kwargs)
        interceptor.check()
        return out

    def config_of(self, index: int) -> DGAConfig | None:
        """The choices for the index-th call of a forward pass."""
        if self.layers is None:
            return self.config
        config = self.layers(index)
        if config is not None and not isinstance(config, DGAConfig):
            got = type(config).__name__
            raise TypeError(f"layers: expected a DGAConfig or None for call {index}, got {got}")
        return config


_wrappings: weakref.WeakValueDictionary[str, PlainWrapping] = weakref.WeakValueDictionary()


# Counting goes by name through functions that a compiler runs once, as it traces: it would guard on
# counts that it reads, and compile again when they change.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _count(
    name: str,
    index: int,
    replaced: bool,
    why: str,
    tokens: int,
    slots: int,
    below: int,
    traced: bool,
) -> None:
    rows = _wrappings[name].rows
    while len(rows) <= index:
        rows.append(LayerReport(f"call {len(rows)}", wrapped=False, why=""))
    row = rows[index]
    count = "replaced" if replaced else "passed"
    before: int = getattr(row, count)
    setattr(row, count, max(before, 1) if traced else before + 1)
    if replaced:
        row.wrapped, row.why = True, why
        row.tokens, row.slots, row.dense_below = tokens, slots, below
    elif not row.wrapped:
        row.why = why
    elif why != DECODE and why not in row.why:
        row.why += f"; once: {why}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ever_replaced(name: str) -> bool:
    return any(row.replaced for row in _wrappings[name].rows)


class _Job(NamedTuple):
    """How a call goes through `dga_attention`."""

    config: DGAConfig
    is_causal: bool
    document_ids: Tensor | None
    why: str


# nn.MultiheadAttention's function asks for modes itself, so a mode receives it whole and is off
# while it runs. This is the same code, which does not ask. Without __name__ the compiler takes
# its globals from here and not from the module that they were copied from.
_globals = {name: value for name, value in vars(F).items() if name != "__name__"}
_mha = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    _globals | {"has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


class _Interceptor(TorchFunctionMode):
    """Active during one forward pass."""

    def __init__(self, wrapping: PlainWrapping) -> None:
        super().__init__()
        self.wrapping = wrapping
        # Its length is the number of the call: compilers may make a symbol of an int, not of this.
        self.calls: list[tuple[bool, str]] = []
        self.mask_read: tuple[Tensor, tuple[int, ...], Mask | str] | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            before = len(self.calls)
            with self:
                out = _mha(*args, **kwargs)
            if len(self.calls) == before:
                self.note(False, "need_weights=True")
            return out
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # the compiler cannot follow the method's super() from a mode
        return func(*args, **kwargs)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """F.scaled_dot_product_attention, by DGA where the call qualifies."""
        device = query.device.type
        autocast = torch.is_autocast_enabled(device)
        q, k, v = query, key, value
        if autocast and query.dtype != torch.float64:  # as SDPA itself would cast
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        job = self.job(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa)
        if isinstance(job, str):
            self.note(False, job)
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        length = q.shape[-2]
        k, v = k[..., :length, :], v[..., :length, :]
        flat = q.dim() == 3
        if flat:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            out: Tensor = dga_attention(
                q, k, v, config=job.config, is_causal=job.is_causal, scale=scale,
                document_ids=job.document_ids,
            )  # fmt: skip
        if torch.compiler.is_compiling():
            self.note(True, f"{job.why}, compiled")
        else:
            below = dense_below(job.config, q, k)
            self.note(True, job.why, length, about_slots(job.config, length, below), below)
        return out.squeeze(1) if flat else out

    def job(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
        is_causal: bool, enable_gqa: bool,
    ) -> _Job | str:  # fmt: skip
        """How this call goes through `dga_attention`, or why it does not."""
        config = self.wrapping.config_of(len(self.calls))
        if config is None:
            return "left dense by `layers`"
        dims = {x.dim() for x in (query, key, value)}
        if query.is_nested or dims not in ({3}, {4}):
            return "not (B, H, L, D)"
        if query.dtype not in DTYPES:
            return f"dtype {str(query.dtype).removeprefix('torch.')}"
        if dropout != 0:
            return "dropout"
        length, keys = query.shape[-2], key.shape[-2]
        if length == 1:
            return DECODE
        if length > keys or length == 0:
            return "more queries than keys" if length else "no queries"
        if query.shape[0] != key.shape[0] or not (
            query.dim() == 3 or query.shape[1] == key.shape[1] or enable_gqa
        ):
            return "shapes that broadcast"
        if mask is None and is_causal:
            return _Job(config, True, None, "causal")
        if mask is None:
            read: Mask | str = Mask(False, None)
            if length != keys:
                read = "fewer queries than keys"
        elif is_causal:
            read = "both a mask and is_causal"  # SDPA itself will say so
        elif torch.compiler.is_compiling():
            read = "a mask cannot be compared in torch.compile"
        else:
            mask = mask.unsqueeze(1) if query.dim() == mask.dim() == 3 else mask
            heads = query.shape[1] if query.dim() == 4 else 1
            read = self.read(mask, (query.shape[0], heads, length, keys))
        if isinstance(read, str):
            return read
        padding = read.document_ids is not None
        if read.is_causal:
            why = "padding" if padding else "causal mask"
        elif not self.wrapping.bidirectional:
            return "not causal, and bidirectional=False"
        elif config.scope == "causal":
            return "not causal, and scope='causal'"
        else:
            why = "bidirectional, padding" if padding else "bidirectional"
        return _Job(config, read.is_causal, read.document_ids, why)

    def read(self, mask: Tensor, sizes: tuple[int, int, int, int]) -> Mask | str:
        """`read_mask`, once for the mask that the layers of a model share."""
        # Inference tensors do not count their versions.
        stamp = (*sizes, -1 if mask.is_inference() else mask._version)
        known = self.mask_read
        if known is None or known[0] is not mask or known[1] != stamp or mask.is_inference():
            self.mask_read = known = (mask, stamp, read_mask(mask, *sizes))
        return known[2]

    def note(
        self, replaced: bool, why: str, tokens: int = 0, slots: int = 0, below: int = 0
    ) -> None:
        """Count a call."""
        traced = torch.compiler.is_compiling()
        _count(self.wrapping.name, len(self.calls), replaced, why, tokens, slots, below, traced)
        self.calls.append((replaced, why))

    def check(self) -> None:
        """Raise if the forward pass had nothing of DGA, and was not to be without."""
        if not self.calls:
            raise RuntimeError(
                "flexdga: the model's forward made no call of F.scaled_dot_product_attention, so "
                "nothing was replaced; expected a model that attends through it (inside "
                "torch.compile, nn.TransformerEncoder does after "
                "torch.backends.mha.set_fastpath_enabled(False))"
            )
        if any(replaced or why == DECODE for replaced, why in self.calls):
            return
        if not _ever_replaced(self.wrapping.name):
            reasons = ", ".join([f"call {i}: {why}" for i, (_, why) in enumerate(self.calls)])
            raise RuntimeError(
                f"flexdga: none of the model's attention could be replaced ({reasons}); expected "
                "at least one call over a whole sequence, causal, without dropout"
            )
