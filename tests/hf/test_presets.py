"""Every preset on every road: what defines it, direct, in two kinds of models, and decoding."""

from __future__ import annotations

import math
from typing import Any

import models
import plain_models
import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, qkv, relative_error
from plain_models import FastGPT, NanoGPT
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from flexdga import DGACache, DGAConfig, applied, dga_attention, reference, report, unwrap, wrap
from flexdga.attention import make_plan
from flexdga.cache import CACHE_NAME
from flexdga.decode import LayerCache
from flexdga.plan import NEVER

ROUNDING = TOLERANCE[torch.float32]
LOGITS = 1e-4
"""Absolute, as in test_matrix: float32 summed in another order, through two random layers."""
GROUPING = {"group_size": 8, "unit_size": 32}
OPENING = {"window": 16, "dense_below": 0, "open_units": 2}
PRESETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (DGAConfig, OPENING),
    "grouping": (
        DGAConfig,
        GROUPING
        | {"rest": "group", "focal_ratio": 0.1, "open_units": 0, "window": 16, "dense_below": 0},
    ),
    "paper": (DGAConfig.paper, {"group_size": 8, "unit_size": 18}),
    "cca": (DGAConfig.cca, GROUPING | {"window": 32}),
    "dense": (DGAConfig.dense, {}),
    "streaming_llm": (DGAConfig.streaming_llm, {"window": 24}),
    "lm_infinite": (DGAConfig.lm_infinite, {"window": 24}),
    "h2o": (DGAConfig.h2o, {"window": 24, "unit_size": 32}),
    "snapkv": (DGAConfig.snapkv, {"window": 24, "unit_size": 32}),
    "block_selection": (DGAConfig.block_selection, {"open_units": 2, "window": 24}),
    "opening": (
        DGAConfig,
        {"rest": "group", "group_size": 8, "window": 16, "dense_below": 0, "open_units": 2},
    ),
}
SINKS = {"streaming_llm": 4, "lm_infinite": 16, "h2o": 0, "snapkv": 0}  # the rest is dropped
DENSE = ["dense", "snapkv"]  # over a prompt

SCOPES = ["prompt", "causal"]  # snapkv, whose last queries choose, has no causal one
CASES = [(name, s) for name in PRESETS for s in SCOPES if (name, s) != ("snapkv", "causal")]
every_case = pytest.mark.parametrize(("name", "scope"), CASES)

LENGTH = 192
Q, K = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
PADDED = -torch.stack([K < 0, K < 45]).int()
"""Positions of queries and keys; document ids of two rows, the second left-padded."""


def preset(name: str, **changes: Any) -> DGAConfig:
    """The preset at a size at which a few hundred tokens show what it does."""
    make, tiny = PRESETS[name]
    return make(**({"block_size": (16, 16), "unit_size": 16} | tiny | changes))


def specified(name: str, config: DGAConfig, inputs: Any, ids: Any, scale: Any) -> Tensor:
    """The attention that the specification gives."""
    if name in DENSE:
        return reference.dense(*inputs, document_ids=ids, scale=scale)
    plan = make_plan(*inputs, config=config, document_ids=ids, scale=scale)
    choices = {"group_weights": config.group_weights, "group_bias": config.group_bias}
    return reference.attend(*inputs, plan, scale=scale, **choices)


# What defines each preset, without the plan or the planner


def last_raw(config: DGAConfig) -> Tensor:
    """The last query that sees each key raw: of a window, rounded up as the config says."""
    unit, block, key = config.unit_size, config.block_size[0], K
    if config.scope == "causal" or config.open_units != 0:  # units go as a whole
        key = K // unit * unit + unit - 1
    end = key + config.window
    return (end + block - 1) // block * block - 1 if config.align else end - 1


