"""Gradients on CPU, against autograd through the float64 oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import TOLERANCE, qkv, relative_error, small
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import layout_arguments, layouts, openers, planners
from torch import Tensor

import score_mods
from flexdga import (
    DGAConfig,
    attention,
    by_blocks,
    dga_attention,
    make_plan,
    reference,
    saying,
)

OPENS = {"open_units": None, "unit_size": 16, "open_mass": 0.02}
CAUSAL = small(scope="causal", group_bias="mass")


@pytest.fixture
def small_chunks(monkeypatch):
    """So few scores at a time that small tensors need several turns."""
    monkeypatch.setattr(by_blocks, "SCORES", 2000)


@pytest.fixture(autouse=True)
def _no_leak_warning(monkeypatch):
    """It comes once in a process: not here, but for the tests that look for it."""
    monkeypatch.setattr(saying, "_said", {attention.LEAK})


def leaves(inputs):
    return [t.detach().clone().requires_grad_() for t in inputs]


def gradients(function, inputs, direction: Tensor | None = None):
    """Output and gradients, the output's own gradient being `direction` or what it is itself."""
    inputs = leaves(inputs)
    out = function(*inputs)
    direction = out.detach() if direction is None else direction.to(out.dtype)
    if not out.requires_grad:  # the oracle where there is nothing but padding
        return out, [torch.zeros_like(t) for t in inputs]
    return out.detach(), torch.autograd.grad(out, inputs, direction)


def oracle(plan, config, *, scale=None, score_mod=None):
    return lambda query, key, value: reference.attend(
        query, key, value, plan, group_weights=config.group_weights,
        group_bias=config.group_bias, scale=scale, score_mod=score_mod,
    )  # fmt: skip


def check(inputs, config, *, score_mod=None, **arguments):
    """Gradients of dga_attention against autograd through the oracle on the same plan.

    The output's tolerances hold for them too: sums are kept in float32, and what is left are
    roundings of the dtype. The largest errors were 2.5e-7, 4e-4 and 3e-3.
    """
    with torch.no_grad():
        plan = make_plan(*inputs, config=config, **arguments)
    direction = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3])
    through = functools.partial(dga_attention, config=config, score_mod=score_mod, **arguments)
    out, got = gradients(through, inputs, direction)
    want_out, want = gradients(oracle(plan, config, score_mod=score_mod), inputs, direction)
    dtype = inputs[0].dtype
    assert relative_error(out, want_out) < TOLERANCE[dtype]
    for g, w, x in zip(got, want, inputs):
        assert g.dtype == x.dtype and g.shape == x.shape and g.isfinite().all()
        # Of one token alone the query has no gradient: nothing to be relative to.
        assert relative_error(g, w) < TOLERANCE[dtype] or w.norm() < 1e-5 * direction.norm()


