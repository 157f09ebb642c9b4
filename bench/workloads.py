"""What attention is measured on: random tensors, or the q, k, v of a real model on a real text."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexdga.cache import CACHE_NAME

from .errors import UsageError
from .options import check_model_folder, positive_int


@dataclasses.dataclass(frozen=True)
class QKV:
    """One attention call's inputs: (B, H, L, D), (B, Hkv, L, D) twice; scale None = 1/√D."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    layer: int | None = None

    @property
    def length(self) -> int:
        """L."""
        return self.query.shape[2]

    @property
    def factor(self) -> float:
        """What scores are multiplied by: the scale, or 1/√D."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def grouped(self) -> bool:
        """Whether query heads share KV heads."""
        return self.query.shape[1] != self.key.shape[1]

    def first(self, length: int) -> QKV:
        """The first `length` tokens, contiguous."""
        q, k, v = (x[:, :, :length].contiguous() for x in (self.query, self.key, self.value))
        return dataclasses.replace(self, query=q, key=k, value=v)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Head layout of random tensors."""

    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64

    def __str__(self) -> str:
        return f"B={self.batch}, H={self.heads}, Hkv={self.kv_heads}, D={self.head_dim}"

    def check(self) -> None:
        """Fail unless KV heads divide the query heads."""
        if self.heads % self.kv_heads:
            raise UsageError(
                f"--kv-heads {self.kv_heads}: expected a divisor of --heads {self.heads}"
            )


def add_shape(parser: argparse.ArgumentParser) -> None:
    """An option for each field of `Shape`."""
    for name, default in dataclasses.asdict(Shape()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive_int,
            metavar="N",
            help=f"of the random tensors (default {default})",
        )


def given_shape(arguments: argparse.Namespace) -> tuple[Shape, dict[str, int]]:
    """The shape that the options of `add_shape` ask for, and those that were given."""
    fields = {name: getattr(arguments, name) for name in dataclasses.asdict(Shape())}
    given = {name: value for name, value in fields.items() if value is not None}
    return Shape(**given), given


def random_qkv(
    shape: Shape, length: int, *, dtype: torch.dtype, device: torch.device, seed: int
) -> QKV:
    """Independent normal numbers: all that timing needs, and the hardest case for the error."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        x = torch.randn(shape.batch, heads, length, shape.head_dim, generator=generator)
        return x.to(device, dtype)

    return QKV(draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads))


def default_text() -> str:
    """The help topics of Python's own documentation: in every Python, about 700 KB of English."""
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def open_model(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A local causal language model, ready to read, and its tokenizer.

    Raises:
        UsageError: transformers cannot read them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {path}: {error}") from error
    return model.eval(), tokenizer


def next_logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """(B, 1, V) logits of what follows (B, L) ids, which a cache takes in."""
    out = model(ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits
    return logits


def random_like(model: Any, length: int) -> list[Tensor]:
    """Random query, key and value in the head layout of a model, laid out as its projections."""
    text, like = model.config.get_text_config(), next(model.parameters())
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return [
        torch.randn(1, length, n, head_dim, device=like.device, dtype=like.dtype).transpose(1, 2)
        for n in (text.num_attention_heads, *[text.num_key_value_heads] * 2)
    ]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A local Hugging Face model and the token ids to run it on, checked."""

    path: Path
    tokens: tuple[int, ...]
    layers: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def open(
        cls,
        path: Path,
        text: str,
        *,
        longest: int,
        layers: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> ModelSource:
        """Read config and tokenizer only; no `layers` = all.

        Raises:
            UsageError: no model there, or it lacks the layers.
        """
        from transformers import AutoConfig, AutoTokenizer

        check_model_folder(path)
        try:
            config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
            tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"--model {path}: {error}") from error
        config = config.get_text_config()
        count = config.num_hidden_layers
        chosen = layers or tuple(range(count))
        if max(chosen) >= count:
            raise UsageError(f"--layers: the model has layers 0 to {count - 1}, got {max(chosen)}")
        longest = min(longest, config.max_position_embeddings)
        tokens = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        return cls(path, tuple(tokens), chosen, dtype, device)

    def capture(self) -> list[QKV]:
        """Run the model once; q, k, v of each chosen layer as attention gets them (rotated)."""
        from transformers import AutoModel

        from .attended import capture

        model = AutoModel.from_pretrained(self.path, dtype=self.dtype, local_files_only=True)
        model = model.eval().to(self.device)
        found = capture(model, torch.tensor([self.tokens], device=self.device))
        return [x for x in found if x.layer in self.layers]
