"""Slots in int8: how many bytes they are, and how far off the output is."""

from __future__ import annotations

import pytest
import torch
from helpers import qkv, relative_error, small

from flexdga import DGACache, dga_decode
from flexdga.decode import LayerCache
from flexdga.int8 import pack, unpack

INT8 = 0.02
"""Relative error against full precision. A row of 64 normal numbers reaches 2.5, so rounding to
127 steps is off by 2.5 / 127 / √12 = .6 % of them in keys as in values, and scores of such keys by
as much; together 1 %, and twice that is allowed."""


@pytest.mark.parametrize("scale_dtype", [None, torch.bfloat16])
def test_rows_come_back_within_half_a_step(scale_dtype):
    x = torch.randn(3, 2, 50, 64) * torch.logspace(-4, 4, 50)[:, None]
    x[0, 0, 0] = 0
    number, scale = pack(x, scale_dtype)
    assert number.dtype == torch.int8 and scale.dtype == (scale_dtype or x.dtype)
    step = x.abs().amax(-1, keepdim=True) / 127
    # bfloat16 scales are rounded up, by 2^-7 and one unit of 2^-8 at most.
    most = 0.5 * step * (1 + (2**-6 if scale_dtype else 1e-5)) + 1e-12
    assert ((unpack(number, scale, x.dtype) - x).abs() <= most).all()


@pytest.mark.parametrize("changes", [{}, {"group_bias": "mass", "focal_ratio": 1 / 8}])
def test_decoding_over_int8_slots(changes, eager):
    config = small(scope="causal", **changes)
    full, packed = (LayerCache(config, int8=int8) for int8 in (False, True))
    inputs = qkv(2, 4, 2, 700, head_dim=64)
    for begin, end in ((0, 400), *((t, t + 1) for t in range(400, 500)), (500, 700)):
        new = [x[:, :, begin:end] for x in inputs]
        want, got = full.attend(*new), packed.attend(*new)
        assert relative_error(got, want) < INT8
    assert full.num_slots == packed.num_slots > 50
    assert not torch.equal(got, want)
    # Tokens that were never pooled are the same, bit for bit.
    live = full._buffer.live
    for a, b in zip(full._buffer.visible()[:2], packed._buffer.visible()[:2]):
        assert torch.equal(a[:, :, :live], b[:, :, :live])
    assert packed._buffer.bytes_per_slot() <= 0.27 * full._buffer.bytes_per_slot()
    assert packed.memory().bytes < full.memory().bytes
    assert packed.memory().dense_bytes == full.memory().dense_bytes


def test_int8_slots_are_cropped_selected_and_grown_like_others(eager):
    config, inputs = small(scope="causal"), qkv(3, 4, 2, 600)
    straight, winding = (LayerCache(config, int8=True) for _ in range(2))
    winding.record_past = True
    rows = torch.tensor([2, 0])

    def feed(cache: LayerCache, begin: int, end: int, tensors: list[torch.Tensor]) -> torch.Tensor:
        parts = [cache.attend(*(x[:, :, t : t + 1] for x in tensors)) for t in range(begin, end)]
        return torch.cat(parts, 2)

    for cache in (straight, winding):
        cache.attend(*(x[:, :, :100] for x in inputs))
    feed(winding, 100, 180, [torch.randn_like(x) for x in inputs])
    winding.crop(80)
    for cache in (straight, winding):
        feed(cache, 100, 300, inputs)
        cache.select(rows)
    picked = [x[rows] for x in inputs]
    want, got = (feed(cache, 300, 600, picked) for cache in (straight, winding))
    # Cropping keeps the prompt's end as new tokens: sums are in another order.
    assert relative_error(got, want) < 1e-5


def test_a_cache_of_int8_slots(eager):
    config = small(scope="causal")
    caches = [DGACache(config, kv_dtype=kind) for kind in (None, "int8")]
    for query, key, value in zip(*(x.split(150, 2) for x in qkv(1, 4, 2, 600, head_dim=64))):
        outputs = []
        for cache in caches:
            cache.update(key, value, 0)
            outputs.append(dga_decode(query, cache))
        assert relative_error(outputs[1], outputs[0]) < INT8
    assert caches[1].memory().bytes < caches[0].memory().bytes
    with pytest.raises(ValueError, match="kv_dtype"):
        DGACache(config, kv_dtype="int4")
