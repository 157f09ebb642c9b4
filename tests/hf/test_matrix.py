"""Every family in every mode: with all tokens focal, DGA is the model's own attention."""

from __future__ import annotations

import functools

import models
import pytest
import torch
from helpers import small
from models import DECODERS, ENCODERS, FAMILIES

from flexdga import DGACache, applied, report
from flexdga.cache import CACHE_NAME, DGALayer

TOLERANCE = 1e-4
"""Absolute, for logits of magnitude 1 to 10 in float32: attention is summed in another order, and
2 to 4 random layers amplify that to at most 2e-5 here. What is not exact is off by 1 or more."""

exact = functools.partial(small, focal_ratio=1.0)
SCOPES = ["prompt", "causal"]
TEXT = [name for name in FAMILIES if name != "vit"]


def run(name: str, **inputs) -> torch.Tensor:
    """Logits, or hidden states of an encoder."""
    return models.shared(name)(**inputs)[0]


def inputs_of(name: str, length: int = 130) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 40, 40)}
    return {"input_ids": models.tokens(2, length)}


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """They agree, and the layers that should went through DGA."""
    assert (got - want).abs().max() < TOLERANCE
    rows = report(models.shared(name)).rows
    assert len(rows) == FAMILIES[name].layers
    assert sum(row.wrapped for row in rows) == FAMILIES[name].wrapped
    for row in rows:
        assert bool(row.replaced) == row.wrapped, row
        assert bool(row.passed) == (not row.wrapped), row


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_forward(name, scope):
    if name in ENCODERS and scope == "causal":
        pytest.skip("an encoder has no causal scope")
    inputs = inputs_of(name)
    want = run(name, **inputs)
    with applied(models.shared(name), exact(scope=scope)):
        check(name, run(name, **inputs), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_lossy_differs(name):
    inputs = inputs_of(name)
    want = run(name, **inputs)
    with applied(models.shared(name), small()):
        got = run(name, **inputs)
    assert (got - want).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_padding(name, side):
    ids, mask = models.padded([130, 97, 40], side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in DECODERS:
        inputs["use_cache"] = False
    want = run(name, **inputs)
    with applied(models.shared(name), exact()):
        real = mask.bool()
        check(name, run(name, **inputs)[real], want[real])


@pytest.mark.parametrize("name", DECODERS)
def test_padding_with_the_cache_of_the_model(name):
    ids, mask = models.padded([130, 97, 40], "right")
    want = run(name, input_ids=ids, attention_mask=mask)
    with applied(models.shared(name), exact()):
        real = mask.bool()
        check(name, run(name, input_ids=ids, attention_mask=mask)[real], want[real])


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents(name):
    if FAMILIES[name].unpacked:
        pytest.skip(FAMILIES[name].unpacked)
    lengths = [62, 68]
    ids = models.tokens(2, sum(lengths))
    places = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    inputs = {"input_ids": ids, "position_ids": places, "use_cache": False}
    want = run(name, **inputs)
    apart = [run(name, input_ids=part, use_cache=False) for part in ids.split(lengths, 1)]
    assert (want - torch.cat(apart, 1)).abs().max() < TOLERANCE  # the model itself can do it
    with applied(models.shared(name), exact()):
        check(name, run(name, **inputs), want)


@pytest.mark.parametrize("name", DECODERS)
def test_generate(name):
    model = models.shared(name)
    ids, mask = models.padded([50, 33], "left")
    generate = functools.partial(
        model.generate, ids, attention_mask=mask, do_sample=False, max_new_tokens=48,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    want = generate()
    with applied(model, exact()):
        got = model.generate(*generate.args, **generate.keywords)
        check_cache(name, got[CACHE_NAME])
    assert torch.equal(got.sequences, want.sequences)
    off = (torch.stack(got.logits) - torch.stack(want.logits)).abs().max()
    assert off < TOLERANCE


def check_cache(name: str, cache: object) -> None:
    """Units were pooled; sliding layers keep the caches that they always have."""
    if name == "falcon":  # it takes the plain road, which leaves decoding dense
        assert not isinstance(cache, DGACache)
        return
    assert isinstance(cache, DGACache)
    kinds = [isinstance(layer, DGALayer) for layer in cache.layers]
    assert kinds == [row.wrapped for row in report(models.shared(name)).rows]
    for layer in cache.layers:
        assert not isinstance(layer, DGALayer) or layer.cache.done >= 64