@pytest.mark.usefixtures("eager")
@settings(max_examples=20)
@given(
    planner=planners,
    opener=st.one_of(st.just({}), openers),
    rest=st.sampled_from(["group", "drop"]),
    weights=st.sampled_from(["last_query", "mean", "importance"]),
    bias=st.sampled_from(["none", "mass"]),
    layout=layouts,
    length=st.sampled_from([1, 31, 64, 75]),
    heads=st.sampled_from([(2, 2), (4, 1), (6, 2), (9, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    causal=st.booleans(),
)
def test_equals_autograd_through_the_oracle(
    planner, opener, rest, weights, bias, layout, length, heads, dtype, causal
):
    inputs = qkv(2, *heads, length, 32, dtype)
    arguments, _ = layout_arguments(layout, 2, length)
    if rest == "drop" and not planner["window"]:
        planner = planner | {"window": 1}
    config = small(**(planner | opener), rest=rest, group_weights=weights, group_bias=bias)
    check(inputs, config, is_causal=causal, **arguments)


@pytest.mark.usefixtures("eager", "small_chunks")
@pytest.mark.parametrize(
    "config",
    [
        DGAConfig.paper(block_size=(16, 16)),
        DGAConfig.cca(block_size=(16, 16), window=40),
        DGAConfig(dense_below=0, scope="causal"),
        small(scope="causal", **OPENS),
        small(block_size=(16, 32), rest="drop", window=40),
    ],
    ids=["paper", "cca", "default", "opens", "wide key blocks"],
)
def test_presets_in_many_turns(config):
    check(qkv(1, 6, 2, 130), config)


@pytest.mark.usefixtures("eager")
def test_a_value_wider_than_the_key():
    query, key, _ = qkv(1, 4, 2, 90)
    check([query, key, torch.randn(1, 2, 90, 48)], small(group_bias="mass", **OPENS))


@pytest.mark.usefixtures("eager")
def test_exact_settings_have_the_gradients_of_dense_attention():
    inputs = qkv(2, 6, 2, 150)
    for config in (small(focal_ratio=1.0), small(window=256)):
        _, got = gradients(functools.partial(dga_attention, config=config), inputs)
        _, want = gradients(reference.dense, inputs)
        for g, w in zip(got, want):
            assert relative_error(g, w) < TOLERANCE[torch.float32]


# gradcheck: the numerical derivative, in float64


@pytest.mark.usefixtures("eager", "small_chunks")
@pytest.mark.parametrize(
    "changes",
    [
        {"group_bias": "mass"},
        {"group_bias": "mass", "group_weights": "mean", "scope": "causal"},
        OPENS | {"scope": "causal", "group_bias": "mass"},
        OPENS | {"rest": "drop"},
        {"align": False, "window": 0, "focal_ratio": 0.25},
    ],
    ids=["groups", "mean", "opens", "drop", "no window"],
)
@pytest.mark.parametrize("heads", [(3, 1), (2, 2)])
def test_gradcheck(changes, heads):
    config = small(group_size=4, sinks=1, **({"window": 5} | changes))
    inputs = [t.double() for t in qkv(1, *heads, 45, 3)]
    plan = make_plan(*inputs, config=config, lengths=torch.tensor([42]))
    function = functools.partial(dga_attention, config=config, plan=plan)
    # Along random directions: all of the Jacobian takes a forward pass for each of its columns.
    assert torch.autograd.gradcheck(function, leaves(inputs), fast_mode=True)


@pytest.mark.usefixtures("eager")
def test_gradcheck_of_what_a_score_mod_captures():
    config = small(group_size=4, window=5, group_bias="mass")
    inputs = [t.double() for t in qkv(1, 4, 2, 40, 3)]
    plan = make_plan(*inputs, config=config)

    def function(query, key, value, table, logits, slopes):
        mod = score_mods.compose(
            score_mods.softcap(2.0), score_mods.relative_bias(table), score_mods.alibi(slopes),
            score_mods.attention_sinks(logits),
        )  # fmt: skip
        return dga_attention(query, key, value, config=config, plan=plan, score_mod=mod)

    more = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 9), (4,), (4,))]
    assert torch.autograd.gradcheck(function, leaves([*inputs, *more]), fast_mode=True)


# Score mods


