"""Every way in which people train: checkpoints, autocast, torch.func, a compile, a whole model."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from helpers import TOLERANCE, qkv, relative_error, small
from plain_models import VOCABULARY, NanoGPT
from test_backward import CAUSAL, OPENS, _no_leak_warning, by_oracle, gradients, leaves  # noqa: F401
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import score_mods
from flexdga import DGAConfig, DGAttention, applied, attention, dga_attention, saying


def loss(query, key, value, config=CAUSAL):
    return dga_attention(query, key, value, config=config).square().sum()


@pytest.fixture
def trained(eager):
    """Inputs and the gradients of `loss`."""
    inputs = qkv(2, 6, 2, 101)
    return inputs, torch.autograd.grad(loss(*(x := leaves(inputs))), x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(trained, reentrant):
    inputs, want = leaves(trained[0]), trained[1]
    checkpoint(loss, *inputs, use_reentrant=reentrant).backward()
    for x, w in zip(inputs, want):
        assert torch.equal(x.grad, w)


def test_accumulation(trained):
    inputs, want = leaves(trained[0]), trained[1]
    for row in (slice(0, 1), slice(1, 2)):
        loss(*(x[row] for x in inputs)).backward()
    for x, w in zip(inputs, want):
        assert relative_error(x.grad, w) < TOLERANCE[torch.float32]


def test_autocast(trained):
    """As SDPA: the tensors are cast, whatever their dtypes; gradients come in the tensors' own."""
    inputs, want = leaves(trained[0]), trained[1]
    with torch.autocast("cpu", torch.bfloat16):
        query, key, value = inputs
        out = dga_attention(query, key, value.bfloat16(), config=CAUSAL)
        assert out.dtype == torch.bfloat16
        got = torch.autograd.grad(out.float().square().sum(), inputs)  # autocast is on here too
    for g, w in zip(got, want):
        assert g.dtype == torch.float32
        assert 1e-4 < relative_error(g, w) < TOLERANCE[torch.bfloat16]


def test_torch_func(trained):
    inputs, want = trained
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    _, pull = torch.func.vjp(loss, *inputs)
    for g, p, w in zip(got, pull(torch.ones(())), want):
        assert torch.equal(g, w) and torch.equal(p, w)


@pytest.mark.parametrize("opens", [{}, OPENS], ids=["groups", "opens"])
def test_gradients_of_each_sample(eager, opens):
    """vmap over grad, with respect to a layer's weights: as one sample after the other."""
    config = small(scope="causal", group_bias="mass", **opens)
    layer = DGAttention(48, 6, num_kv_heads=2, config=config)
    samples = torch.randn(3, 101, 48)
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}

    def of_one(weights, sample):
        out = torch.func.functional_call(layer, weights, (sample[None],))
        return out.square().sum()

    got = torch.vmap(torch.func.grad(of_one), in_dims=(None, 0))(weights, samples)
    for i, sample in enumerate(samples):
        want = torch.autograd.grad(layer(sample[None]).square().sum(), list(layer.parameters()))
        for name, w in zip(weights, want):
            assert relative_error(got[name][i], w) < TOLERANCE[torch.float32], name
    total = torch.func.grad(lambda w: torch.vmap(of_one, (None, 0))(w, samples).sum())(weights)
    for name, g in got.items():
        assert relative_error(total[name], g.sum(0)) < TOLERANCE[torch.float32]


