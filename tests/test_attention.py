"""The attention call against the oracle: eager for breadth, compiled for the kernel itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, qkv, relative_error, small
from hypothesis import given
from hypothesis import strategies as st
from test_planner import layout_arguments, layouts, openers, planners

import score_mods
from flexdga import DGAConfig, attention, dga_attention, make_plan, reference, scratch

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def check(inputs, config, **arguments):
    """dga_attention against the reference on the same plan."""
    out, plan = dga_attention(*inputs, config=config, return_plan=True, **arguments)
    for planned in ("document_ids", "lengths", "is_causal", "plan"):
        arguments.pop(planned, None)
    want = reference.attend(
        *inputs,
        plan,
        group_weights=config.group_weights,
        group_bias=config.group_bias,
        **arguments,
    )
    assert out.dtype == inputs[0].dtype and out.shape == want.shape
    assert relative_error(out, want) < TOLERANCE[inputs[0].dtype]
    return out, plan


kernels = st.fixed_dictionaries(
    {
        "group_weights": st.sampled_from(["last_query", "mean", "importance"]),
        "group_bias": st.sampled_from(["none", "mass"]),
    }
)
heads = st.sampled_from([(2, 2), (4, 1), (6, 2), (9, 3)])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.usefixtures("eager")
@given(
    planner=planners,
    opener=st.one_of(st.just({}), openers),
    rest=st.sampled_from(["group", "drop"]),
    kernel=kernels,
    layout=layouts,
    length=st.sampled_from([1, 31, 64, 101]),
    heads=heads,
    dtype=dtypes,
    head_dim=st.sampled_from([32, 80]),
    causal=st.booleans(),
)
def test_equals_reference(
    planner, opener, rest, kernel, layout, length, heads, dtype, head_dim, causal
):
    inputs = qkv(2, *heads, length, head_dim, dtype)
    arguments, ids = layout_arguments(layout, 2, length)
    if rest == "drop" and not planner["window"]:
        planner = planner | {"window": 1}
    config = small(**(planner | opener), **kernel, rest=rest)
    out, _ = check(inputs, config, is_causal=causal, **arguments)
    assert (out.transpose(1, 2)[ids < 0] == 0).all()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("scope", ["prompt", "causal"])
@pytest.mark.parametrize("layout", ["plain", "lengths", "left", "packed"])
@pytest.mark.parametrize(
    "exact", [{"focal_ratio": 1.0}, {"window": 512}], ids=["all tokens focal", "window over all"]
)
def test_equals_dense_where_nothing_is_grouped(exact, layout, scope):
    inputs = qkv(2, 6, 2, 211)
    arguments, ids = layout_arguments(layout, 2, 211)
    out = dga_attention(*inputs, config=small(**exact, scope=scope), **arguments)
    want = reference.dense(*inputs, document_ids=ids)
    assert relative_error(out, want) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("length", "ratio", "size"), [(211, 0.1, 16), (97, 0.25, 5), (33, 0.0, 8)])
def test_paper_mode_is_the_five_steps(length, ratio, size):
    query, key, value = qkv(heads=2, length=length)
    config = DGAConfig.paper(focal_ratio=ratio, group_size=size, block_size=(16, 16))
    out = dga_attention(query, key, value, config=config)
    for h in range(2):
        want = reference.paper(
            query[0, h], key[0, h], value[0, h], focal_ratio=ratio, group_size=size
        )
        assert relative_error(out[0, h], want) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("length", "size", "window"), [(211, 16, 64), (97, 5, 17), (40, 8, 100)])
def test_cca_is_its_two_modules(length, size, window):
    query, key, value = qkv(heads=2, length=length)
    config = DGAConfig.cca(group_size=size, window=window, block_size=(16, 16))
    out = dga_attention(query, key, value, config=config)
    for h in range(2):
        want = reference.cca(query[0, h], key[0, h], value[0, h], group_size=size, window=window)
        assert relative_error(out[0, h], want) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("opener", [{}, {"open_units": None, "unit_size": 16}])
@pytest.mark.parametrize("layout", ["plain", "lengths", "packed"])
def test_a_call_in_parts_is_the_call(monkeypatch, layout, opener):
    """A long call takes a few KV heads at a time; here a short one does, three rows and two."""
    inputs, config = qkv(1, 10, 5, 200), small(**opener)
    arguments, _ = layout_arguments(layout, 1, 200)
    whole, _ = dga_attention(*inputs, config=config, return_plan=True, **arguments)
    calls = []
    plan_attention = attention.plan_attention
    monkeypatch.setitem(scratch.BLOCKS, "cpu", 1)
    monkeypatch.setattr(
        attention,
        "plan_attention",
        lambda q, *a, **k: calls.append(len(q)) or plan_attention(q, *a, **k),
    )
    monkeypatch.setattr(attention, "_run", lambda function, *a, **k: function(*a, **k))
    assert torch.equal(dga_attention(*inputs, config=config, **arguments), whole)
    assert calls == [2, 3]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("opens", [0, None], ids=["closed", "open"])
def test_causal_scope_is_causal_bit_for_bit(opens, mode, request):
    if mode == "eager":
        request.getfixturevalue("eager")
    block = 16 if mode == "eager" else 32
    config = small(
        scope="causal", block_size=(block, block), unit_size=32 if mode == "compiled" else 16,
        open_units=opens, open_mass=0.01,
    )  # fmt: skip
    inputs = qkv(2, 6, 2, 300)
    before = dga_attention(*inputs, config=config)
    for token in (299, 150, 37, 1):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, :, token] = 5 * torch.randn_like(x[:, :, token])
        after = dga_attention(*changed, config=config)
        assert torch.equal(before[:, :, :token], after[:, :, :token])
        assert not torch.equal(before[:, :, token:], after[:, :, token:])


@pytest.mark.usefixtures("eager")
def test_prompt_scope_does_look_ahead():
    """The causality test can fail: planning over the whole prompt does."""
    inputs = qkv(length=300)
    before = dga_attention(*inputs, config=small())
    for x in inputs:
        x[:, :, 280:] = 5 * torch.randn_like(x[:, :, 280:])
    after = dga_attention(*inputs, config=small())
    assert not torch.equal(before[:, :, :280], after[:, :, :280])


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
CAPPED_ALIBI = score_mods.compose(score_mods.softcap(2.0), score_mods.alibi(SLOPES))


@pytest.mark.parametrize(
    ("heads", "dtype", "head_dim", "group_bias", "score_mod"),
    [
        ((6, 2), torch.float32, 32, "none", None),
        ((4, 4), torch.bfloat16, 64, "mass", CAPPED_ALIBI),
        pytest.param((4, 4), torch.bfloat16, 64, "none", None, marks=pytest.mark.slow),
        pytest.param((2, 1), torch.float16, 64, "none", None, marks=pytest.mark.slow),
        pytest.param((4, 2), torch.float32, 64, "none", CAPPED_ALIBI, marks=pytest.mark.slow),
    ],
    ids=lambda value: "score mod" if callable(value) else str(value),
)
def test_compiled_kernel_equals_reference(heads, dtype, head_dim, group_bias, score_mod):
    """At lengths that divide nothing, in every layout, and all of it compiled once."""
    config = small(block_size=(32, 32), group_bias=group_bias)
    for length, layout in ((65, "plain"), (131, "packed"), (211, "left"), (257, "lengths")):
        inputs = qkv(2, *heads, length, head_dim, dtype)
        arguments, _ = layout_arguments(layout, 2, length)
        with torch.compiler.set_stance("force_eager"):
            plan = make_plan(*inputs, config=config, **arguments)
        check(inputs, config, plan=plan, score_mod=score_mod)


def test_half_precision_is_computed_in_float32_where_that_is_faster(monkeypatch):
    """And what a caller's graph computes of the output is left out of the kernel."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    config = DGAConfig.streaming_llm(window=64, dense_below=0)
    inputs = qkv(1, 2, 2, 300, dtype=torch.bfloat16)
    twice = torch.compile(lambda *x: 2 * dga_attention(*x, config=config), fullgraph=True)
    want = dga_attention(*(x.float() for x in inputs), config=config)
    torch.testing.assert_close(twice(*inputs), (2 * want).bfloat16(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spoilt", ["query", "key"])
def test_what_is_no_number_reaches_all_who_see_it_and_nobody_else(spoilt):
    """Though the kernel's maximum loses it."""
    config = DGAConfig.streaming_llm(window=64, dense_below=0)
    inputs = dict(zip(("query", "key", "value"), qkv(1, 2, 2, 700)))
    inputs[spoilt][0, 1, 333, 5] = torch.nan
    out, plan = dga_attention(**inputs, config=config, return_plan=True)
    want = torch.zeros(2, 700, dtype=torch.bool)
    want[1, 333] = True
    if spoilt == "key":
        want[1] = plan.visible(torch.arange(700))[0, 1, :, 333]
    assert 0 < want.sum() < 200
    assert torch.equal(out.isnan().all(-1)[0], want) and torch.equal(out.isnan().any(-1)[0], want)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [40, 96, 128, 256])
@pytest.mark.parametrize("block_size", [(16, 16), (64, 128), (128, 64)], ids=str)
def test_compiled_kernel_at_other_sizes(block_size, head_dim):
    """The repaired register block at head dims and tiles that it does not divide."""
    config = small(block_size=block_size, unit_size=128, group_bias="mass")
    for length in (150, 389):
        check(qkv(1, 3, 1, length, head_dim), config)


def test_short_sequences_take_sdpa():
    inputs = qkv(2, 4, 2, 100)
    config = DGAConfig()
    assert torch.equal(
        dga_attention(*inputs, config=config),
        F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True),
    )
    for layout in ("lengths", "left", "packed"):
        arguments, ids = layout_arguments(layout, 2, 100)
        for causal in (True, False):
            out = dga_attention(*inputs, config=config, is_causal=causal, **arguments)
            want = reference.dense(*inputs, document_ids=ids, is_causal=causal)
            assert relative_error(out, want) < TOLERANCE[torch.float32]