def masked(inputs: list[Tensor], seen: Tensor) -> Tensor:
    """Dense attention to what is seen of the past."""
    seen = seen & (K <= Q)
    return F.scaled_dot_product_attention(*inputs, attn_mask=seen, enable_gqa=True).nan_to_num(0.0)


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, L, L) attention weights, two query heads to a KV head."""
    score = query.double() @ key.double().repeat_interleave(2, 1).mT / math.sqrt(query.shape[-1])
    later = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
    return torch.softmax(score.masked_fill(later, -math.inf), -1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["streaming_llm", "lm_infinite"])
def test_a_query_sees_first_tokens_and_a_window(name, scope, align, padded):
    """In prompt scope without `align` the window is exact to the token."""
    config, inputs = preset(name, scope=scope, align=align), qkv(2, 4, 2, LENGTH)
    ids = PADDED * padded
    first = (ids < 0).sum(-1)[:, None, None]
    seen = (first <= K) & ((last_raw(config) >= Q) | (first + SINKS[name] > K))
    got = dga_attention(*inputs, config=config, document_ids=ids)
    assert relative_error(got, masked(inputs, seen[:, None])) < ROUNDING


@pytest.mark.parametrize("scope", SCOPES)
def test_h2o_sees_a_window_and_heavy_hitters(scope):
    """These are the keys with the highest summed attention of the probes."""
    config = preset("h2o", scope=scope, align=False, probes=20)
    query, key, value = qkv(2, 4, 2, LENGTH)
    unit, window = config.unit_size, config.window
    heavy = torch.zeros(key.shape[:3], dtype=torch.bool)
    stretches = [(0, LENGTH, LENGTH, LENGTH - window)]  # begin, end, known by then, candidates
    if scope == "causal":
        stretches = [(n, n + unit, n + unit + window - 1, unit) for n in range(0, LENGTH, unit)]
    for begin, end, known, candidates in stretches:
        if known > LENGTH:
            break
        weight = causal_weights(query[:, :, begin:known], key[:, :, begin:known])
        probes = [(n + 1) * (known - begin) // 20 - 1 for n in range(20)]
        total = weight[:, :, probes].sum(2).unflatten(1, (-1, 2)).sum(2)[..., :candidates]
        best = total.topk(int(config.focal_ratio * (end - begin)), -1).indices
        heavy[..., begin:end].scatter_(-1, best, True)
    seen = (last_raw(config) >= Q) | heavy.repeat_interleave(2, 1)[:, :, None]
    got = dga_attention(query, key, value, config=config)
    assert relative_error(got, masked([query, key, value], seen)) < ROUNDING


@pytest.mark.parametrize("open_by", ["exact", "landmarks"])
@pytest.mark.parametrize("scope", SCOPES)
def test_block_selection_opens_the_units_with_most_attention(scope, open_by):
    """Of a unit its best key counts. Integers over √16: bfloat16, in which scores are, holds them.

    For `box` the keys of a unit are equal, and a block's queries: then its order is exact.
    """
    config = preset("block_selection", scope=scope, open_by=open_by, open_units=3)
    query, key, value = (t.round() for t in qkv(2, 4, 2, LENGTH, head_dim=16))
    if open_by == "landmarks":
        query, key = (t[:, :, ::16].repeat_interleave(16, 2) for t in (query, key))
    score = query.double() @ key.repeat_interleave(2, 1).double().mT / 4
    mass = score.masked_fill(K > Q, -torch.inf).exp()
    opened = torch.zeros(2, 4, LENGTH // 16, LENGTH // 16, dtype=torch.bool)
    for block in range(LENGTH // 16):
        rows, far = (
            mass[:, :, block * 16 :][:, :, :16],
            max(block * 16 - config.window + 1, 0) // 16,
        )
        best = rows[..., : far * 16].unflatten(-1, (far, 16)).amax(-1)
        share = best / (best.sum(-1) + rows[..., far * 16 :].sum(-1))[..., None]
        # All of a block's queries choose, or in causal scope the first one, which takes all turns.
        share = share.amax(2) if scope == "prompt" else share[:, :, 0]
        share = share - torch.arange(far) * 1e-9  # of equal ones the older
        opened[:, :, block].scatter_(-1, share.topk(min(far, 3), -1).indices, True)
    got, plan = dga_attention(query, key, value, config=config, return_plan=True)
    assert torch.equal(plan.open < NEVER, opened)
    opened = opened.repeat_interleave(16, 2).repeat_interleave(16, 3)
    want = masked([query, key, value], (last_raw(config) >= Q) | opened | (config.sinks > K))
    assert relative_error(got, want) < ROUNDING


def decode(cache: LayerCache, inputs: list[Tensor], prompt: int, ids: Tensor) -> Tensor:
    """A prompt, then token by token."""
    steps = [slice(0, prompt), *(slice(n, n + 1) for n in range(prompt, inputs[0].shape[2]))]
    parts = [([t[:, :, n] for t in inputs], ids[:, n]) for n in steps]
    return torch.cat([cache.attend(*new, document_ids=n) for new, n in parts], 2)


def weights_of(config: DGAConfig, query: Tensor, key: Tensor, prompt: int) -> Tensor:
    """(2, H, L, L) weights on tokens while decoding: their values are unit vectors."""
    value = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
    return decode(LayerCache(config), [query, key, value], prompt, PADDED * 0)


@pytest.mark.parametrize("ratio", [0.1, 0.25])
def test_snapkv_keeps_what_the_last_queries_look_at(ratio):
    config = preset("snapkv", focal_ratio=ratio, align=False)
    query, key, _ = qkv(2, 4, 2, 181)
    weight, dense = weights_of(config, query, key, 180), causal_weights(query, key)
    assert relative_error(weight[:, :, :180], dense[:, :, :180]) < ROUNDING
    kept, far = (weight[:, :, 180] > 0).unflatten(1, (-1, 2)), 180 - config.window
    assert torch.equal(kept[:, :, 0], kept[:, :, 1]) and kept[..., far:].all()
    old = kept[:, :, 0, :far]
    assert (old.sum(-1) == int(ratio * 180)).all()
    peak = dense[:, :, 180 - config.probes : 180, :180].unflatten(1, (-1, 2)).amax((2, 3))
    peak = F.max_pool1d(peak, 7, 1, 3)[..., :far]
    # Neighbours share a peak: of those that are equal any may be kept.
    best_lost = peak.masked_fill(old, 0).amax(-1)
    assert (peak.masked_fill(~old, 1).amin(-1) >= best_lost - 1e-6).all()


# Every preset, directly and wrapped


@pytest.mark.parametrize("padded", [False, True])
@every_case
def test_attention(name, scope, padded):
    config, inputs = preset(name, scope=scope), qkv(2, 4, 2, 110)
    ids = PADDED[:, :110] if padded else None
    dense = reference.dense(*inputs, document_ids=ids)
    out, plan = dga_attention(*inputs, config=config, document_ids=ids, return_plan=True)
    want = specified(name, config, inputs, ids, None)
    for got in (out, dga_attention(*inputs, config=config, document_ids=ids)):
        assert relative_error(got, want) < ROUNDING
    assert name in DENSE or (plan.cost() < 1 and relative_error(out, dense) > 0.05)


@every_case
def test_llama(name, scope):
    """As the same model with the specification for its attention function."""
    config, model = preset(name, scope=scope), models.make("llama")
    ids, mask = models.padded([100, 77], "left")
    inputs, real = {"attention_mask": mask, "use_cache": False}, mask.bool()

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert query.shape[1] == 2 * key.shape[1]
        out = specified(name, config, [query, key, value], mask.int() - 1, scaling)
        return out.to(query).transpose(1, 2), None

    dense = model(ids, **inputs).logits
    got = wrap(model, config)(ids, **inputs).logits
    assert [(row.replaced, row.passed) for row in report(model).rows] == [(1, 0)] * 2
    unwrap(model)
    assert torch.equal(model(ids, **inputs).logits, dense)
    AttentionInterface.register("specification", attention)
    AttentionMaskInterface.register("specification", lambda *args, **kwargs: None)
    model.set_attn_implementation("specification")
    assert (got - model(ids, **inputs).logits)[real].abs().max() < LOGITS
    off = (got - dense)[real].abs().max()
    assert off < LOGITS if name in DENSE else off > 100 * LOGITS


@every_case
def test_plain_models(name, scope, monkeypatch):
    """One imports the function by name; the other has grouped queries and a static cache."""
    config, idx = preset(name, scope=scope), torch.randint(plain_models.VOCABULARY, (1, 100))

    def attention(q, k, v, *args, **kwargs):
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        return specified(name, config, [q, k, v], None, None).to(q)

    fast = FastGPT(layers=1, enable_gqa=True).eval()
    for model, inputs in ((NanoGPT(layers=1).eval(), (idx,)), (fast, (idx, torch.arange(100)))):
        dense = model(*inputs)
        with applied(model, config):
            got = model(*inputs)
        assert torch.equal(model(*inputs), dense)
        with monkeypatch.context() as patch:
            patch.setattr(plain_models, "scaled_dot_product_attention", attention)
            patch.setattr(F, "scaled_dot_product_attention", attention)
            assert relative_error(got, model(*inputs)) < 1e-5
        off = relative_error(got, dense)
        assert off < 1e-6 if name in DENSE else off > 1e-3


# Decoding


@pytest.mark.parametrize(("prompt", "padded"), [(1, False), (100, True)])
@pytest.mark.parametrize("name", [name for name, s in CASES if s == "causal"])
def test_decoding_equals_prefill(name, prompt, padded):
    config, inputs = preset(name, scope="causal"), qkv(2, 4, 2, LENGTH)
    ids, cache = PADDED * padded, LayerCache(config)
    want = dga_attention(*inputs, config=config, document_ids=ids)
    assert relative_error(decode(cache, inputs, prompt, ids), want) < ROUNDING
    assert (cache.done > 120) == (name != "dense")


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_what_a_decoded_query_sees(name, scope):
    """Its window; and of what lies before it everything, in groups, or little."""
    config, past = preset(name, scope=scope), Q[120:] >= K
    seen = weights_of(config, *qkv(2, 4, 2, LENGTH)[:2], 120)[:, :, 120:] > 0
    assert not seen[..., ~past].any() and seen[..., past & (Q[120:] - config.window < K)].all()
    if name in SINKS:
        # A unit waits for its last token, and its handover for the end of a query block.
        most = config.window + config.unit_size + config.block_size[0]
        focal, sinks = config.focal_ratio * LENGTH, SINKS[name]
        assert seen[..., :sinks].all() and (seen.sum(-1) <= most + sinks + focal).all()
        assert seen[..., sinks : 120 - most].any() == (focal > 0)
    else:
        assert name in ("block_selection", "default") or seen[..., past].all()


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_generate(name, scope):
    """It equals a prefill of the text: in prompt scope, of the prompt."""
    config, model = preset(name, scope=scope), models.shared("llama")
    ids, mask = models.padded([90, 61], "left")
    new = {"max_new_tokens": 30, "return_dict_in_generate": True, "output_logits": True}
    dense = model.generate(ids, attention_mask=mask, do_sample=False, **new)
    count = 119 if scope == "causal" or name == "dense" else 90
    with applied(model, config):
        out = model.generate(ids, attention_mask=mask, do_sample=False, **new)
        mask = F.pad(mask, (0, count - 90), value=1)
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"attention_mask": mask, "position_ids": place, "use_cache": False}
        want = model(out.sequences[:, :count], **inputs).logits[:, 89:]
    cache, got = out[CACHE_NAME], torch.stack(out.logits, 1)
    assert isinstance(cache, DGACache) and len(cache.layers) == 2
    for layer in cache.layers:
        assert layer.cache.config == config and layer.cache.seen == 119
        assert (layer.cache.done >= 64) == (name != "dense")
    assert got.isfinite().all() and (got[:, : count - 89] - want).abs().max() < LOGITS
    assert torch.equal(out.sequences, dense.sequences) == (name == "dense")
