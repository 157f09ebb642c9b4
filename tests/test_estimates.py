"""Estimates inside a compiler are those outside of it."""

from __future__ import annotations

import pytest
import torch
from helpers import qkv

from flexdga import DGAConfig, estimates
from flexdga.estimates import far_log_mass, in_bfloat16, in_eight_bits, unit_features
from flexdga.far_units import raw_scores

LANDMARKS = DGAConfig(open_by="landmarks", block_size=(32, 32), unit_size=32)
EXACT = DGAConfig()


def test_estimates_of_a_decode_step_are_rounded_inside_a_compiler_too(monkeypatch):
    """Inductor leaves out roundings to bfloat16 on CPU: without them every number differs."""
    monkeypatch.setitem(estimates.NEAR, "exact", 128)
    monkeypatch.setattr(estimates, "SEGMENT", 128)
    query, key, _ = qkv(2, 4, 2, 640, 64)
    query, beyond = query[:, :, :1], torch.tensor([24], dtype=torch.int32)
    features = unit_features(key, LANDMARKS)

    def step(query, key, features):
        return [
            far_log_mass(query, features.float(), LANDMARKS, 1 / 8),
            far_log_mass(query, key.bfloat16(), EXACT, 1 / 8, beyond),
            raw_scores(query, key, torch.zeros(1, 1, 1, 640), 1 / 8),
        ]

    with torch.no_grad():
        inside, outside = torch.compile(step)(query, key, features), step(query, key, features)
    for i, (got, want) in enumerate(zip(inside, outside, strict=True)):
        # Ties after sums in another order; `exact` has none, for its sums are of integers.
        assert (got != want).float().mean() < (0.02 if i != 1 else 1e-9)
        assert (got - want).abs().max() < 0.05


def test_units_are_rounded_inside_a_compiler_where_products_are_in_float32(monkeypatch):
    """So they are on CPUs without bfloat16 products, where the rounding could be left out."""
    monkeypatch.setattr(estimates, "BFLOAT16_ON_CPU", False)
    query, key, _ = qkv(1, 2, 1, 256, 64)

    def estimate(query, key):
        by_landmarks = far_log_mass(query, unit_features(key, LANDMARKS), LANDMARKS, 1 / 8)
        return by_landmarks, far_log_mass(query, unit_features(key, EXACT), EXACT, 1 / 8)

    with torch.no_grad():
        inside, outside = torch.compile(estimate)(query, key), estimate(query, key)
    for got, want in zip(inside, outside, strict=True):
        assert (got != want).float().mean() < 0.02
        assert (got - want).abs().max() < 0.05


def test_rounding_in_a_compiler_is_that_of_bfloat16():
    numbers = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3e38])])
    numbers = torch.cat([numbers, numbers * 1e-30, torch.tensor([torch.nan])])
    got = torch.compile(lambda x: in_bfloat16(x).float() * 1.0)(numbers)
    torch.testing.assert_close(got, numbers.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_eight_bits_are_integers_times_a_power_of_two(compiled):
    numbers = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    rounding = torch.compile(in_eight_bits) if compiled else in_eight_bits
    got = rounding(numbers, [1])
    assert got.dtype == torch.bfloat16
    largest = numbers.bfloat16().double().abs().amax(1, keepdim=True)
    step = 2.0 ** (largest.log2().floor() - 6)
    want = (numbers.bfloat16().double() / step).round().clamp(-127, 127) * step
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0)


def test_what_is_no_number_makes_none_of_all_that_share_its_power():
    numbers = torch.ones(4, 8)
    numbers[1, 3], numbers[2, 0], numbers[3] = torch.nan, -torch.inf, 0
    got = in_eight_bits(numbers, [1])
    assert got[1:3].isnan().all()
    assert (got[0] == 1).all() and (got[3] == 0).all()
