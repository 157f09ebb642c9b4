"""`DGAConfig`: every choice that shapes a plan, validated when it is made."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, get_args

import torch

from flexdga.plan import NEVER

Importance = Literal["far_mean", "sum", "peak"]
Grouping = Literal["similarity", "sequence"]
GroupWeights = Literal["last_query", "mean", "importance"]
GroupBias = Literal["none", "mass"]
Rest = Literal["group", "drop"]
OpenBy = Literal["landmarks", "exact"]
KeepRaw = Literal["none", "full", "int8", "cpu"]
Prefill = Literal["sparse", "dense"]
Scope = Literal["prompt", "causal"]
ProbePlacement = Literal["even", "tail"]

COARSE = 16
"""Units that are weighed together where they are far away."""

AUTO_BUDGETS = {
    "landmarks": ((0.06, 0.17), (0.10, 0.058), (0.15, 0.029), (0.22, 0.0145), (0.5, 0.0022)),
    "exact": ((0.06, 0.065), (0.10, 0.0225), (0.15, 0.010), (0.22, 0.0046), (0.5, 0.0005)),
}
"""Budgets and the `open_mass` that comes near to them. SmolLM2-135M reading 4096 tokens of English
cost .058, .101, .149, .215 and .485 by `landmarks`, and .061, .100, .150, .221 and .47 by `exact`;
over code no more."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "importance": get_args(Importance),
    "grouping": get_args(Grouping),
    "group_weights": get_args(GroupWeights),
    "group_bias": get_args(GroupBias),
    "rest": get_args(Rest),
    "open_by": get_args(OpenBy),
    "keep_raw": get_args(KeepRaw),
    "prefill": get_args(Prefill),
    "scope": get_args(Scope),
    "probe_placement": get_args(ProbePlacement),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DGAConfig:
    """Which tokens stay exact, what stands for the others, and which of them queries open again.

    The defaults are the best training-free setting measured on a real model (a window, and the
    units that a query opens); `DGAConfig.paper()` is the published algorithm, `DGAConfig.cca()`
    its predecessor. "Paper" below is Dynamic Group Attention (arXiv 2505.22107).

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
            neighbours and weighted by the norm of the value (flexdga's choice). `peak` takes the
            highest weight that any probe of any head gives to the token or a neighbour (SnapKV's
            observation window, arXiv 2404.14469, with a maximum in place of its sum).
        grouping: `sequence` groups in order (paper), `similarity` by likeness inside a unit.
        group_weights: a group's key and value are weighted means of its members', with the
            attention weights of the group's last query (`last_query`, paper), all equal
            (`mean`), or in proportion to importance (`importance`).
        group_bias: `none` (paper), or `mass`: add the entropy of the weights to the group's
            score, so that one slot carries the attention mass of all its members.
        rest: what becomes of tokens that are not focal once they leave the window. `group`: a
            group stands for them (paper). `drop`: nothing does, except where their unit is open.
        open_units: how many units, of `block_size[1]` raw tokens each, a query block may open, in
            each query head; their slots hide meanwhile. 0 = none, None = all that `open_mass`
            lets through. What one query opens stays open to the end of its query block.
        open_mass: the share of a query's attention that a unit must seem to hold for the query to
            open it, in [0, 1).
        open_by: how that share is estimated. `exact`: from the best of the unit's keys, for which
            all scores are computed, in bfloat16; it opens what is needed and little else, and on
            CPU it is the fastest. `landmarks`, for GPUs, exports and `flexdga.parallel`: from the
            four of the unit's keys that lie farthest from their mean, and the smallest box around
            the others, 6/`block_size[1]` of that arithmetic. In causal attention either knows
            units far away by a box alone, `landmarks` those more than 4096 to 6144 tokens away,
            `exact` those beyond 6144 to 8192 (the box after Quest, arXiv 2406.10774; the rest is
            flexdga's choice). `auto` knows good blocks and shares for either.
        coarse_beyond: a query with more tokens than this to open from weighs and opens units by
            themselves in the last quarter of so many, and sixteen at a time before that, by the
            mean of their estimates, so that planning hardly grows with the length: 8192, for
            example. None: always by themselves, as inside compilers, with `exact`, with a number of
            `open_units`, and in attention that is not causal.
        keep_raw: what a `DGACache` keeps of tokens that left the window, for decoding to open:
            `full`, `int8` (per token and head), `cpu` (in host memory), or `none`, which frees
            them, and then decoding opens nothing. With `open_by="exact"` the keys are kept in
            bfloat16 besides, but for `int8`, where each step unpacks them: slow over long texts,
            for which `landmarks` is right.
        prefill: `dense` attends to a prompt densely, and only what a `DGACache` keeps of it is
            compressed (SnapKV).
        scope: what a plan may look at. `prompt`: the whole prompt plans the prompt. `causal`: no
            output depends on a later token.
        unit_size: tokens in a unit, the stretch in which `similarity` groups and `causal` scope
            decide, and which a `DGACache` pools at a time: the paper's m' when decoding, 1.1·m,
            which is 18 for m = 16. With `similarity` it is `group_size` times a power of two.
        align: round the end of a token's raw life up to a multiple of the query block, so that
            few blocks are partial. Off in `paper()` and `cca()`, which are exact to the letter.
        block_size: (query, key) tile of the kernel.
        dense_below: prompts shorter than this take exact dense attention, 0 = none, and a
            `DGACache` keeps shorter texts whole. None = where DGA is expected to overtake dense
            attention with this config, these heads and this dtype (`flexdga.cost_model`), and for
            a `DGACache`, whose steps gain later, 4096 at least.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
        TypeError: a field is of the wrong type.
    """

    group_size: int = 16
    focal_ratio: float = 0.0
    focal_budget: int | None = None
    window: int = 64
    sinks: int = 4
    probes: int = 64
    probe_placement: ProbePlacement = "even"
    importance: Importance = "far_mean"
    grouping: Grouping = "sequence"
    group_weights: GroupWeights = "last_query"
    group_bias: GroupBias = "none"
    rest: Rest = "drop"
    open_units: int | None = None
    open_mass: float = 0.02
    open_by: OpenBy = "exact"
    coarse_beyond: int | None = None
    keep_raw: KeepRaw = "full"
    prefill: Prefill = "sparse"
    scope: Scope = "prompt"
    unit_size: int = 16
    align: bool = True
    block_size: tuple[int, int] = (32, 16)
    dense_below: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("group_size", 1, 4096),
            ("window", 0, None),
            ("sinks", 0, None),
            ("probes", 1, None),
            ("unit_size", 1, None),
        ):
            self._check_int(name, getattr(self, name), low, high)
        for name in ("focal_budget", "open_units", "coarse_beyond", "dense_below"):
            if getattr(self, name) is not None:
                self._check_int(name, getattr(self, name), 0, None)
        self._check_share("focal_ratio", self.focal_ratio, 1.0, "[0, 1]")
        self._check_share("open_mass", self.open_mass, math.nextafter(1.0, 0.0), "[0, 1)")
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

    @staticmethod
    def _check_share(name: str, value: Any, most: float, span: str) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float in {span}, got {value!r}")
        if not 0 <= value <= most:  # false for NaN too
            raise ValueError(f"{name}: expected a float in {span}, got {value!r}")

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
        if self.opens and self.unit_size != self.block_size[1]:
            raise ValueError(
                f"unit_size: units that open are key blocks of the kernel; expected "
                f"block_size[1] ({self.block_size[1]}) with open_units={self.open_units}, got "
                f"{self.unit_size}"
            )
        if self.opens and not self.align:
            raise ValueError(
                "align: units open at the bounds of query blocks; expected True with open_units, "
                "got False"
            )
        if self.opens and not self.window:
            raise ValueError(
                "window: a query must see itself raw; expected at least 1 with open_units, got 0"
            )
        if self.rest == "drop" and not self.window:
            raise ValueError(
                "window: with rest='drop' and without one a query sees nothing; expected at "
                "least 1, got 0"
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
            "rest": "group",
            "open_units": 0,
            "unit_size": 128,
            "block_size": (128, 128),
            "align": False,
            "dense_below": 0,
        }
        return cls(**(base | changes))

    @classmethod
    def auto(cls, budget: float, **changes: Any) -> DGAConfig:
        """The best setting found for a budget, to be checked on one's own model.

        Blocks and units are of 16 tokens (a tenth nearer to dense than the default's 32 × 16 at
        one budget, and as much slower), with `open_by="landmarks"` of 32, and a budget then goes
        half as far. The budget decides `open_mass` alone: no other window, share of focal tokens
        or rule by layer was better in all texts and at all budgets tried (bench/RESEARCH.md).

        Args:
            budget: score entries to compute, as a share of dense causal attention's over 4096
                tokens; about two thirds of it over 8192. What a text really costs is decided by
                `open_mass` as it is read, and differs from layer to layer: `Plan.cost` says it.
            changes: override.

        Raises:
            ValueError: the budget is not between 0.06 and 0.5.
        """
        open_by = changes.get("open_by", "exact")
        # A wrong name is refused below.
        budgets = AUTO_BUDGETS.get(open_by, AUTO_BUDGETS["exact"])
        low, high = budgets[0][0], budgets[-1][0]
        if not low <= budget <= high:
            raise ValueError(f"budget: expected {low} to {high}, got {budget!r}")
        pairs = itertools.pairwise(budgets)
        (x0, y0), (x1, y1) = next(pair for pair in pairs if budget <= pair[1][0])
        base: dict[str, Any] = {"open_mass": y0 * (y1 / y0) ** ((budget - x0) / (x1 - x0))}
        size = 32 if open_by == "landmarks" else 16
        return cls(**(base | {"block_size": (size, size), "unit_size": size} | changes))

    @classmethod
    def cca(cls, **changes: Any) -> DGAConfig:
        """Core Context Aware attention (arXiv 2412.12465): fixed groups and a raw window.

        Groups of 16 contiguous tokens beyond a window of 1024, the defaults of the authors' code;
        no focal tokens. `changes` override.
        """
        return cls.paper(**({"focal_ratio": 0.0, "window": 1024} | changes))

    @classmethod
    def dense(cls, **changes: Any) -> DGAConfig:
        """Exact dense attention at every length. `changes` override."""
        base: dict[str, Any] = {"dense_below": NEVER}
        return cls(**(base | changes))

    @classmethod
    def streaming_llm(cls, *, window: int = 1024, sinks: int = 4, **changes: Any) -> DGAConfig:
        """StreamingLLM (arXiv 2309.17453): a window and the first tokens, the rest dropped.

        Keys come rotated, so positions are those of the text, not of the cache.
        """
        return cls._exact_or_dropped(focal_ratio=0.0, window=window, sinks=sinks, **changes)

    @classmethod
    def lm_infinite(cls, *, window: int = 1024, sinks: int = 16, **changes: Any) -> DGAConfig:
        """LM-Infinite (arXiv 2308.16137): a Λ-shaped mask, as StreamingLLM with more first tokens.

        Its bound on distances acts beyond the length of the model's training; it is left out.
        """
        return cls.streaming_llm(window=window, sinks=sinks, **changes)

    @classmethod
    def h2o(cls, *, focal_ratio: float = 0.1, window: int = 256, **changes: Any) -> DGAConfig:
        """Heavy hitters (H2O, arXiv 2306.14048) and a window, the rest dropped.

        Heavy hitters are chosen by the attention summed over probes, by unit in `causal` scope.
        """
        base: dict[str, Any] = {
            "importance": "sum",
            "focal_ratio": focal_ratio,
            "window": window,
            "sinks": 0,
        }
        return cls._exact_or_dropped(**(base | changes))

    @classmethod
    def snapkv(cls, *, focal_ratio: float = 0.1, window: int = 64, **changes: Any) -> DGAConfig:
        """SnapKV (arXiv 2404.14469): dense over the prompt; its last queries choose what is kept.

        What is generated later leaves the window as in H2O.
        """
        base: dict[str, Any] = {
            "importance": "peak", "focal_ratio": focal_ratio, "window": window, "sinks": 0,
            "probes": 16, "probe_placement": "tail", "prefill": "dense",
        }  # fmt: skip
        return cls._exact_or_dropped(**(base | changes))

    @classmethod
    def block_selection(cls, *, open_units: int = 8, window: int = 64, **changes: Any) -> DGAConfig:
        """The best blocks of raw keys for each query block, a window and the first tokens.

        As Quest (arXiv 2406.10774) and MoBA (arXiv 2502.13189); the rest is dropped.
        """
        base: dict[str, Any] = {
            "open_units": open_units, "open_mass": 0.0, "focal_ratio": 0.0, "window": window,
        }  # fmt: skip
        return cls._exact_or_dropped(**(base | changes))

    @classmethod
    def _exact_or_dropped(cls, **fields: Any) -> DGAConfig:
        base: dict[str, Any] = {
            "rest": "drop", "open_units": 0, "open_by": "landmarks", "unit_size": 32,
            "block_size": (32, 32), "dense_below": 0,
        }  # fmt: skip
        return cls(**(base | fields))

    # Derived once; fields and not properties, so that compilers find constants in them.
    opens: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether query blocks may open units."""
    coarsens: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether causal attention weighs units together where they are far away."""
    groups: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether tokens are grouped."""
    only_sinks: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether nothing has a slot but sinks; a prompt then keeps them raw in place of copies."""
    whole_sequence: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether groups run over the whole prompt instead of staying inside units."""
    step: int = dataclasses.field(init=False, repr=False, compare=False)
    """Sequences are planned in whole steps of this many tokens, the last filled with padding.

    Every table's size is then a multiple of the number of steps: simple symbolic shapes, and
    sections that start on key blocks.
    """
    needs_importance: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether anything depends on the importance of tokens."""
    looks_ahead: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether, in causal attention, later tokens help to decide what earlier ones see."""
    focal_per_step: int = dataclasses.field(init=False, repr=False, compare=False)
    """Focal slots set aside for each step of the sequence."""
    focal_per_unit: int = dataclasses.field(init=False, repr=False, compare=False)
    """γ of a unit, rounded down: what `causal` scope chooses from each."""
    focal_share: tuple[int, int] = dataclasses.field(init=False, repr=False, compare=False)
    """γ as the ratio that the user wrote: 0.1 is 1/10, not the binary fraction below it."""

    def _derive(self) -> None:
        derive = functools.partial(object.__setattr__, self)
        derive("opens", self.open_units != 0)
        coarse = self.open_units is None and self.open_by == "landmarks"
        derive("coarsens", coarse and self.coarse_beyond is not None)
        derive("groups", self.rest == "group")
        whole = self.scope == "prompt" and self.grouping == "sequence" and not self.opens
        derive("whole_sequence", whole)
        derive("step", math.lcm(*self.block_size, 1 if whole else self.unit_size))
        focal = self.focal_ratio if self.focal_budget is None else self.focal_budget
        derive("only_sinks", not focal and not self.groups)
        derive("needs_importance", focal > 0 or self.group_weights == "importance")
        alike = self.groups and self.grouping == "similarity"
        chosen = self.opens or self.needs_importance or alike
        derive("looks_ahead", self.scope == "prompt" and chosen)
        share = Fraction(self.focal_ratio).limit_denominator(1 << 20)
        derive("focal_share", share.as_integer_ratio())
        derive("focal_per_unit", math.floor(self.unit_size * share))
        if self.scope == "causal":
            per_step = self.focal_per_unit * (self.step // self.unit_size)
        else:
            per_step = math.ceil(self.step * (share if self.focal_budget is None else 1))
        derive("focal_per_step", per_step)


BY_LANDMARKS = DGAConfig.auto(0.15, open_by="landmarks")
"""The default of `flexdga.parallel`, for by `exact` the keys of all ranks would travel."""

LayerRule = Callable[[int], DGAConfig | None]
"""The configuration of each layer by its number; None leaves a layer dense."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def as_constant(config: DGAConfig) -> DGAConfig:
    """A copy whose fields are constants to a compiler that traces this.

    Under `dynamic=True` it would make symbols of the integers otherwise. It must be a copy: the
    compiler knows the config itself already, as an object with variable fields.
    """
    return dataclasses.replace(config)
