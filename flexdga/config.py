"""`DGAConfig`: every choice that shapes a plan, validated when it is made."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, get_args

import torch

Importance = Literal["far_mean", "sum"]
Grouping = Literal["similarity", "sequence"]
GroupWeights = Literal["last_query", "mean", "importance"]
GroupBias = Literal["none", "mass"]
Scope = Literal["prompt", "causal"]
ProbePlacement = Literal["even", "tail"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "importance": get_args(Importance),
    "grouping": get_args(Grouping),
    "group_weights": get_args(GroupWeights),
    "group_bias": get_args(GroupBias),
    "scope": get_args(Scope),
    "probe_placement": get_args(ProbePlacement),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DGAConfig:
    """How tokens become focal, how the others are grouped, and when queries stop seeing them raw.

    The defaults are the best training-free setting measured on a real model; `DGAConfig.paper()`
    is the published algorithm, `DGAConfig.cca()` its predecessor. "Paper" below is Dynamic Group
    Attention (arXiv 2505.22107).

    Attributes:
        group_size: m, tokens in a group. Paper: 16.
        focal_ratio: γ in [0, 1], the share of the tokens that stay exact. Paper: 0.1. Rounded
            down, per document (flexdga's choice).
        focal_budget: the focal tokens of a prompt as a number; replaces `focal_ratio`.
        window: how many of the most recent tokens every query sees raw, itself included. With 0
            the last member of a group already sees the group in place of itself (paper).
        sinks: the first tokens of a document that are always focal. They count in the budget, and
            are kept where it is smaller than they are.
        probes: how many queries estimate the importance of keys: per prompt in `prompt` scope,
            per unit in `causal` scope.
        probe_placement: `even` spreads the probes over the prompt, `tail` takes its last queries
            (for a prompt that ends with a question). `causal` scope spreads them always.
        importance: `sum` accumulates the probes' attention weights (paper). `far_mean` takes
            their mean over the probes that see the token from beyond the window, smoothed over
            neighbours and weighted by the norm of the value (flexdga's choice).
        grouping: `sequence` groups in order (paper), `similarity` by likeness inside a unit.
        group_weights: a group's key and value are weighted means of its members', with the
            attention weights of the group's last query (`last_query`, paper), all equal
            (`mean`), or in proportion to importance (`importance`).
        group_bias: `none` (paper), or `mass`: add the entropy of the weights to the group's
            score, so that one slot carries the attention mass of all its members.
        scope: what a plan may look at. `prompt`: the whole prompt plans the prompt. `causal`: no
            output depends on a later token.
        open_units: raw units opened per query block. Only 0 is available in this release.
        unit_size: tokens in a unit, the stretch in which `similarity` groups and `causal` scope
            decide, and which a `DGACache` pools at a time: the paper's m' when decoding, 1.1·m,
            which is 18 for m = 16. With `similarity` it is `group_size` times a power of two.
        align: round the end of a token's raw life up to a multiple of the query block, so that
            few blocks are partial. Off in `paper()` and `cca()`, which are exact to the letter.
        block_size: (query, key) tile of the kernel.
        dense_below: prompts shorter than this take exact dense attention, and so does decoding
            while the text is shorter; 0 = never. The default is where SDPA stops being faster on
            a CPU with AVX-512 (flexdga-bench shows it).

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
        TypeError: a field is of the wrong type.
    """

    group_size: int = 16
    focal_ratio: float = 1 / 16
    focal_budget: int | None = None
    window: int = 128
    sinks: int = 4
    probes: int = 64
    probe_placement: ProbePlacement = "even"
    importance: Importance = "far_mean"
    grouping: Grouping = "sequence"
    group_weights: GroupWeights = "last_query"
    group_bias: GroupBias = "none"
    scope: Scope = "prompt"
    open_units: int = 0
    unit_size: int = 128
    align: bool = True
    block_size: tuple[int, int] = (128, 128)
    dense_below: int = 6144

    def __post_init__(self) -> None:
        for name, low, high in (
            ("group_size", 1, 4096),
            ("window", 0, None),
            ("sinks", 0, None),
            ("probes", 1, None),
            ("open_units", 0, None),
            ("unit_size", 1, None),
            ("dense_below", 0, None),
        ):
            self._check_int(name, getattr(self, name), low, high)
        if self.focal_budget is not None:
            self._check_int("focal_budget", self.focal_budget, 0, None)
        if isinstance(self.focal_ratio, bool) or not isinstance(self.focal_ratio, (int, float)):
            raise TypeError(f"focal_ratio: expected a float in [0, 1], got {self.focal_ratio!r}")
        if not 0 <= self.focal_ratio <= 1:  # false for NaN too
            raise ValueError(f"focal_ratio: expected a float in [0, 1], got {self.focal_ratio!r}")
        if not isinstance(self.align, bool):
            raise TypeError(f"align: expected a bool, got {self.align!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        self._check_block_size()
        self._derive()
        self._check_combinations()

    @staticmethod
    def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
        span = f"an int from {low} to {high}" if high is not None else f"an int ≥ {low}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected {span}, got {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name}: expected {span}, got {value}")

    def _check_block_size(self) -> None:
        size = self.block_size
        if not isinstance(size, tuple) or len(size) != 2:
            raise TypeError(f"block_size: expected a (query, key) tuple of ints, got {size!r}")
        for value in size:
            self._check_int("block_size", value, 16, 1024)
            if value & (value - 1):
                raise ValueError(f"block_size: expected powers of two, got {size}")

    def _check_combinations(self) -> None:
        room = self.step
        if self.sinks > room:
            raise ValueError(
                f"sinks: expected at most {room} (a step of the plan), got {self.sinks}"
            )
        if self.open_units:
            raise ValueError(
                f"open_units: expected 0 (opening raw units is not available in this release), "
                f"got {self.open_units}"
            )
        if self.grouping == "similarity":
            groups, rest = divmod(self.unit_size, self.group_size)
            if rest or groups & (groups - 1):
                raise ValueError(
                    f"unit_size: with grouping='similarity' expected group_size "
                    f"({self.group_size}) times a power of two, got {self.unit_size}"
                )
        if self.scope == "causal" and self.focal_budget is not None:
            raise ValueError(
                f"focal_budget: a budget for the whole prompt cannot be shared out causally, use "
                f"focal_ratio; expected None with scope='causal', got {self.focal_budget}"
            )
        if self.scope == "causal" and self.probe_placement == "tail":
            raise ValueError(
                "probe_placement: the last queries of a prompt cannot plan it causally; expected "
                "'even' with scope='causal', got 'tail'"
            )

    @classmethod
    def paper(cls, **changes: Any) -> DGAConfig:
        """Dynamic Group Attention as published: γ = 0.1, m = 16, no raw window, no bias.

        What the paper leaves open is decided so: probes are spread evenly; the score is summed
        over the query heads that share a KV head; γL is rounded down; a remainder shorter than m
        stays raw; the last member of a group sees the group, not itself. `changes` override.
        """
        base: dict[str, Any] = {
            "focal_ratio": 0.1,
            "window": 0,
            "sinks": 0,
            "importance": "sum",
            "grouping": "sequence",
            "group_bias": "none",
            "align": False,
            "dense_below": 0,
        }
        return cls(**(base | changes))

    @classmethod
    def cca(cls, **changes: Any) -> DGAConfig:
        """Core Context Aware attention (arXiv 2412.12465): fixed groups and a raw window.

        Groups of 16 contiguous tokens beyond a window of 1024, the defaults of the authors' code;
        no focal tokens. `changes` override.
        """
        return cls.paper(**({"focal_ratio": 0.0, "window": 1024} | changes))

    # Derived once; fields and not properties, so that compilers find constants in them.
    whole_sequence: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether groups run over the whole prompt instead of staying inside units."""
    step: int = dataclasses.field(init=False, repr=False, compare=False)
    """Sequences are planned in whole steps of this many tokens, the last filled with padding.

    Every table's size is then a multiple of the number of steps: simple symbolic shapes, and
    sections that start on key blocks.
    """
    needs_importance: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether anything depends on the importance of tokens."""
    focal_per_step: int = dataclasses.field(init=False, repr=False, compare=False)
    """Focal slots set aside for each step of the sequence."""
    focal_per_unit: int = dataclasses.field(init=False, repr=False, compare=False)
    """γ of a unit, rounded down: what `causal` scope chooses from each."""
    focal_share: tuple[int, int] = dataclasses.field(init=False, repr=False, compare=False)
    """γ as the ratio that the user wrote: 0.1 is 1/10, not the binary fraction below it."""

    def _derive(self) -> None:
        derive = functools.partial(object.__setattr__, self)
        whole = self.scope == "prompt" and self.grouping == "sequence"
        derive("whole_sequence", whole)
        derive("step", math.lcm(*self.block_size, 1 if whole else self.unit_size))
        focal = self.focal_ratio if self.focal_budget is None else self.focal_budget
        derive("needs_importance", focal > 0 or self.group_weights == "importance")
        share = Fraction(self.focal_ratio).limit_denominator(1 << 20)
        derive("focal_share", share.as_integer_ratio())
        derive("focal_per_unit", math.floor(self.unit_size * share))
        if self.scope == "causal":
            per_step = self.focal_per_unit * (self.step // self.unit_size)
        else:
            per_step = math.ceil(self.step * (share if self.focal_budget is None else 1))
        derive("focal_per_step", per_step)


LayerRule = Callable[[int], DGAConfig | None]
"""The configuration of each layer by its number; None leaves a layer dense."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def as_constant(config: DGAConfig) -> DGAConfig:
    """A copy whose fields are constants to a compiler that traces this.

    Under `dynamic=True` it would make symbols of the integers otherwise. It must be a copy: the
    compiler knows the config itself already, as an object with variable fields.
    """
    return dataclasses.replace(config)
