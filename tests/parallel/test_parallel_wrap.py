"""A transformers model whose forward pass runs over shards: the same logits, the same gradients."""

from __future__ import annotations

import parallel_work
import pytest
import torch
from helpers import by_landmarks, small

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


def test_a_training_step_with_fsdp_equals_one_process(ranks):
    for errors, sizes in ranks.results(parallel_work.trained, CONFIG, 301):
        assert max(errors) < 10 * LIMIT, errors  # weights ten times as large
        assert max(sizes) < 0.3  # of each parameter, a quarter on each of four ranks


def test_tokens_equal_one_process(ranks):
    config = by_landmarks(open_mass=0.01)
    for got, want, error, sent in ranks.results(parallel_work.generated, config, 301, 50):
        assert got.shape == (2, 351) and torch.equal(got, want)
        assert error < 10 * LIMIT, error  # weights ten times as large
        assert len(set(got[0, 301:].tolist())) > 10  # a text that does not repeat itself
        assert sent["parts of the output"] > 0  # units were opened


def test_beams_and_guesses_equal_one_process(ranks):
    config = by_landmarks(open_mass=0.01)
    for want, got in ranks.results(parallel_work.searched, config, 261, 40):
        for mine, theirs in zip(got, want):
            assert torch.equal(mine, theirs)
        beams, guessed = got
        assert beams.shape == (3, 341) and len(set(map(tuple, beams.tolist()))) == 3
        assert guessed.shape == (1, 341)


def test_what_a_sharded_model_cannot_do(ranks):
    for raised in ranks.results(parallel_work.refusals, CONFIG):
        for name, message in raised.items():
            assert name in message, message


def test_only_transformers_models():
    with pytest.raises(ValueError, match="mesh: expected a transformers model"):
        flexdga.wrap(torch.nn.Linear(2, 2), mesh=object())
