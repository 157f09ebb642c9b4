"""A wrapped transformers model trains on CPU, with the gradients of the oracle."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from helpers import relative_error, small
from test_backward import OPENS, by_oracle

from flexdga import applied, attention, wrap

CAUSAL = small(scope="causal", group_bias="mass")


def gradients(model, ids, **arguments):
    model.zero_grad()
    out = model(ids, labels=ids, use_cache=False, **arguments)
    out.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [CAUSAL, small(scope="causal", **OPENS)], ids=["group", "open"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_are_the_oracles(name, config, monkeypatch):
    """Grouped queries, padding, soft capping."""
    model, ids = models.make(name).train(), models.tokens(2, 75)
    mask = torch.ones_like(ids)
    mask[1, 60:] = 0
    with torch.enable_grad(), applied(model, config):
        got = gradients(model, ids, attention_mask=mask)
        monkeypatch.setattr(attention, "attend_on_cpu", by_oracle)
        want = gradients(model, ids, attention_mask=mask)
    assert got.keys() == want.keys()
    for key in got:
        assert relative_error(got[key], want[key]) < 1e-4, key  # float32, through all layers


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
def test_exact_settings_have_the_gradients_of_the_dense_model(name):
    """Those of GPT-OSS's attention sinks too."""
    model, ids = models.make(name).train(), models.tokens(2, 75)
    with torch.enable_grad():
        want = gradients(model, ids)
        for config in (small(focal_ratio=1.0, scope="causal"), small(window=128, scope="causal")):
            with applied(model, config):
                got = gradients(model, ids)
            for key in want:
                assert relative_error(got[key], want[key]) < 1e-4, key


@pytest.mark.parametrize("how", ["plain", "checkpointing", "autocast"])
def test_the_loss_falls(how):
    model, ids = models.make("llama", initializer_range=0.02).train(), models.tokens(2, 75)
    wrap(model, CAUSAL)
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with torch.enable_grad():
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                losses.append(model(ids, labels=ids, use_cache=False).loss)
            losses[-1].backward()
            optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_checkpointed_gradients_are_the_same():
    model, ids = models.make("llama").train(), models.tokens(2, 75)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    with torch.enable_grad():
        want, got = (gradients(wrap(m, CAUSAL), ids) for m in (model, again))
    for key in want:
        assert torch.equal(got[key], want[key])
