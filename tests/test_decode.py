"""Decoding: token by token it equals a prefill of the same text, in a fraction of the memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import TOLERANCE, qkv, relative_error, small
from hypothesis import given, settings
from hypothesis import strategies as st

import score_mods
from flexdga import (
    DGACache,
    DGAConfig,
    dga_attention,
    dga_decode,
    estimates,
    reference,
    stretches,
)
from flexdga.config import COARSE
from flexdga.decode import LayerCache
from flexdga.open_columns import OpenColumns
from flexdga.plan import NEVER
from flexdga.storage import Columns

pytestmark = pytest.mark.usefixtures("eager")

configs = st.fixed_dictionaries(
    {
        "unit_size": st.sampled_from([32, 48, 18]),
        "group_size": st.sampled_from([8, 5, 16]),
        "window": st.sampled_from([16, 1, 0, 40]),
        "align": st.booleans(),
        "sinks": st.sampled_from([4, 0]),
        "focal_ratio": st.sampled_from([1 / 16, 0.25, 0.0]),
        "importance": st.sampled_from(["far_mean", "sum"]),
        "group_weights": st.sampled_from(["last_query", "mean", "importance"]),
        "group_bias": st.sampled_from(["none", "mass"]),
    }
)
chunks = st.sampled_from([(1,), (1, 7, 64, 3), (90,)])


def decode(cache, inputs, prompt, chunks=(1,), ids=None, **arguments):
    """Everything through the cache: a prompt, then chunks in turn."""
    length, out, at, turn = inputs[0].shape[2], [], 0, 0
    while at < length:
        size = prompt if at == 0 else chunks[turn % len(chunks)]
        turn += at > 0
        part = slice(at, at + size)
        if ids is not None:
            arguments["document_ids"] = ids[:, part]
        out.append(cache.attend(*(t[:, :, part] for t in inputs), **arguments))
        at += size
    return torch.cat(out, 2)


def left_padded(batch, length, most=77):
    ids = torch.zeros(batch, length, dtype=torch.int32)
    ids[-1, : min(most, length - 1)] = -1
    return ids


@settings(max_examples=12)
@given(
    changes=configs,
    chunks=chunks,
    heads=st.sampled_from([(2, 2), (6, 2), (9, 3)]),
    prompt=st.sampled_from([1, 40, 150]),
    padded=st.booleans(),
)
def test_decoding_equals_causal_prefill(changes, chunks, heads, prompt, padded):
    config = small(**changes, scope="causal")
    inputs = qkv(2, *heads, 261)
    ids = left_padded(2, 261) if padded else None
    want = dga_attention(*inputs, config=config, document_ids=ids)
    cache = LayerCache(config)
    got = decode(cache, inputs, prompt, chunks, ids)
    assert relative_error(got, want) < TOLERANCE[torch.float32]
    assert cache.seen == 261 and cache.done > 0


OPENS = {"unit_size": 16, "group_size": 8, "open_mass": 0.02, "align": True}


@settings(max_examples=8)
@given(
    changes=configs,
    rest=st.sampled_from(["group", "drop"]),
    opens=st.sampled_from([1, 3, None]),
    open_by=st.sampled_from(["landmarks", "exact"]),
    chunks=st.sampled_from([(1,), (1, 7, 30, 3)]),
    heads=st.sampled_from([(2, 2), (6, 2)]),
    prompt=st.sampled_from([1, 40, 101]),
    padded=st.booleans(),
)
def test_decoding_opens_what_a_causal_prefill_opens(
    changes, rest, opens, open_by, chunks, heads, prompt, padded
):
    window = max(changes["window"], 1)
    config = small(
        **(changes | OPENS | {"window": window}), rest=rest, open_units=opens, open_by=open_by,
        scope="causal", block_size=(32, 16),
    )  # fmt: skip
    query, key, value = qkv(2, *heads, 170)
    query = 4 * query
    ids = left_padded(2, 170) if padded else None
    want, plan = dga_attention(query, key, value, config=config, document_ids=ids, return_plan=True)
    assert (plan.open < NEVER).any()
    got = decode(LayerCache(config), (query, key, value), prompt, chunks, ids)
    assert relative_error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("open_by", "coarse_beyond", "keep_raw"),
    [
        ("landmarks", 256, "full"),
        ("landmarks", None, "full"),
        ("exact", None, "full"),
        ("exact", None, "int8"),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_opens_what_a_causal_prefill_opens_of_a_long_past(
    padded, open_by, coarse_beyond, keep_raw, monkeypatch
):
    monkeypatch.setitem(estimates.NEAR, open_by, 256)
    for module in (estimates, stretches):
        monkeypatch.setattr(module, "SEGMENT", 128)
    config = small(
        **(OPENS | {"open_mass": 0.1}), window=16, rest="drop", open_units=None, open_by=open_by,
        coarse_beyond=coarse_beyond, scope="causal", block_size=(32, 16), keep_raw=keep_raw,
    )  # fmt: skip
    query, key, value = qkv(2, 4, 2, 1000)
    query = 2 * query
    ids = left_padded(2, 1000, 300) if padded else None
    want, plan = dga_attention(query, key, value, config=config, document_ids=ids, return_plan=True)
    old = plan.open[:, :, -8:, :COARSE] < NEVER
    assert old.any() and not old.all()
    got = decode(LayerCache(config), (query, key, value), 470, (1, 7, 30, 3), ids)
    # Keys of eight bits move some openings, each of a tenth of a query's attention.
    most = 0.1 if keep_raw == "int8" else TOLERANCE[torch.float32]
    assert relative_error(got, want) < most


@pytest.mark.parametrize(("keep_raw", "most"), [("cpu", 0.0), ("int8", 0.02), ("none", 3.0)])
def test_raw_tokens_may_be_kept_elsewhere_smaller_or_not_at_all(keep_raw, most):
    config = small(**OPENS, open_units=None, rest="drop", scope="causal")
    query, key, value = qkv(2, 6, 2, 500)
    query = 4 * query
    full, other = (
        LayerCache(dataclasses.replace(config, keep_raw=name)) for name in ("full", keep_raw)
    )
    want = decode(full, (query, key, value), 300)
    got = decode(other, (query, key, value), 300)
    error = relative_error(got[:, :, 300:], want[:, :, 300:])
    assert error <= most and (error > 0) == (keep_raw != "cpu")
    ratio = other.memory().bytes / full.memory().bytes
    assert ratio == 1.0 if keep_raw == "cpu" else ratio < {"int8": 0.65, "none": 0.5}[keep_raw]


def test_openings_survive_cropping_and_reordering():
    config = small(**OPENS, open_units=2, scope="causal")
    query, key, value = qkv(2, 4, 2, 330)
    query = 4 * query
    cache, straight = LayerCache(config), LayerCache(config)
    cache.record_past = True
    decode(cache, [t[:, :, :300] for t in (query, key, value)], 200)
    cache.crop(23)  # over the bound of a query block
    got = decode(cache, [t[:, :, 277:] for t in (query, key, value)], 1)
    decode(straight, [t[:, :, :277] for t in (query, key, value)], 200)
    want = decode(straight, [t[:, :, 277:] for t in (query, key, value)], 1)
    assert relative_error(got, want) < TOLERANCE[torch.float32]
    rows = torch.tensor([1, 1, 0])
    cache.select(rows)
    straight.select(rows)
    more = [t[rows] for t in qkv(2, 4, 2, 3)]
    assert relative_error(cache.attend(*more), straight.attend(*more)) < TOLERANCE[torch.float32]


def test_decoding_equals_causal_prefill_by_similarity():
    config = small(grouping="similarity", group_bias="mass", scope="causal")
    inputs = qkv(1, 4, 2, 333)
    want = dga_attention(*inputs, config=config)
    assert relative_error(decode(LayerCache(config), inputs, 100), want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_equals_causal_prefill_in_half_precision(dtype):
    config = small(scope="causal")
    inputs = qkv(1, 4, 2, 300, dtype=dtype)
    want = dga_attention(*inputs, config=config)
    got = decode(LayerCache(config), inputs, 100)
    # Twice the tolerance against float64: here both sides are rounded.
    assert got.dtype == dtype
    assert relative_error(got, want) < 2 * TOLERANCE[dtype]


def test_the_papers_regrouping_every_18_tokens():
    config = DGAConfig.paper(scope="causal", unit_size=18, block_size=(16, 16))
    inputs = qkv(1, 2, 2, 400)
    cache = LayerCache(config)
    got = decode(cache, inputs, 90)
    assert relative_error(got, dga_attention(*inputs, config=config)) < 1e-5
    assert cache.done == 400 // 18 * 18


@pytest.mark.parametrize("scope", ["prompt", "causal"])
@pytest.mark.parametrize("padded", [False, True])
def test_with_all_tokens_focal_it_is_dense(scope, padded):
    inputs = qkv(2, 6, 2, 300)
    ids = left_padded(2, 300) if padded else None
    cache = LayerCache(small(focal_ratio=1.0, scope=scope))
    got = decode(cache, inputs, 120, (1, 1, 20), ids)
    want = reference.dense(*inputs, document_ids=ids)
    assert relative_error(got, want) < TOLERANCE[torch.float32]
    assert cache.num_slots > 0


@settings(max_examples=12)
@given(
    changes=configs,
    scope=st.sampled_from(["prompt", "causal"]),
    grouping=st.sampled_from(["sequence", "similarity"]),
    prompt=st.sampled_from([1, 33, 150, 290]),
)
def test_every_past_token_is_seen_exactly_once(changes, scope, grouping, prompt):
    """Queries of 0 weigh all alike, groups by their mass: the output is the mean of all values."""
    changes |= {"group_weights": "mean", "group_bias": "mass"}
    if grouping == "similarity":
        changes |= {"unit_size": 32, "group_size": 8}
    query, key, value = qkv(2, 4, 2, 300)
    ids = left_padded(2, 300, most=20)
    cache = LayerCache(small(**changes, scope=scope, grouping=grouping))
    got = decode(cache, (query * 0, key, value), prompt, (1, 1, 30), ids)
    want = reference.dense(query * 0, key, value, document_ids=ids)
    # 1/n of a query that sees n tokens: a token missed or seen twice is far above 1e-5.
    assert relative_error(got, want) < 1e-5


def test_a_packed_prompt_goes_on_with_its_last_document():
    query, key, value = qkv(1, 2, 2, 200)
    ids = torch.zeros(1, 120, dtype=torch.int32)
    ids[:, 50:] = 1
    cache = LayerCache(small(focal_ratio=1.0))
    cache.attend(query[:, :, :120], key[:, :, :120], value[:, :, :120], document_ids=ids)
    got = cache.attend(query[:, :, 120:], key[:, :, 120:], value[:, :, 120:])
    want = reference.dense(query[:, :, 50:], key[:, :, 50:], value[:, :, 50:])[:, :, 70:]
    assert relative_error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "mod",
    [
        score_mods.softcap(2.0),
        score_mods.alibi(torch.tensor([0.5, 0.25, 0.1, 0.05])),
        score_mods.relative_bias(torch.linspace(-1, 1, 4 * 41).view(4, 41)),
        score_mods.compose(
            score_mods.softcap(3.0), score_mods.attention_sinks(torch.tensor([0.0, 1, 2, 3]))
        ),
        lambda score, b, h, q, kv: score * 0.5 - (q - kv) * 0.01 * h,
    ],
    ids=["softcap", "alibi", "relative bias", "softcap and sinks", "of one's own"],
)
def test_score_mods(mod):
    config = small(scope="causal")
    inputs = qkv(1, 4, 2, 230)
    want = dga_attention(*inputs, config=config, score_mod=mod)
    got = decode(LayerCache(config), inputs, 100, (1, 9), score_mod=mod)
    assert relative_error(got, want) < TOLERANCE[torch.float32]


def test_a_short_text_stays_dense_until_it_is_long():
    inputs = qkv(1, 4, 2, 400)
    dense = reference.dense(*inputs)
    config = small(dense_below=200, scope="causal")
    cache = LayerCache(config)
    got = decode(cache, inputs, 50)
    assert relative_error(got[:, :, :199], dense[:, :, :199]) < TOLERANCE[torch.float32]
    assert cache.num_slots > 0 and cache.memory().ratio < 1
    long = dga_attention(*inputs, config=small(scope="causal"))
    assert relative_error(got[:, :, 199:], long[:, :, 199:]) < TOLERANCE[torch.float32]


def test_while_it_is_dense_little_more_is_kept_than_the_text():
    inputs = qkv(1, 4, 2, 2000)
    cache = LayerCache(DGAConfig(dense_below=4000, open_mass=0.5))
    cache.attend(*inputs)
    assert cache.num_slots == 0 and cache.num_raw == 2000
    assert 1 < cache.memory().ratio < 1 + 1 / 8 + (256 * 2 + 3 * 64) / 2000
    for length in (1, 1900, 200):  # until it is long
        cache.attend(*qkv(1, 4, 2, length))
    # Room, keys in bfloat16 for estimates, and the window.
    assert cache.memory().ratio < (1 + 1 / 16) * (1 + 1 / 4) + 300 / 4100


@pytest.mark.parametrize("opens", [{}, OPENS | {"open_units": None}], ids=["closed", "open"])
def test_cropping_may_make_a_long_text_short_again(opens):
    config = small(**opens, dense_below=150, scope="causal")
    inputs, wrong = qkv(1, 4, 2, 200), qkv(1, 4, 2, 30)
    cache, plain = LayerCache(config), LayerCache(config)
    cache.record_past = True
    out = [cache.attend(*(t[:, :, :140] for t in inputs))]
    cache.attend(*wrong)
    assert cache.num_slots > 0
    cache.crop(30)
    assert cache.num_slots == 0
    out.append(decode(cache, [t[:, :, 140:] for t in inputs], 1))
    want = decode(plain, inputs, 140)
    assert relative_error(torch.cat(out, 2), want) < TOLERANCE[torch.float32]


def test_cropping_takes_tokens_back():
    config = small(scope="causal")
    inputs = qkv(1, 4, 2, 300)
    want = dga_attention(*inputs, config=config)
    cache = LayerCache(config)
    cache.record_past = True
    wrong = qkv(1, 4, 2, 20)
    out = [cache.attend(*(t[:, :, :100] for t in inputs))]
    cache.crop(12)
    out[0] = out[0][:, :, :88]
    for at in range(88, 300, 4):
        cache.attend(*wrong)
        cache.crop(20)
        out.append(cache.attend(*(t[:, :, at : at + 4] for t in inputs)))
    assert relative_error(torch.cat(out, 2), want) < TOLERANCE[torch.float32]


def test_cropping_what_is_pooled_for_good_says_so():
    inputs = qkv(1, 2, 2, 200)
    cache = LayerCache(small())
    decode(cache, inputs, 150)
    with pytest.raises(ValueError, match=r"remove: tokens up to \d+ are pooled"):
        cache.crop(100)
    assert cache.seen == 200


def test_sequences_can_be_reordered():
    config = small(scope="causal")
    inputs = qkv(3, 4, 2, 260)
    rows = torch.tensor([2, 0, 0])
    cache = LayerCache(config)
    decode(cache, [t[:, :, :130] for t in inputs], 100)
    cache.select(rows)
    moved = [t[rows] for t in inputs]
    got = decode(cache, [t[:, :, 130:] for t in moved], 1)
    want = dga_attention(*moved, config=config)[:, :, 130:]
    assert relative_error(got, want) < TOLERANCE[torch.float32]


def test_memory_falls_to_the_share_of_slots():
    config = DGAConfig(
        dense_below=0, scope="causal", probes=8, rest="group", focal_ratio=1 / 16, unit_size=128,
        open_units=0, window=128,
    )  # fmt: skip
    query, key, value = qkv(1, 2, 2, 4096)
    cache = LayerCache(config)
    cache.attend(query, key, value)
    memory = cache.memory()
    assert memory.dense_bytes == 2 * key.numel() * 4
    kept = 1 / 16 + 1 / 16 + (256 * 1.5 + 64) / 4096  # focal, groups, raw with queries, room
    assert 1 / 8 < memory.ratio < kept + 0.02


def test_room_for_a_known_length_is_made_at_once():
    cache = LayerCache(small(), max_length=400)
    inputs = qkv(1, 2, 2, 400)
    cache.attend(*(t[:, :, :100] for t in inputs))
    before = cache.memory().bytes
    decode(cache, [t[:, :, 100:] for t in inputs], 1)
    assert cache.memory().bytes == before


def test_the_cache_by_itself_over_layers():
    config = small(scope="causal")
    cache = DGACache(config, layers=lambda index: None if index == 0 else config)
    layers = [qkv(1, 4, 2, 200) for _ in range(2)]
    outs = [[], []]
    for part in (slice(0, 120), *(slice(n, n + 1) for n in range(120, 200))):
        for index, inputs in enumerate(layers):
            query, key, value = (t[:, :, part] for t in inputs)
            cache.update(key, value, index)
            outs[index].append(dga_decode(query, cache, index))
    first, second = (torch.cat(out, 2) for out in outs)
    assert relative_error(first, reference.dense(*layers[0])) < TOLERANCE[torch.float32]
    want = dga_attention(*layers[1], config=config)
    assert relative_error(second, want) < TOLERANCE[torch.float32]
    assert cache.layers[0].cache.num_slots == 0 < cache.layers[1].cache.num_slots


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda q, c: dga_decode(q, "no"), TypeError, "cache: expected a DGACache, got str"),
        (lambda q, c: dga_decode(q, c, 3), ValueError, "layer_idx: expected one of the cache's 1"),
        (lambda q, c: dga_decode(q, c), ValueError, "query: expected cache.update"),
        (
            lambda q, c: (c.update(q[:, :1], q[:, :1]), dga_decode(q, c)),
            ValueError,
            r"key: expected \(1, 2, 1, 32\) to fit the cache, got \(1, 1, 1, 32\)",
        ),
        (lambda q, c: (c.update(q, q), c.update(q, q)), RuntimeError, "never attended to"),
        (lambda q, c: DGACache("no"), TypeError, "config: expected a DGAConfig, got str"),
    ],
)
def test_bad_input_is_told(spoil, error, says):
    cache = DGACache(small())
    query = torch.randn(1, 2, 1, 32)
    cache.update(query, query)
    dga_decode(query, cache)
    with pytest.raises(error, match=says):
        spoil(query, cache)


def test_a_row_that_ends_in_padding_cannot_go_on():
    ids = torch.tensor([[0, 0, 0], [0, 0, -1]])
    with pytest.raises(ValueError, match="got row 1, which ends in padding"):
        LayerCache(small()).attend(*qkv(2, 2, 2, 3), document_ids=ids)


def test_a_step_copies_only_what_it_is_the_first_to_open():
    rows, copied = torch.randn(4, 10, 16, 8), []  # of B·Hkv heads, units of 16 tokens

    def gather(pairs):
        copied.append(pairs)
        both = torch.stack([rows[head, unit] for head, unit in pairs])
        return both, -both

    columns = OpenColumns(16)
    columns.clear(torch.empty(2, 2, 0, 8), rows.device)
    opened = torch.zeros(2, 6, 10, dtype=torch.bool)  # three query heads of each KV head
    opened[0, 0, 7] = opened[0, 2, 7] = opened[1, 5, 3] = True
    columns.add(opened, gather)
    opened[0, 1, 7] = opened[0, 0, 2] = opened[1, 5, 3] = opened[0, 3, 9] = True
    columns.add(opened, gather)
    assert copied == [[(0, 7), (3, 3)], [(0, 2), (1, 9)]]
    assert columns.unit.tolist() == [[[7, 2], [9, -1]], [[-1, -1], [3, -1]]]
    near = torch.randn(2, 2, 20, 8)
    key, value = columns.with_near(Columns(near, near + 1, near[..., 0], near[..., 0]))
    assert torch.equal(key[0, 0], torch.cat([rows[0, 7], rows[0, 2], near[0, 0]]))
    assert torch.equal(key[1, 1, 16:], torch.cat([0 * rows[0, 0], near[1, 1]]))
    assert torch.equal(value[0, 1], torch.cat([-rows[1, 9], 0 * rows[0, 0], near[0, 1] + 1]))