def test_vmap_joins_the_batch(eager):
    """Forward alone, over dimensions that differ, with a row of documents that all share."""
    query, key, value = qkv(2, 6, 2, 101)
    ids = (torch.arange(101) // 40).expand(1, -1)

    def attend(query, key, value):
        return dga_attention(
            query[None], key[None], value[None], config=CAUSAL, document_ids=ids
        )[0]  # fmt: skip

    got = torch.vmap(attend, (0, 2, None))(query, key.movedim(0, 2), value[0])
    value = value[:1].expand_as(value)
    want = dga_attention(query, key, value, config=CAUSAL, document_ids=ids.expand(2, -1))
    assert relative_error(got, want) < TOLERANCE[torch.float32]


def test_vmap_refuses_a_score_mod(eager):
    """It would be told the batch of all samples."""

    def attend(query, key, value):
        mod = score_mods.softcap(3.0)
        return dga_attention(query, key, value, config=CAUSAL, score_mod=mod)

    with pytest.raises(NotImplementedError, match=r"score_mod: expected None under torch\.vmap"):
        torch.vmap(attend)(*(t[None] for t in qkv()))


def test_a_second_derivative_is_refused(trained):
    query, key, value = leaves(trained[0])
    (first,) = torch.autograd.grad(loss(query, key, value), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="its gradient has no gradient"):
        first.sum().backward()


def test_nothing_is_kept_for_a_backward_that_cannot_come(trained):
    inputs = leaves(trained[0])
    with torch.no_grad():
        assert loss(*inputs).grad_fn is None
    with torch.inference_mode():
        assert not loss(*inputs).requires_grad


@pytest.mark.usefixtures("eager")
def test_no_gradient_comes_from_the_future():
    """`causal` scope: an output changes with no later query, key or value."""
    inputs = leaves(qkv(1, 4, 2, 130))
    for config in (CAUSAL, small(scope="causal", **OPENS)):
        out = dga_attention(*inputs, config=config)
        for t in (0, 40, 77, 128):
            got = torch.autograd.grad(out[:, :, t].square().sum(), inputs, retain_graph=True)
            for g in got:
                assert (g[:, :, t + 1 :] == 0).all()
            assert got[2][:, :, : t + 1].abs().sum() > 0


@pytest.mark.usefixtures("eager")
def test_padding_gets_no_gradient():
    inputs = leaves(qkv(2, 4, 2, 130))
    out = dga_attention(*inputs, config=CAUSAL, lengths=torch.tensor([130, 60]))
    for g in torch.autograd.grad(out.sum(), inputs):
        assert (g[1, :, 60:] == 0).all() and g[1, :, :60].abs().sum() > 0


@pytest.mark.usefixtures("eager")
def test_prompt_scope_warns_once_that_it_leaks(monkeypatch):
    monkeypatch.setattr(saying, "_said", set())
    inputs = leaves(qkv(length=70))
    quiet = (
        CAUSAL,
        small(dense_below=1000),
        DGAConfig.streaming_llm(window=20),  # it decides by position alone
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "flexdga")
        for config in quiet:
            dga_attention(*inputs, config=config)
        dga_attention(*inputs, config=small(), is_causal=False)
        with torch.no_grad():
            dga_attention(*inputs, config=small())
    with pytest.warns(UserWarning, match="scope='prompt'.*scope='causal'"):
        dga_attention(*inputs, config=small())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "flexdga")
        dga_attention(*inputs, config=small())


# Compiled


COMPILED = small(scope="causal", block_size=(32, 32), unit_size=32, open_mass=0.01)
"""What test_attention.py compiles too."""


def test_compiled_training_shares_the_compilation_of_inference():
    config, inputs = COMPILED, qkv(2, 6, 2, 300)
    with torch.no_grad():
        dga_attention(*inputs, config=config)
    before = counters["stats"]["unique_graphs"]
    _, got = gradients(functools.partial(dga_attention, config=config), inputs)
    gradient = torch.func.grad(functools.partial(loss, config=config))
    mapped, each = gradient(*inputs), torch.vmap(gradient)(*(x[:, None] for x in inputs))
    assert counters["stats"]["unique_graphs"] == before
    with torch.compiler.set_stance("force_eager"):
        _, want = gradients(functools.partial(dga_attention, config=config), inputs)
        double = gradients(functools.partial(loss, config=config), inputs)[1][0]
    for g, w in zip(got, want):
        assert relative_error(g, w) < TOLERANCE[torch.float32]
    assert relative_error(mapped * loss(*inputs, config=config), double) < 1e-5
    assert relative_error(each[:, 0], mapped) < TOLERANCE[torch.float32]


def test_a_users_compile_breaks_its_graph_and_says_why():
    """The kernel is the one that the test before has compiled."""

    def layer(query, key, value):
        return dga_attention(query * 2, key, value, config=COMPILED).tanh()

    inputs = qkv(2, 6, 2, 300)
    with torch.compiler.set_stance("force_eager"):
        _, want = gradients(layer, inputs)
    whole = torch.compile(layer, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="has no backward on CPU"):
        whole(*leaves(inputs))
    _, got = gradients(torch.compile(layer, backend="eager"), inputs)
    for g, w in zip(got, want):
        assert relative_error(g, w) < TOLERANCE[torch.float32]


# A model


@pytest.mark.usefixtures("eager")
def test_a_plain_model_trains(monkeypatch):
    model, ids = NanoGPT(), torch.randint(VOCABULARY, (2, 130))

    def next_token():
        logits = model(ids)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with applied(model, CAUSAL):
        next_token().backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(attention, "attend_on_cpu", by_oracle)
            next_token().backward()
        for p, g in zip(model.parameters(), got):
            assert relative_error(g, p.grad) < 1e-5
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            losses.append(next_token())
            losses[-1].backward()
            optimizer.step()
    assert losses[-1] < losses[0] - 0.5
