"""`wrap` for transformers models: an implementation by name, and a cache for `generate`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from flexdga.cache import CACHE_NAME, CACHE_NAMES, DENSE, DGACache
from flexdga.config import DGAConfig, LayerRule
from flexdga.huggingface import NAME, Settings
from flexdga.report import LayerReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from flexdga.parallel.wrapping import ShardedForward


class HuggingFaceWrapping:
    """A transformers model under DGA.

    Args:
        model: the model.
        config: for layers that the rule says nothing of.
        rule: the configuration of a layer by its number; None leaves it dense.

    Raises:
        ValueError: nothing in the model can be wrapped, and why.
    """

    def __init__(self, model: PreTrainedModel, config: DGAConfig, rule: LayerRule) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"model: {type(model).__name__} is an encoder-decoder, whose cross-attention "
                "DGA cannot express; expected a decoder or an encoder"
            )
        self.model = model
        self.modules = attention_modules(model)
        chosen = [_chosen(rule, i) for i in range(len(self.modules))]
        self.rows = [_row(name, module, own) for (name, module), own in zip(self.modules, chosen)]
        if not any(row.wrapped for row in self.rows):
            reasons = sorted({row.why for row in self.rows}) or ["it has no attention modules"]
            raise ValueError(
                f"model: nothing to wrap in {type(model).__name__}: {'; '.join(reasons)}"
            )
        self.before = [(c, c._attn_implementation_internal) for c in _configs(model)]
        model.set_attn_implementation(NAME)
        self.settings = [
            Settings(own if own and row.wrapped else DENSE, row)
            for row, own in zip(self.rows, chosen)
        ]
        for (_, module), settings in zip(self.modules, self.settings):
            module._flexdga = settings  # type: ignore[assignment]
        self.sharding: ShardedForward | None = None
        self.hook = model.register_forward_hook(self._check)
        self.generate = model.__dict__.get("generate")
        if model.can_generate() and not any(_is_latent(module) for _, module in self.modules):
            # Modules are numbered as in the report, a cache's layers by their own numbers. The
            # rule itself may be a lambda, which would keep the model from being pickled.
            by_layer = {
                getattr(module, "layer_idx", i): own
                for i, ((_, module), own) in enumerate(zip(self.modules, chosen))
                if module.is_causal
            }
            cache = functools.partial(
                DGACache, config, model_config=model.config.get_text_config(decoder=True),
                layers=by_layer.get,
            )  # fmt: skip
            model.generate = functools.partial(_generate, model, cache)

    def shard(self, mesh: DeviceMesh | ProcessGroup, *, balanced: bool, gather: bool) -> None:
        """Run forward passes over shards of the sequence.

        Raises:
            ValueError: a layer cannot; the model is restored.
        """
        from flexdga.parallel.wrapping import ShardedForward

        try:
            for _, module in self.modules:
                if not module.is_causal or _sliding_window(module) is not None:
                    raise ValueError(
                        "mesh: sequences are sharded in causal layers without a sliding window; "
                        f"expected nothing else in {type(self.model).__name__}"
                    )
            self.sharding = ShardedForward(
                self.model, self.settings, mesh, balanced=balanced, gather=gather
            )
        except Exception:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore the model exactly."""
        if self.sharding is not None:
            self.sharding.undo()
        for config, implementation in self.before:
            config._attn_implementation_internal = implementation
        for module in self.model.modules():  # also those that are no layers of the report
            module.__dict__.pop("_flexdga", None)
        self.hook.remove()
        self.model.__dict__.pop("generate", None)
        if self.generate is not None:
            self.model.__dict__["generate"] = self.generate

    def _check(self, *_: Any) -> None:
        """Raise if in a forward pass nothing went through DGA."""
        if torch.compiler.is_compiling():
            return
        if not any(row.replaced for row in self.rows) and any(row.passed for row in self.rows):
            raise RuntimeError(
                f"flexdga: no attention of {type(self.model).__name__} went through DGA: its "
                "layers got masks over pairs of tokens, or keys of a cache that is not a DGACache"
            )


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that call the attention interface, in order: they know their direction."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "is_causal") and not isinstance(module, PreTrainedModel)
    ]


def _chosen(rule: LayerRule, index: int) -> DGAConfig | None:
    config = rule(index)
    if config is not None and not isinstance(config, DGAConfig):
        raise TypeError(f"layers: expected DGAConfig or None for layer {index}, got {config!r}")
    return config


def _row(name: str, module: nn.Module, config: DGAConfig | None) -> LayerReport:
    window = _sliding_window(module)
    if window is not None:
        return LayerReport(name, False, f"sliding window of {window}, left as it is")
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__:
        return LayerReport(name, False, "cross-attention, left as it is")
    if config is None:
        return LayerReport(name, False, "left dense by `layers`")
    if config.scope == "causal" and not module.is_causal:
        return LayerReport(name, False, "both directions, and scope='causal'")
    if _is_latent(module):
        return LayerReport(name, True, "causal; decoding stays dense, its cache keeps latents")
    return LayerReport(name, True, "causal" if module.is_causal else "both directions")


def _is_latent(module: nn.Module) -> bool:
    """Whether keys are expanded after they were cached (DeepSeek's latent attention)."""
    return hasattr(module, "kv_lora_rank")


def _sliding_window(module: nn.Module) -> int | None:
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
        return window if window is None else int(window)  # type: ignore[arg-type]
    index, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
    if index is None or config is None or not module.is_causal:
        return None
    kinds, arguments = get_layer_types_and_kwargs(config)
    return arguments[index].get("sliding_window") if index < len(kinds) else None


def _configs(model: PreTrainedModel) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return list(found.values())


def _generate(
    model: PreTrainedModel, made: Callable[[], DGACache], /, *args: Any, **kwargs: Any
) -> Any:
    """`model.generate`, with a DGACache unless the caller says otherwise."""
    settings = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    asked = [kwargs, vars(settings or model.generation_config)]
    other = any(a.get("cache_implementation") for a in asked)
    none = any(a.get("use_cache") is False for a in asked)
    given = [own for name in CACHE_NAMES if (own := kwargs.pop(name, None)) is not None]
    if len(given) > 1:
        raise ValueError(f"cache: expected one, got two, as {' and as '.join(CACHE_NAMES)}")
    if not given and not other and not none:
        given = [made()]
        if getattr(settings, "is_assistant", False):
            given[0].activate_past_recording()  # drafts are taken back
    if given:
        kwargs[CACHE_NAME] = given[0]
    return type(model).generate(model, *args, **kwargs)
