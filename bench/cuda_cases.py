"""What `flexdga-bench cuda-check` compiles: calls of flexdga on tensors without data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from flexdga import DGAConfig, Plan, dga_attention, make_plan
from flexdga.decode import LayerCache

Program = Literal["attend", "call", "graph", "decode"]
CONFIGS = {
    "opens": DGAConfig.auto(0.15, open_by="landmarks", scope="causal", dense_below=0),
    "groups": DGAConfig(
        scope="causal", dense_below=0, rest="group", open_units=0, focal_ratio=0.1, window=96,
        group_bias="mass", unit_size=32, block_size=(32, 32),
    ),
}  # fmt: skip
"""The default and a grouped one, in the scope of training and of decoding."""
LENGTH = 2048
KV_HEADS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One program for one shape.

    Attributes:
        program: `attend` compresses, builds the block mask and attends, with a plan that is given;
            `call` is `dga_attention` as called without a compiler around it, planner included,
            which compiles itself for any length; `graph` the same inside somebody's
            `torch.compile(fullgraph=True)`; `decode` one step of a `LayerCache`, which is what
            `dga_decode` calls, in such a compile.
        config: of `CONFIGS`.
        ratio: query heads for each KV head.
        head_dim: D.
        dtype: by name.
        backward: whether gradients are compiled too.
        score_mod: whether one with a parameter that wants a gradient is in it.
        kernel_options: as `dga_attention` takes them.
    """

    program: Program
    config: str
    ratio: int = 4
    head_dim: int = 64
    dtype: str = "bfloat16"
    backward: bool = False
    score_mod: bool = False
    kernel_options: dict[str, Any] | None = None

    def __str__(self) -> str:
        parts = [self.program, self.config, f"1:{self.ratio}", f"D={self.head_dim}"]
        parts.append({"bfloat16": "bf16", "float16": "fp16"}[self.dtype])
        parts += ["mod"] * self.score_mod + ["train"] * self.backward
        return " ".join(parts)


SHAPES = (
    # ratio, head_dim, dtype, backward, score_mod: of any two every combination is here
    (1, 64, "bfloat16", False, False),
    (1, 128, "float16", True, False),
    (3, 64, "float16", True, False),
    (3, 128, "bfloat16", False, False),
    (4, 64, "bfloat16", True, True),
    (4, 128, "float16", False, True),
)


def all_cases() -> list[Case]:
    """Each config with `SHAPES`, and then with its planner."""
    cases = []
    for config in CONFIGS:
        cases += [Case("attend", config, *shape) for shape in SHAPES]
        cases += [Case("call", config), Case("graph", config, backward=True)]
    return [*cases, Case("decode", "groups")]


def quick_cases() -> list[Case]:
    """A forward pass, gradients and a decode step."""
    return [
        Case("attend", "opens", ratio=3),
        Case("attend", "opens", head_dim=128, dtype="float16", backward=True),
        Case("attend", "groups", backward=True, score_mod=True),
        Case("decode", "groups"),
    ]


def execute(case: Case) -> None:
    """Compile and run a case on tensors without data; inside a FakeTensorMode."""
    torch._dynamo.reset()
    config = CONFIGS[case.config]
    if case.program == "decode":
        _decode(case, config)
        return
    query, key, value = (_tensor(case, heads, LENGTH) for heads in _heads(case))
    extra: dict[str, Any] = {"kernel_options": case.kernel_options}
    inputs = [query, key, value]
    if case.program == "attend":
        extra["plan"] = _plan(query, key, value, config)
    if case.score_mod:
        slope = torch.empty(query.shape[1], device="cuda", requires_grad=True)
        extra["score_mod"] = _score_mod(slope)
        inputs.append(slope)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dga_attention(query, key, value, config=config, **extra)

    call = attend if case.program == "call" else _compiled(attend)
    with torch.set_grad_enabled(case.backward):
        out = call(query, key, value)
        if case.backward:
            torch.autograd.grad(out, inputs, torch.empty_like(out))


def _heads(case: Case) -> tuple[int, int, int]:
    return KV_HEADS * case.ratio, KV_HEADS, KV_HEADS


def _tensor(case: Case, heads: int, length: int) -> Tensor:
    dtype = getattr(torch, case.dtype)
    return torch.empty(
        1, heads, length, case.head_dim, dtype=dtype, device="cuda", requires_grad=case.backward
    )


def _plan(query: Tensor, key: Tensor, value: Tensor, config: DGAConfig) -> Plan:
    """Its tensors have no data, but the right sizes; nothing is compiled for them."""
    torch.compiler.set_stance("force_eager")
    try:
        return make_plan(query.detach(), key.detach(), value.detach(), config=config)
    finally:
        torch.compiler.set_stance("default")


def _score_mod(slope: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + slope[h] * (k - q)

    return score_mod


def _decode(case: Case, config: DGAConfig) -> None:
    """A step over slots and raw tokens, at which nothing is handed over.

    The tokens before it come one by one, uncompiled, on the pretended device too: a tensor on
    another would raise.
    """
    cache = LayerCache(dataclasses.replace(config, dense_below=64))

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cache.attend(query, key, value)

    def token() -> list[Tensor]:
        return [_tensor(case, heads, 1) for heads in _heads(case)]

    with torch.no_grad():
        torch.compiler.set_stance("force_eager")
        try:
            while cache.num_slots == cache.num_raw or cache.seen % config.unit_size != 8:
                step(*token())
        finally:
            torch.compiler.set_stance("default")
        _compiled(step)(*token())


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled
