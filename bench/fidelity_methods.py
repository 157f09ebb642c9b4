"""What `flexdga-bench fidelity` compares: methods, how they get into a model, what it then loses.

A budget is a share of the score entries of dense causal attention, `Plan.cost()`. Each rival has
one free parameter, chosen so that a plan for the length at hand costs what the budget allows.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from flexdga import DGACache, DGAConfig, applied, dga_attention, make_plan
from flexdga.cache import CACHE_NAME
from flexdga.config import Scope

from .attended import attended_by
from .errors import UsageError
from .workloads import QKV, random_like

DENSE = "dense"
SNAPKV_WINDOW = 64
FINE = 16
"""Tokens that leave a cache's window together, where a prompt's plan does not depend on it."""
TO_THE_LETTER: dict[str, Any] = {"unit_size": 1, "align": False}
"""Every token leaves the window by itself, when its time has come."""
CHUNK = 256
"""Positions whose log-probabilities over the vocabulary are formed at a time."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
TURN = 64
"""Tokens that are read at a time where a text comes over a cache."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to spend a budget.

    Attributes:
        name: on the command line and in tables.
        at: the configuration for (budget, length, scope).
        what: a line for the legend.
        budgeted: whether it heeds the budget; otherwise it runs once.
        in_lm: whether it does anything to a text that is only read.
    """

    name: str
    at: Callable[[float, int, Scope], DGAConfig]
    what: str
    budgeted: bool = True
    in_lm: bool = True


def _auto(budget: float, length: int, scope: Scope) -> DGAConfig:
    return DGAConfig.auto(budget=_over_4096(budget, length), scope=scope, dense_below=0)


def _landmarks(budget: float, length: int, scope: Scope) -> DGAConfig:
    budget = _over_4096(budget, length)
    return DGAConfig.auto(budget=budget, open_by="landmarks", scope=scope, dense_below=0)


def _over_4096(budget: float, length: int) -> float:
    """What costs so much of a longer text, in which a threshold opens a little more."""
    return max(budget, min(budget * (length / 4096) ** 0.8, 0.5))


def _cca(budget: float, length: int, scope: Scope) -> DGAConfig:
    return fit(lambda n: DGAConfig.cca(window=n, scope=scope, unit_size=16), budget, length)


def _streaming_llm(budget: float, length: int, scope: Scope) -> DGAConfig:
    return fit(
        lambda n: DGAConfig.streaming_llm(window=n, sinks=4, scope=scope, **TO_THE_LETTER),
        budget, length,
    )  # fmt: skip


def _lm_infinite(budget: float, length: int, scope: Scope) -> DGAConfig:
    return fit(
        lambda n: DGAConfig.lm_infinite(window=n, sinks=16, scope=scope, **TO_THE_LETTER),
        budget, length,
    )  # fmt: skip


def _h2o(budget: float, length: int, scope: Scope) -> DGAConfig:
    unit = 128 if scope == "causal" else FINE
    return fit(
        lambda n: DGAConfig.h2o(
            window=n, focal_ratio=n / length, scope=scope, unit_size=unit, align=False
        ),
        budget, length,
    )  # fmt: skip


def _snapkv(budget: float, length: int, scope: Scope) -> DGAConfig:
    """Its budget is of what decoding sees: focal tokens and the window."""
    share = max(budget - SNAPKV_WINDOW / length, 0.0)
    return DGAConfig.snapkv(
        focal_ratio=share, window=SNAPKV_WINDOW, scope=scope, unit_size=FINE, align=False
    )


def _block_selection(budget: float, length: int, scope: Scope) -> DGAConfig:
    """With a smaller window in short texts, of which the preset's would be most of a budget."""
    window = min(64, max(32, length // 32))
    return fit(
        lambda n: DGAConfig.block_selection(open_units=n, window=window, scope=scope),
        budget, length,
    )  # fmt: skip


METHODS = {
    method.name: method
    for method in (
        Method("auto", _auto, "DGAConfig.auto(budget); over 8192 tokens of 1.7 times the budget"),
        Method("landmarks", _landmarks, "the same with open_by='landmarks'"),
        Method("default", lambda b, n, scope: DGAConfig(scope=scope, dense_below=0),
               "DGAConfig(), no budget", budgeted=False),
        Method("paper", lambda b, n, scope: DGAConfig.paper(scope=scope),
               "Dynamic Group Attention as published, no budget", budgeted=False),
        Method("cca", _cca, "Core Context Aware attention; window by budget"),
        Method("streaming_llm", _streaming_llm, "window by budget, 4 sinks"),
        Method("lm_infinite", _lm_infinite, "window by budget, 16 sinks"),
        Method("h2o", _h2o, "as many heavy hitters as tokens in the window, by budget"),
        Method("snapkv", _snapkv, "dense over the prompt; the budget is of what decoding sees",
               in_lm=False),
        Method("block_selection", _block_selection, "Quest/MoBA; number of blocks by budget"),
    )
}  # fmt: skip


def fixed(name: str, config: DGAConfig, what: str) -> Method:
    """A method of one configuration."""
    return Method(
        name,
        lambda budget, length, scope: dataclasses.replace(config, scope=scope),
        what,
        budgeted=False,
    )


def fit(make: Callable[[int], DGAConfig], budget: float, length: int) -> DGAConfig:
    """The configuration whose plan comes nearest to a budget, by bisection.

    Args:
        make: a configuration from its free parameter, from 1 to `length`; cost grows with it.
        budget: the cost to come near to.
        length: of the text.
    """
    low, high = 1, length  # the nearest is one of the two that lie around the budget
    while high - low > 1:
        middle = (low + high) // 2
        if plan_cost(make(middle), length) <= budget:
            low = middle
        else:
            high = middle
    return min((make(low), make(high)), key=lambda config: abs(plan_cost(config, length) - budget))


@functools.cache
def plan_cost(config: DGAConfig, length: int) -> float:
    """`Plan.cost()` of one small random head: exact where cost does not depend on the data.

    A prompt that is attended to densely costs 1.
    """
    if config.prefill == "dense" or length < (config.dense_below or 0):
        return 1.0
    generator = torch.Generator().manual_seed(0)
    qkv = (torch.randn(1, 1, length, 16, generator=generator) for _ in range(3))
    # Each length and configuration would be compiled anew.
    with torch.compiler.set_stance("force_eager"):
        return make_plan(*qkv, config=config).cost()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method at a budget (None: it heeds none) and a length; no config is dense attention."""

    method: str
    budget: float | None
    config: DGAConfig | None


def entries(
    methods: Sequence[Method], budgets: Sequence[float], length: int, scope: Scope
) -> list[Entry]:
    """Dense, then every method at every budget; to read a text (`causal` scope), or for tasks."""
    found = [Entry(DENSE, None, None)]
    for method in methods:
        if scope == "causal" and not method.in_lm:
            continue
        for budget in budgets if method.budgeted else (None,):
            try:
                config = method.at(budget or 0.0, length, scope)
            except ValueError as error:  # DGAConfig says what does not go together
                raise UsageError(f"{method.name}, {scope} scope: {error}") from error
            found.append(Entry(method.name, budget, config))
    return found


@dataclasses.dataclass
class Planned:
    """What planning cost in one forward pass, layer by layer."""

    costs: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def cost(self) -> float:
        """Mean over the layers; 1 where none was planned."""
        return statistics.mean(self.costs) if self.costs else 1.0


def planning(config: DGAConfig, compiled: bool) -> AbstractContextManager[Any]:
    """How plans are made: by compiled code, of which every configuration needs its own, or not.

    Compiling takes some 7 s, and openings of 4096 tokens in 30 layers 5 to 10 s without. Other
    plans take a fraction of that.
    """
    compiled = compiled and config.opens
    return nullcontext() if compiled else torch.compiler.set_stance("force_eager")


@contextmanager
def planned(model: Any, config: DGAConfig | None, *, compiled: bool = False) -> Iterator[Planned]:
    """Plan every layer of a transformers model by `config`, or leave it dense (None).

    Attention itself is always compiled, and shared. For `compiled` see `planning`.
    """
    found = Planned()

    def attend(x: QKV) -> Tensor:
        assert config is not None
        begin = time.perf_counter()
        with planning(config, compiled):
            plan = make_plan(x.query, x.key, x.value, config=config, scale=x.scale)
        found.seconds.append(time.perf_counter() - begin)
        found.costs.append(plan.cost())
        return dga_attention(x.query, x.key, x.value, config=config, scale=x.scale, plan=plan)

    with nullcontext() if config is None else attended_by(model, attend):
        yield found


def prompt_cost(
    model: Any, prompt: Sequence[int], config: DGAConfig | None, *, compiled: bool = False
) -> float:
    """Cost of the plans for a prompt: read off the model where the data decide on it."""
    if config is None:
        return 1.0
    if not config.opens or config.open_mass == 0:
        return plan_cost(config, len(prompt))
    ids = torch.tensor([prompt], device=model.device)
    with planned(model, config, compiled=compiled) as plans:
        model(ids, use_cache=False, logits_to_keep=1)
    return plans.cost


def compile_kernel(model: Any, config: DGAConfig, length: int, *, compiled: bool = False) -> None:
    """Compile attention for the model's heads, if `config` needs a kernel that is not there yet.

    Where plans are made by compiled code, it is compiled too.

    The length is that of the texts to come, so that whatever depends on it is compiled here.
    """
    query, key, value = random_like(model, length)
    with planning(config, compiled):
        plan = make_plan(query, key, value, config=config)
    dga_attention(query, key, value, config=config, plan=plan)


def keep_memory() -> None:
    """Have glibc keep what is freed: tensors of megabytes come back with every layer.

    Fresh from the system they would take as long as the arithmetic on them. Elsewhere nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, 2**31 - 1)


# What is read off a model's logits


def next_token_logits(model: Any, ids: Tensor) -> Tensor:
    """(L - 1, V): what follows each token but the last of (1, L) ids."""
    logits: Tensor = model(ids, use_cache=False).logits[0, :-1]
    return logits


def logits_over_cache(
    model: Any, ids: Tensor, config: DGAConfig, kv_dtype: Literal["int8"] | None
) -> Tensor:
    """`next_token_logits`, but the text comes `TURN` tokens at a time, over a `DGACache`."""
    cache = DGACache(config, model_config=model.config, kv_dtype=kv_dtype)
    with applied(model, config), torch.compiler.set_stance("eager_on_recompile"):
        parts = [
            model(turn, **{CACHE_NAME: cache}, use_cache=True).logits[0]
            for turn in ids.split(TURN, 1)
        ]
    return torch.cat(parts)[:-1]


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """(L - 1,) float32: nats of tokens 1 to L - 1 of (1, L) ids, each given those before it."""
    chunks = zip(logits.split(CHUNK), ids[0, 1:].split(CHUNK))
    losses = [torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in chunks]
    return torch.cat(losses)


def tail_log_probs(logits: Tensor, start: int) -> Tensor:
    """(L - start, V) float32 log-probabilities of the (L, V) logits from `start` on."""
    tail = torch.empty(logits.shape[0] - start, logits.shape[1], device=logits.device)
    for to, x in zip(tail.split(CHUNK), logits[start:].split(CHUNK)):
        torch.log_softmax(x.float(), -1, out=to)
    return tail


def compare(dense: Tensor, logits: Tensor) -> tuple[float, float]:
    """KL(dense || method) in nats per position, and how often both have the same likeliest token.

    Args:
        dense: (T, V) log-probabilities.
        logits: (T, V) of the method.
    """
    divergence, same = 0.0, 0
    for p, x in zip(dense.split(CHUNK), logits.split(CHUNK)):
        q = x.float().log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return divergence / len(dense), same / len(dense)
