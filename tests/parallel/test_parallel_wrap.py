"""A transformers model whose forward pass runs over shards: the same logits, the same gradients."""

from __future__ import annotations

import parallel_work
import pytest
import torch
from helpers import small

import flexdga

pytest.importorskip("transformers")
CONFIG = small(scope="causal")
# Logits of a model of a few layers: its sums of float32 products, and attention's.
LIMIT = 2e-5


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_logits_equal_one_process(ranks, packed):
    for errors, layers in ranks.results(parallel_work.wrapped, CONFIG, packed, False):
        assert max(errors) < LIMIT, errors
        assert layers == [True, True, False]  # the last is left dense, over gathered keys


def test_gradients_equal_one_process(ranks):
    for errors, _ in ranks.results(parallel_work.wrapped, CONFIG, False, True):
        assert max(errors) < LIMIT, errors


def test_what_a_sharded_model_cannot_do(ranks):
    for raised in ranks.results(parallel_work.refusals, CONFIG):
        for name, message in raised.items():
            assert name in message, message


def test_only_transformers_models():
    with pytest.raises(ValueError, match="mesh: expected a transformers model"):
        flexdga.wrap(torch.nn.Linear(2, 2), mesh=object())