group_choices = pytest.mark.parametrize(
    "choices",
    [
        {},
        {"group_bias": "mass"},
        {"group_weights": "importance"},
        {"group_bias": "mass", "group_weights": "importance"},
    ],
    ids=lambda choices: "+".join(choices.values()) or "default",
)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("layout", ["plain", "lengths", "left", "packed"])
@group_choices
def test_short_sequences_stay_exact_with_a_plan(choices, layout, causal):
    inputs = qkv(2, 4, 2, 100)
    arguments, ids = layout_arguments(layout, 2, 100)
    config = DGAConfig(**choices)
    out, plan = dga_attention(
        *inputs, config=config, is_causal=causal, return_plan=True, **arguments
    )
    want = reference.dense(*inputs, document_ids=ids, is_causal=causal)
    assert relative_error(out, want) < TOLERANCE[torch.float32]
    assert torch.equal(out, dga_attention(*inputs, config=config, plan=plan))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@group_choices
def test_short_sequences_stay_exact_with_a_score_mod(choices, causal):
    inputs = qkv(2, 4, 2, 100)
    mod = score_mods.softcap(2.0)
    arguments = {"config": DGAConfig(**choices), "score_mod": mod, "is_causal": causal}
    capped = dga_attention(*inputs, **arguments)
    scores = inputs[0].double() @ inputs[1].double().repeat_interleave(2, 1).mT / 32**0.5
    scores = 2 * torch.tanh(scores / 2)
    if causal:
        future = ~torch.ones(100, 100, dtype=torch.bool).tril()
        scores = scores.masked_fill(future, -torch.inf)
    want = torch.softmax(scores, -1) @ inputs[2].double().repeat_interleave(2, 1)
    assert relative_error(capped, want) < TOLERANCE[torch.float32]
    again, _ = dga_attention(*inputs, return_plan=True, **arguments)
    assert torch.equal(capped, again)