class Learned(torch.nn.Module):
    """A score mod with a parameter of its own, for one score at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(4, 8))

    def forward(self, score, b, h, q, kv):
        return score * torch.sigmoid(self.table[h, kv % 8])


learned = Learned()
shift = torch.randn(4)
PLACES = {
    "module": lambda table: learned,
    "method": lambda table: learned.forward,
    "global": lambda table: lambda s, b, h, q, kv: learned(s, b, h, q, kv),
    "closure": lambda table: lambda s, b, h, q, kv: s * torch.sigmoid(table[h, kv % 8]),
    "default": lambda table: lambda s, b, h, q, kv, t=table: s * torch.sigmoid(t[h, kv % 8]),
    "partial": lambda table: functools.partial(
        lambda t, s, b, h, q, kv: s * torch.sigmoid(t[0][h, kv % 8]), [table]
    ),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("place", PLACES)
def test_tensors_are_found_wherever_a_score_mod_keeps_them(place):
    """Also one that was computed; the mod takes one score at a time."""
    inputs, config = qkv(1, 4, 2, 90), small(group_bias="mass", scope="causal")
    table = learned.table * 1.0
    mod = PLACES[place](table)
    plan = make_plan(*inputs, config=config)
    out = dga_attention(*leaves(inputs), config=config, score_mod=mod)
    (got,) = torch.autograd.grad(out.square().sum(), learned.table, retain_graph=True)
    want_out = oracle(plan, config, score_mod=mod)(*inputs)
    (want,) = torch.autograd.grad(want_out.square().sum(), learned.table)
    assert relative_error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("opens", [{}, OPENS], ids=["groups", "opens"])
def test_score_mods_with_what_they_learn(opens):
    inputs, config = qkv(2, 4, 2, 101), small(scope="causal", **opens)
    slopes = torch.rand(4, requires_grad=True)
    mod = score_mods.compose(score_mods.softcap(3.0), score_mods.alibi(slopes))
    check(inputs, config, score_mod=mod)
    # Captured tensors alone may want a gradient.
    out = dga_attention(*inputs, config=config, score_mod=mod)
    (got,) = torch.autograd.grad(out.square().sum(), slopes)
    want_out = oracle(make_plan(*inputs, config=config), config, score_mod=mod)(*inputs)
    (want,) = torch.autograd.grad(want_out.square().sum(), slopes)
    assert relative_error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("eager")
def test_attention_sinks_learn_and_stay_visible_where_the_first_unit_opens():
    """All units open: the oracle is dense attention with one column more."""
    query, key, value = qkv(1, 4, 4, 90)
    logits = torch.randn(4)
    config = small(scope="causal", **(OPENS | {"open_mass": 0.0, "rest": "drop"}))

    def sparse(query, key, value, logits):
        mod = score_mods.attention_sinks(logits)
        return dga_attention(query, key, value, config=config, score_mod=mod)

    def dense(query, key, value, logits):
        score = query.double() @ key.double().mT / 32**0.5
        score = score.masked_fill(~torch.ones(90, 90, dtype=torch.bool).tril(), -torch.inf)
        column = logits.double()[None, :, None, None].expand(1, -1, 90, 1)
        return torch.softmax(torch.cat([column, score], -1), -1)[..., 1:] @ value.double()

    out, got = gradients(sparse, [query, key, value, logits])
    want_out, want = gradients(dense, [query, key, value, logits])
    assert relative_error(out, want_out) < TOLERANCE[torch.float32]
    for g, w in zip(got, want):
        assert relative_error(g, w) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("eager")
def test_a_tensor_out_of_reach_is_named():
    hidden = torch.ones(3, 5, requires_grad=True)

    def build():
        cell = iter(lambda: hidden.sum(), None)  # an object that Python cannot look into
        return lambda s, b, h, q, kv: s * next(cell)

    with pytest.raises(NotImplementedError, match=r"score_mod: it depends on a tensor \(3, 5\)"):
        dga_attention(*leaves(qkv()), config=CAUSAL, score_mod=build())


def test_a_mod_may_hide_and_may_look_at_nothing():
    inputs, config = leaves(qkv(1, 2, 2, 70)), small(scope="causal")
    for mod in (
        lambda s, b, h, q, kv: torch.where(q % 3 == 1, -torch.inf, s),
        lambda s, b, h, q, kv: (q - kv) * 0.01,
    ):
        with torch.compiler.set_stance("force_eager"):
            out = dga_attention(*inputs, config=config, score_mod=mod)
        got = torch.autograd.grad(out.square().sum(), inputs)
        assert all(g.isfinite().all() for g in got) and got[2].norm() > 0


@pytest.mark.usefixtures("eager")
def test_memory_grows_with_the_length_alone():
    """Four times as many tokens hold about four times as much; the scores would be 16 times."""
    from flexdga_bench import measure

    config, held = small(scope="causal", rest="drop", window=32), []
    for length in (1024, 4096):
        inputs = leaves(qkv(1, 2, 2, length))
        plan = make_plan(*inputs, config=config)
        choices = by_blocks.Choices("last_query", False, (16, 16), 1.0, None)

        def backward(inputs=inputs, plan=plan, choices=choices):
            work = by_blocks.Pass(*(x.detach() for x in inputs), plan, choices)
            return work.backward(inputs[0].detach(), [])[0]

        with torch.no_grad():
            held.append(measure.first_call(backward, torch.device("cpu")).peak_bytes)
    assert held[1] < 5 * held[0]


def by_oracle(kernel, query, key, value, plan, choices):
    bias = "mass" if choices.mass else "none"
    out = reference.attend(
        query, key, value, plan, group_weights=choices.weights, group_bias=bias,
        scale=choices.scale, score_mod=choices.score_mod,
    )  # fmt: skip
    return out.to(query.dtype)
