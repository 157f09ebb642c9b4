"""The score mods. All tensors they capture must live on the device of the query."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def softcap(cap: float) -> ScoreMod:
    """cap · tanh(score / cap): scores stay within ±cap (Gemma 2, arXiv 2408.00118).

    Raises:
        ValueError: `cap` is not positive.
    """
    if not cap > 0:
        raise ValueError(f"cap: expected a positive number, got {cap!r}")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return _elementwise(score_mod)


def alibi(slopes: Tensor) -> ScoreMod:
    """Score − slope_h · |q − kv|: attention with linear biases (arXiv 2108.12409).

    Args:
        slopes: (H,) floating point, one per query head.
    """
    _check("slopes", slopes, 1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx - kv_idx).abs()

    return _elementwise(score_mod)


def relative_bias(table: Tensor) -> ScoreMod:
    """Score + table[h, clip(q − kv)]: a learned bias by distance.

    Args:
        table: (H, 2R − 1) floating point, for distances −(R − 1) … R − 1; farther ones take the
            table's ends.
    """
    _check("table", table, 2)
    if table.shape[1] % 2 == 0:
        raise ValueError(f"table: expected an odd number of distances, got {tuple(table.shape)}")
    reach = table.shape[1] // 2

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + table[h, (q_idx - kv_idx).clamp(-reach, reach) + reach]

    return _elementwise(score_mod)


def group_mass(entropy: Tensor) -> ScoreMod:
    """Score + entropy[b, h, kv]: one key that stands for several carries their mass.

    For a key k = Σ p_i k_i, the tight lower bound of log Σ exp(q·k_i) that is linear in the scores
    is q·k + H(p), H the entropy of p (Jensen's inequality; with equal weights it is log m).

    Args:
        entropy: (B, Hkv, KV) floating point, H(p) of each key; 0 for a key that stands for itself.
            Query heads share it as they share keys, H query heads at a time, if H / Hkv is given
            by `entropy.repeat_interleave`; otherwise pass one row per query head.
    """
    _check("entropy", entropy, 3)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + entropy[b, h, kv_idx]

    return _elementwise(score_mod)


def attention_sinks(logits: Tensor, index: int = -1) -> ScoreMod:
    """A learned logit per head that takes part in the softmax and carries no value (GPT-OSS).

    The column `index` of the keys stands for it: a key and a value of zeros. flexdga adds that
    column itself, at −1; with plain flex_attention add one, let the mask admit it, and say where.
    In a `compose`, put it last.

    Args:
        logits: (H,) floating point.
        index: the column.
    """
    _check("logits", logits, 1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(kv_idx == index, logits[h].to(score.dtype), score)

    score_mod.needs_null_slot = index < 0  # type: ignore[attr-defined]
    return _elementwise(score_mod)


def compose(*mods: ScoreMod) -> ScoreMod:
    """One mod after the other, the first one first."""
    for mod in mods:
        if not callable(mod):
            raise TypeError(f"mods: expected callables, got {type(mod).__name__}")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for mod in mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    score_mod.needs_null_slot = any(map(needs_null_slot, mods))  # type: ignore[attr-defined]
    return _elementwise(score_mod) if all(map(is_elementwise, mods)) else score_mod


def needs_null_slot(mod: ScoreMod | None) -> bool:
    """Whether `mod` counts on a column at −1 with a key and a value of zeros."""
    return bool(getattr(mod, "needs_null_slot", False))


def is_elementwise(mod: ScoreMod) -> bool:
    """Whether `mod` may be given all scores at once, with indices that broadcast to them."""
    return bool(getattr(mod, "elementwise", False))


def _elementwise(mod: ScoreMod) -> ScoreMod:
    mod.elementwise = True  # type: ignore[attr-defined]
    return mod


def _check(name: str, tensor: Tensor, dims: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() != dims or not tensor.is_floating_point():
        raise ValueError(
            f"{name}: expected {dims} dimension(s) of floating point, got "
            f"{tuple(tensor.shape)} {tensor.dtype}"
        )
