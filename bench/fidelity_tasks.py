"""Prompts with one right answer, made on the spot: needles, variable tracking, common words.

Variable tracking and common words follow RULER (arXiv 2404.06654), shortened so that one value or
word is asked for. A prompt is filler with sentences put into it, then a question, and has exactly
the number of tokens that is asked for.
"""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flexdga import DGACache, DGAConfig, applied
from flexdga.cache import DGALayer

from .errors import UsageError
from .workloads import next_logits

Encode = Callable[[str], list[int]]
"""Token ids of a text, without special tokens."""
Task = Literal["needle", "tracking", "words"]
Variant = Literal["single", "keys", "long"]
VARIANTS: tuple[Variant, ...] = ("single", "keys", "long")

CITIES = ("Paris", "Tokyo", "Cairo", "Lima", "Oslo", "Delhi", "Rome", "Quito")
KEYS = 4
DIGITS = {"single": 5, "keys": 5, "long": 12}
HOPS = 2
CHAINS = 2
WORDS = (
    "apple", "river", "stone", "cloud", "table", "horse", "music", "paper", "glass", "train",
    "bread", "light", "ocean", "forest", "winter", "summer", "garden", "bridge", "candle",
    "mirror", "engine", "island", "pepper", "rocket", "silver", "spider", "temple", "turtle",
    "valley", "violin", "wagon", "window", "basket", "butter", "carpet", "castle", "copper",
    "cotton", "desert", "dragon", "falcon", "flower", "guitar", "hammer", "helmet", "jacket",
    "kettle", "ladder", "lemon", "marble", "needle", "orange", "pencil", "pillow", "planet",
    "pocket", "ribbon", "saddle", "shadow", "tunnel",
)  # fmt: skip
SHARES = (0.3, 0.1, 0.1)
"""How often the commonest words stand in a list; all others share the rest."""
DEAL = 20
"""Words by which a list grows, in these shares."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    Attributes:
        task: its name, and the variant's.
        depth: where the answer stands in the filler, 0 to 1; None where it is everywhere.
        prompt: token ids.
        answer: token ids that should follow.
        places: index in the prompt, and token ids, of each sentence put into the filler.
    """

    task: str
    depth: float | None
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    places: tuple[tuple[int, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes examples out of a filler text.

    Args:
        encode: the tokenizer.
        filler: token ids of a text without answers.
        prefix: the special tokens with which the model's texts begin.
        seed: every example has a random number generator of its own, made from this seed.
    """

    encode: Encode
    filler: Sequence[int]
    prefix: Sequence[int] = ()
    seed: int = 0

    def needle(self, variant: Variant, length: int, depth: float) -> Example:
        """A secret code at a depth; `keys` hides three more, `long` a code of 12 digits."""
        name = f"needle {variant}"
        rng = self._rng(name, length, depth)
        cities = rng.sample(CITIES, KEYS if variant == "keys" else 1)
        codes = ["".join(rng.choices(string.digits, k=DIGITS[variant])) for _ in cities]
        hidden = [
            ((depth + i / len(cities)) % 1, f"The secret code of {city} is {code}.")
            for i, (city, code) in enumerate(zip(cities, codes))
        ]
        hidden[0] = (depth, hidden[0][1])
        question = f"What is the secret code of {cities[0]}? The secret code of {cities[0]} is"
        return self._scatter(name, length, depth, hidden, question, codes[0])

    def tracking(self, length: int) -> Example:
        """Chains of variables that take each other's value; asked for is the last of one."""
        rng = self._rng("tracking", length)
        count = CHAINS * (HOPS + 1)
        names = ["".join(rng.choices(string.ascii_uppercase, k=3)) for _ in range(count)]
        while len(set(names)) < count:
            names = ["".join(rng.choices(string.ascii_uppercase, k=3)) for _ in range(count)]
        lines, values = [], []
        for chain in range(CHAINS):
            own = names[chain::CHAINS]
            values.append("".join(rng.choices(string.digits, k=5)))
            depths = sorted(rng.random() for _ in own)
            right = [values[-1], *(f"VAR {name}" for name in own)]
            lines += [(d, f"VAR {name} = {what}.") for d, name, what in zip(depths, own, right)]
        asked = names[::CHAINS][-1]
        question = f"What is the value of VAR {asked}? The value of VAR {asked} is"
        return self._scatter("tracking", length, None, lines, question, values[0])

    def words(self, length: int) -> Example:
        """A list of words; asked for is the most frequent."""
        rng = self._rng("words", length)
        common = rng.sample(WORDS, len(SHARES))
        rare = [word for word in WORDS if word not in common]
        question = (
            "\n\nWhich word is the most frequent in the list above? The most frequent word is"
        )
        asked, answer = self._ask(question, common[0])
        room = length - len(self.prefix) - len(asked)
        self._check(length, room, room)
        chosen: list[str] = []
        ids: list[int] = []
        while len(ids) < room:
            deal = [word for word, share in zip(common, SHARES) for _ in range(int(DEAL * share))]
            chosen += deal + rng.sample(rare, DEAL - len(deal))
            rng.shuffle(chosen)
            ids = self.encode(" " + " ".join(chosen))
        ids = ids[-room:]
        return Example("words", None, (*self.prefix, *ids, *asked), answer, ())

    def _rng(self, *what: Any) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *what))))

    def _ask(self, question: str, value: str) -> tuple[list[int], tuple[int, ...]]:
        """The question's tokens, and the answer's as they stand after it.

        A space between them belongs to the question wherever it is a token of its own: it would
        be an answer that is always right.
        """
        open_end, whole = self.encode(f"{question} "), self.encode(f"{question} {value}")
        same = 0
        while same < len(open_end) and open_end[same] == whole[same]:
            same += 1
        return whole[:same], tuple(whole[same:])

    def _scatter(
        self,
        task: str,
        length: int,
        depth: float | None,
        lines: Sequence[tuple[float, str]],
        question: str,
        value: str,
    ) -> Example:
        """Filler with each line at its depth, then the question."""
        asked, answer = self._ask(f"\n\n{question}", value)
        ordered = [(d, self.encode(f"\n{line}\n")) for d, line in sorted(lines)]
        room = length - len(self.prefix) - len(asked) - sum(len(ids) for _, ids in ordered)
        self._check(length, room, len(self.filler))
        prompt, places, used = list(self.prefix), [], 0
        for d, ids in ordered:
            at = round(d * room)
            prompt += self.filler[used:at]
            places.append((len(prompt), tuple(ids)))
            prompt += ids
            used = at
        prompt += [*self.filler[used:room], *asked]
        return Example(task, depth, tuple(prompt), answer, tuple(places))

    def _check(self, length: int, room: int, have: int) -> None:
        if room < 1:
            raise UsageError(
                f"--task-lengths: {length} tokens are too few for the question alone, expected at "
                f"least {length - room + 1}"
            )
        if have < room:
            raise UsageError(
                f"--text: a prompt of {length} tokens needs {room} tokens of filler, got {have}"
            )


