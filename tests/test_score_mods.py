"""Each score mod in plain flex_attention, and through DGA at the slots' positions."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import TOLERANCE, qkv, relative_error, small
from torch.nn.attention.flex_attention import flex_attention

import score_mods
from flexdga import dga_attention, reference

pytestmark = pytest.mark.usefixtures("eager")

HEADS, LENGTH = 4, 90
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
TABLE = torch.linspace(-1, 1, HEADS * 41).view(HEADS, 41)
MODS = {
    "softcap": lambda: score_mods.softcap(1.5),
    "alibi": lambda: score_mods.alibi(SLOPES),
    "relative_bias": lambda: score_mods.relative_bias(TABLE),
    "compose": lambda: score_mods.compose(score_mods.softcap(3.0), score_mods.alibi(SLOPES)),
}


def expected(name, score):
    at = torch.arange(LENGTH)
    distance = (at[:, None] - at).double()
    softcap = lambda cap: cap * torch.tanh(score / cap)  # noqa: E731
    alibi = SLOPES.double()[:, None, None] * distance.abs()
    if name == "softcap":
        return softcap(1.5)
    if name == "alibi":
        return score - alibi
    if name == "relative_bias":
        return score + TABLE.double()[:, (distance.clamp(-20, 20) + 20).long()]
    return softcap(3.0) - alibi


def scores(query, key):
    return query.double() @ key.double().mT / math.sqrt(query.shape[-1])


@pytest.mark.parametrize("name", MODS)
def test_in_plain_flex_attention(name):
    query, key, value = qkv(2, HEADS, HEADS, LENGTH)
    out = flex_attention(query, key, value, score_mod=MODS[name]())
    want = torch.softmax(expected(name, scores(query, key)), -1) @ value.double()
    assert relative_error(out, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", MODS)
def test_lifted_to_slots(name):
    inputs, mod = qkv(2, HEADS, 2, LENGTH), MODS[name]()
    config = small(group_bias="mass")
    out, plan = dga_attention(*inputs, config=config, score_mod=mod, return_plan=True)
    want = reference.attend(*inputs, plan, group_bias="mass", score_mod=mod)
    assert relative_error(out, want) < TOLERANCE[torch.float32]
    plain = dga_attention(*inputs, config=config)
    assert relative_error(plain, want) > 1e-3  # the mod does something


@pytest.mark.parametrize("name", MODS)
def test_exact_when_every_token_is_its_own_slot(name):
    query, key, value = qkv(2, HEADS, HEADS, LENGTH)
    config = small(focal_ratio=1.0)
    out = dga_attention(query, key, value, config=config, score_mod=MODS[name]())
    future = ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    score = expected(name, scores(query, key)).masked_fill(future, -torch.inf)
    assert relative_error(out, torch.softmax(score, -1) @ value.double()) < 3e-6


def test_attention_sinks_take_their_share():
    query, key, value = qkv(1, HEADS, HEADS, LENGTH)
    logits = torch.tensor([0.0, 2.0, -1.0, 5.0])
    score = scores(query, key)
    column = logits.double()[None, :, None, None].expand(1, -1, LENGTH, 1)
    want = torch.softmax(torch.cat([column, score], -1), -1)[..., 1:] @ value.double()
    padded = [torch.cat([torch.zeros_like(t[:, :, :1]), t], 2) for t in (key, value)]
    out = flex_attention(query, *padded, score_mod=score_mods.attention_sinks(logits, 0))
    assert relative_error(out, want) < TOLERANCE[torch.float32]

    future = ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    score = score.masked_fill(future, -torch.inf)
    want = torch.softmax(torch.cat([column, score], -1), -1)[..., 1:] @ value.double()
    mod = score_mods.compose(score_mods.softcap(1e4), score_mods.attention_sinks(logits))
    for config in (small(focal_ratio=1.0), small(window=128)):
        out = dga_attention(query, key, value, config=config, score_mod=mod)
        assert relative_error(out, want) < 1e-5  # the cap bends scores by (s / cap)² / 3


def test_group_mass_is_the_best_linear_bound():
    """H(p) makes a pooled key's score a lower bound of log Σ exp, tight where p is the softmax."""
    keys, query = torch.randn(8, 16).double(), torch.randn(16).double()
    score = keys @ query
    exact = torch.logsumexp(score, 0)
    p = torch.softmax(score, 0)
    pooled = torch.stack([p @ keys, keys.mean(0)])[None, None]
    entropy = torch.stack([torch.special.entr(p).sum(), torch.tensor(math.log(8)).double()])
    mod = score_mods.group_mass(entropy[None, None])
    at = torch.arange(2)
    bound = mod(pooled[0, 0] @ query, torch.tensor(0), torch.tensor(0), torch.tensor(0), at)
    assert bound[0].item() == pytest.approx(exact.item(), abs=1e-9)
    assert bound[1].item() < exact.item()


def test_bad_arguments():
    with pytest.raises(ValueError, match="cap: expected a positive number, got 0"):
        score_mods.softcap(0)
    with pytest.raises(ValueError, match="slopes: expected 1 dimension"):
        score_mods.alibi(torch.ones(2, 2))
    with pytest.raises(TypeError, match="slopes: expected a tensor, got list"):
        score_mods.alibi([1.0])
    with pytest.raises(ValueError, match="table: expected an odd number"):
        score_mods.relative_bias(torch.ones(2, 4))
    with pytest.raises(TypeError, match="mods: expected callables, got int"):
        score_mods.compose(score_mods.softcap(1.0), 3)
