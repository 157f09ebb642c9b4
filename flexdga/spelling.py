"""A `DGAConfig` as a line of text, for a schema that knows no other types, and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from flexdga.config import DGAConfig


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def spell(config: DGAConfig) -> str:
    """The fields in which `config` differs from `DGAConfig()`, as JSON."""
    plain = DGAConfig()
    names = [field.name for field in dataclasses.fields(DGAConfig) if field.init]
    fields = {n: getattr(config, n) for n in names if getattr(config, n) != getattr(plain, n)}
    return json.dumps(fields)


def read(text: str) -> DGAConfig:
    """The config that `spell` wrote.

    Raises:
        ValueError: it is no JSON of a DGAConfig's fields, or a field is out of its range.
        TypeError: a field is unknown or of the wrong type.
    """
    fields: Any = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"config: expected a JSON object of DGAConfig's fields, got {text!r}")
    if "block_size" in fields:
        fields["block_size"] = tuple(fields["block_size"])  # JSON has no tuples
    return DGAConfig(**fields)
