"""`wrap` puts DGA into a model that somebody else wrote, `unwrap` takes it out again."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from torch import nn

from flexdga.config import BY_LANDMARKS, DGAConfig, LayerRule
from flexdga.plain import unwrap_plain, wrap_plain
from flexdga.report import LayerReport, Report

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)
_ATTRIBUTE = "_flexdga_wrapping"


class Wrapping(NamedTuple):
    """What is left at a wrapped model: the report's rows, and how to restore the model exactly."""

    rows: list[LayerReport]
    undo: Callable[[], None]


def wrap(
    model: Model,
    config: DGAConfig | None = None,
    *,
    layers: LayerRule | Mapping[int, DGAConfig | None] | None = None,
    bidirectional: bool = False,
    mesh: DeviceMesh | ProcessGroup | None = None,
    balanced: bool = True,
    gather: bool = True,
) -> Model:
    """Send a model's attention through DGA. It is the same model, changed in place.

    A transformers model gets the attention implementation `flexdga` (padding, packed documents,
    soft caps, attention sinks and grouped queries included; sliding-window layers stay as they
    are), and its `generate` decodes with a `DGACache`. In any other model, calls of
    `F.scaled_dot_product_attention` that are causal self-attention are replaced while its
    `forward` runs; the others are passed on. `report(model)` tells what became of each layer.

    Args:
        model: the model.
        config: of its attention; None = `DGAConfig()`, with a `mesh` the default of
            `parallel_attention`.
        layers: another configuration for some layers: a mapping, or a function of the layer's
            number (in a plain PyTorch model, of the call within a forward pass). None, from it or
            in it, leaves a layer dense.
        bidirectional: in a plain PyTorch model, also replace calls without a causal mask whose
            queries are as many as the keys. They cannot be told from cross-attention, so say it
            only of an encoder. In a transformers model each layer knows its direction.
        mesh: shard sequences over these ranks (`flexdga.parallel`). Every rank calls a transformers
            decoder with the whole tokens, its forward pass runs over this rank's shard, at the
            right positions, and the whole logits come back. `generate` goes on from there, on every
            rank: raw tokens to open again stay on one rank each.
        balanced: with a mesh, whether each rank gets an early and a late part of the sequence.
        gather: with a mesh, False gives the shard's logits, in the order of
            `flexdga.parallel.Shards(length, mesh, config)`, with gradients.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the model is wrapped already, or nothing in it can be wrapped, and why.
        RuntimeError: from a forward pass in which nothing went through DGA, and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if config is None:
        config = DGAConfig() if mesh is None else BY_LANDMARKS
    if not isinstance(config, DGAConfig):
        raise TypeError(f"config: expected a DGAConfig, got {type(config).__name__}")
    if getattr(model, _ATTRIBUTE, None) is not None:
        raise ValueError("model: it is wrapped already; unwrap(model) first")
    rule = _rule(layers, config)
    if _is_transformers(model):
        from flexdga.wrap_huggingface import HuggingFaceWrapping

        inside = HuggingFaceWrapping(model, config, rule)
        if mesh is not None:
            inside.shard(mesh, balanced=balanced, gather=gather)
        wrapping = Wrapping(inside.rows, inside.undo)
    elif mesh is not None:
        raise ValueError(
            f"mesh: expected a transformers model that takes attention implementations by name, "
            f"got {type(model).__name__}; flexdga.parallel.parallel_attention is for any other"
        )
    else:
        plain = wrap_plain(model, config, rule, bidirectional=bidirectional)
        wrapping = Wrapping(plain.rows, functools.partial(unwrap_plain, model, plain))
    object.__setattr__(model, _ATTRIBUTE, wrapping)
    return model


def unwrap(model: Model) -> Model:
    """Restore a wrapped model exactly as it was.

    Raises:
        ValueError: it is not wrapped.
    """
    _wrapping_of(model).undo()
    object.__delattr__(model, _ATTRIBUTE)
    return model


@contextlib.contextmanager
def applied(
    model: Model,
    config: DGAConfig | None = None,
    *,
    layers: LayerRule | Mapping[int, DGAConfig | None] | None = None,
    bidirectional: bool = False,
) -> Iterator[Model]:
    """`wrap` for the length of a `with` block; arguments and errors as there."""
    wrap(model, config, layers=layers, bidirectional=bidirectional)
    try:
        yield model
    finally:
        unwrap(model)


def report(model: nn.Module) -> Report:
    """What became of each attention layer of a wrapped model. Print it.

    Raises:
        ValueError: it is not wrapped.
    """
    return Report(_wrapping_of(model).rows)


def _wrapping_of(model: nn.Module) -> Wrapping:
    found: Wrapping | None = getattr(model, _ATTRIBUTE, None)
    if found is None:
        raise ValueError(
            f"model: expected a wrapped model, got {type(model).__name__}, not wrapped"
        )
    return found


def _rule(
    layers: LayerRule | Mapping[int, DGAConfig | None] | None, config: DGAConfig
) -> LayerRule:
    if layers is None:
        return lambda index: config
    if isinstance(layers, Mapping):
        chosen = dict(layers)
        for index, value in chosen.items():
            if value is not None and not isinstance(value, DGAConfig):
                raise TypeError(
                    f"layers: expected DGAConfig or None for layer {index}, got {value!r}"
                )
        return lambda index: chosen.get(index, config)
    if not callable(layers):
        raise TypeError(f"layers: expected a function or a mapping, got {type(layers).__name__}")
    return layers


def _is_transformers(model: nn.Module) -> bool:
    """Whether the model takes attention implementations by name."""
    if sys.modules.get("transformers") is None:
        return False
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return False
    return bool(model._can_set_attn_implementation())