@pytest.mark.usefixtures("eager")
def test_all_padding_rows_give_zeros():
    inputs = qkv(2, 2, 2, 100)
    for config in (small(), DGAConfig()):
        out = dga_attention(*inputs, config=config, lengths=torch.tensor([0, 100]))
        assert (out[0] == 0).all() and out.isfinite().all()


@pytest.mark.usefixtures("eager")
def test_a_plan_serves_another_layer():
    first, second = qkv(2, 4, 2, 150), qkv(2, 4, 2, 150)
    config = small(group_weights="importance")
    plan = make_plan(*first, config=config)
    out = dga_attention(*second, config=config, plan=plan)
    want = reference.attend(*second, plan, group_weights="importance")
    assert relative_error(out, want) < TOLERANCE[torch.float32]
    assert torch.equal(
        dga_attention(*first, config=config), dga_attention(*first, config=config, plan=plan)
    )


@pytest.mark.usefixtures("eager")
def test_packed_documents_do_not_touch_each_other():
    inputs = qkv(1, 2, 2, 200)
    ids = (torch.arange(200) // 90)[None]
    before = dga_attention(*inputs, config=small(), document_ids=ids)
    for x in inputs:
        x[:, :, 90:180] = torch.randn_like(x[:, :, 90:180])
    after = dga_attention(*inputs, config=small(), document_ids=ids)
    assert torch.equal(before[:, :, :90], after[:, :, :90])
    assert torch.equal(before[:, :, 180:], after[:, :, 180:])
    assert not torch.equal(before[:, :, 90:180], after[:, :, 90:180])