@dataclasses.dataclass(frozen=True)
class Answered:
    """How a model answered.

    Attributes:
        exact: whether greedy decoding gives the answer.
        right: share of the answer's tokens that are the most likely ones after the true ones
            before them: for codes the accuracy of digits, where a digit is a token.
        nll: of the answer's tokens, mean in nats.
        seen: keys that a query after the prompt goes over, some of them hidden, as a share of the
            prompt's tokens; the most of the layers.
        kept: bytes of the cache after the prompt, reserves included, as a share of dense.
    """

    exact: bool
    right: float
    nll: float
    seen: float
    kept: float


def answer(
    model: Any,
    example: Example,
    config: DGAConfig | None,
    kv_dtype: Literal["int8"] | None = None,
) -> Answered:
    """Let a model answer: the prompt in one forward pass, then token by token from the cache.

    The true answer is fed, whatever the model says. If each of its tokens is the most likely one
    after those before it, greedy decoding would have given it, and only then: one pass tells both
    the likelihood and the exact match.

    Args:
        model: of transformers.
        example: what is asked.
        config: of DGA in prompt and cache; None = the model as it is, with a dense cache.
        kv_dtype: of the slots of DGA's cache.
    """
    from transformers import DynamicCache

    if config is None:
        return _fed(model, example, DynamicCache(config=model.config))
    # Plans depend on the config: to compile them all would take longer than to make them.
    with applied(model, config), torch.compiler.set_stance("eager_on_recompile"):
        cache = DGACache(config, model_config=model.config, kv_dtype=kv_dtype)
        return _fed(model, example, cache)


def _fed(model: Any, example: Example, cache: Any) -> Answered:
    truth = torch.tensor(example.answer, device=model.device)
    prompt = torch.tensor([example.prompt], device=model.device)
    parts = [_forward(model, prompt, cache)]
    seen = kept = 1.0
    if isinstance(cache, DGACache):
        own = [layer.cache for layer in cache.layers if isinstance(layer, DGALayer)]
        seen = max(layer.num_slots + layer.num_raw for layer in own) / len(example.prompt)
        kept = cache.memory().ratio
    parts += [_forward(model, token.view(1, 1), cache) for token in truth[:-1]]
    logits = torch.cat(parts)
    nll = torch.nn.functional.cross_entropy(logits, truth).item()
    hits = logits.argmax(-1) == truth
    return Answered(bool(hits.all()), hits.float().mean().item(), nll, seen, kept)


def _forward(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """(1, V) float32 logits of the next token."""
    return next_logits(model, ids, cache)[:, -1].float()
