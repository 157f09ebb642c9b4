"""Plain PyTorch models, wrapped: equal to themselves where the config is exact, and left clean."""

from __future__ import annotations

import contextlib
import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, small
from plain_models import VOCABULARY, Encoder, FastGPT, NanoGPT
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from flexdga.plain import unwrap_plain, wrap_plain
from flexdga.report import Report

EXACT = small(focal_ratio=1.0)
LOSSY = small()
TOLERANCE = 1e-6
"""Relative error in float32, four times the largest measured over these tests (2.3e-7)."""

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def text(batch=1, length=200):
    return torch.randint(VOCABULARY, (batch, length))


@contextlib.contextmanager
def no_fused_layer():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def padded(lengths, length, left):
    """(B, L), True where there is padding."""
    index = torch.arange(length)
    index = index.flip(0) if left else index
    return index >= torch.tensor(lengths)[:, None]


def summary(wrapping):
    return [(r.wrapped, r.why, r.replaced, r.passed, r.tokens) for r in wrapping.rows]


class Attend(nn.Module):
    """One SDPA call with whatever the test hands in."""

    def forward(self, *args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs)


def attend(*args, config=EXACT, bidirectional=False, **kwargs):
    """The output of a wrapped model, and the row of its call."""
    model = Attend()
    wrapping = wrap_plain(model, config, bidirectional=bidirectional)
    return model(*args, **kwargs), wrapping.rows[0]


def tensors(batch=2, heads=4, kv_heads=4, length=100, keys=None, dim=16):
    sizes = [(heads, length), (kv_heads, keys or length), (kv_heads, keys or length)]
    return [torch.randn(batch, h, n, dim) for h, n in sizes]


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def as_float(mask, low=-torch.inf):
    return torch.zeros(mask.shape).masked_fill(~mask, low)


# Whole models


@pytest.mark.parametrize("config", [EXACT, LOSSY], ids=["exact", "lossy"])
def test_nano_gpt(config):
    model, idx = NanoGPT().eval(), text(2)
    want = model(idx)
    wrapping = wrap_plain(model, config)
    got = model(idx)
    if config is EXACT:
        assert relative_error(got, want) < TOLERANCE
    else:
        assert relative_error(got, want) > 1e-3
        assert all(row.slots < row.tokens for row in wrapping.rows)
    assert summary(wrapping) == [(True, "causal", 1, 0, 200)] * 2
    assert [row.name for row in wrapping.rows] == ["call 0", "call 1"]


@pytest.mark.parametrize("enable_gqa", [False, True])
def test_gpt_fast_prefill_and_decode(enable_gqa):
    model, idx = FastGPT(enable_gqa=enable_gqa), text(1, 210)
    want = model.run(idx, 205)
    wrapping = wrap_plain(model, EXACT)
    assert relative_error(model.run(idx, 205), want) < TOLERANCE
    assert summary(wrapping) == [(True, "causal mask", 1, 5, 205)] * 2
    unwrap_plain(model, wrapping)
    wrap_plain(model, LOSSY)
    assert relative_error(model.run(idx, 205), want) > 1e-3


def test_decoding_alone_is_no_error():
    model = FastGPT()
    wrapping = wrap_plain(model, EXACT)
    model(text(1, 1), torch.tensor([0]))
    assert summary(wrapping) == [(False, "decode step", 0, 1, 0)] * 2


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("config", [EXACT, LOSSY], ids=["exact", "lossy"])
def test_transformer_encoder_with_a_causal_mask(train, config):
    """In evaluation and without gradients torch would take its fused layer."""
    model, idx = Encoder().train(train), text(2)
    want = model(idx)
    wrapping = wrap_plain(model, config)
    error = relative_error(model(idx), want)
    assert error < TOLERANCE if config is EXACT else error > 1e-3
    assert summary(wrapping) == [(True, "causal", 1, 0, 200)] * 2


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("config", [EXACT, LOSSY], ids=["exact", "lossy"])
def test_transformer_encoder_with_padding(is_causal, left, config):
    model, idx = Encoder(causal=is_causal).eval(), text(3)
    padding = padded([200, 137, 60], 200, left)
    with no_fused_layer():  # it cuts the padding off
        want = model(idx, padding)
    wrapping = wrap_plain(model, config, bidirectional=not is_causal)
    got = model(idx, padding)
    assert got.shape == want.shape
    error = relative_error(got[~padding], want[~padding])
    assert error < TOLERANCE if config is EXACT else error > 1e-3
    why = "padding" if is_causal else "bidirectional, padding"
    assert summary(wrapping) == [(True, why, 1, 0, 200)] * 2


def test_multihead_attention_and_its_weights():
    model, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 90, 32)
    want = model(x, x, x, need_weights=False)[0]
    wrapping = wrap_plain(model, EXACT, bidirectional=True)
    assert relative_error(model(x, x, x, need_weights=False)[0], want) < TOLERANCE
    assert summary(wrapping) == [(True, "bidirectional", 1, 0, 90)]
    model(x, x, x)
    assert summary(wrapping) == [(True, "bidirectional; once: need_weights=True", 1, 1, 90)]


def test_multihead_attention_with_weights_alone_raises():
    model, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 90, 32)
    wrap_plain(model, EXACT)
    with pytest.raises(RuntimeError, match="call 0: need_weights=True"):
        model(x, x, x)


# Which calls qualify


@pytest.mark.parametrize("numbers", ["bool", "float", "lowest"])
@pytest.mark.parametrize(
    "shape", [(100, 100), (1, 1, 100, 100), (2, 1, 100, 100), (2, 4, 100, 100)]
)
def test_masks_that_are_causal(shape, numbers):
    q, k, v = tensors()
    mask = causal(100).expand(shape).clone()
    if numbers != "bool":
        mask = as_float(mask, -torch.inf if numbers == "float" else torch.finfo(torch.float32).min)
    out, row = attend(q, k, v, mask)
    assert relative_error(out, F.scaled_dot_product_attention(q, k, v, mask)) < TOLERANCE
    assert (row.why, row.replaced) == ("causal mask", 1)


@pytest.mark.parametrize("empty_rows", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_masks_with_padding(left, empty_rows):
    q, k, v = tensors()
    padding = padded([100, 61], 100, left)
    mask = causal(100) & ~padding[:, None, None]
    if empty_rows:
        mask = mask & ~padding[:, None, :, None]
    want = F.scaled_dot_product_attention(q, k, v, mask)
    for form in (mask, as_float(mask)):
        out, row = attend(q, k, v, form)
        real = ~padding[:, None, :, None].expand_as(want)
        assert relative_error(out[real], want[real]) < TOLERANCE
        assert not out[~real].any()
        assert row.why == "padding"


def test_a_static_cache_with_padding():
    q, k, v = tensors(keys=160)
    padding = padded([100, 61], 100, left=True)
    mask = F.pad(causal(100) & ~padding[:, None, None], (0, 60))
    out, row = attend(q, k, v, mask)
    want = F.scaled_dot_product_attention(q, k, v, mask)
    real = ~padding[:, None, :, None].expand_as(want)
    assert relative_error(out[real], want[real]) < TOLERANCE
    assert (row.why, row.tokens) == ("padding", 100)


def test_other_arguments():
    q, k, v = tensors(kv_heads=2)
    arguments = {"is_causal": True, "scale": 0.7, "enable_gqa": True}
    out, _ = attend(q, k, v, **arguments)
    assert relative_error(out, F.scaled_dot_product_attention(q, k, v, **arguments)) < TOLERANCE
    flat = [x.flatten(0, 1) for x in tensors()]
    for arguments in ({"is_causal": True}, {"attn_mask": causal(100).expand(8, -1, -1)}):
        out, row = attend(*flat, **arguments)
        want = F.scaled_dot_product_attention(*flat, **arguments)
        assert row.replaced and relative_error(out, want) < TOLERANCE


def test_autocast():
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, row = attend(q, k, v.bfloat16(), is_causal=True)
        want = F.scaled_dot_product_attention(q, k, v.bfloat16(), is_causal=True)
    assert out.dtype == want.dtype == torch.bfloat16
    assert row.replaced and relative_error(out, want) < 2e-2


def other_calls():
    q, k, v = tensors()
    long = tensors(keys=160)
    window = causal(100).triu(-30)
    hole = causal(100).clone()
    hole[:, 40] = False
    per_head = causal(100).expand(1, 4, -1, -1).clone()
    per_head[0, 2] = window
    chunk = torch.ones(100, 160, dtype=torch.bool).tril(60)
    yield "mask is not causal", (q, k, v, window), {}
    yield "mask is not causal", (q, k, v, causal(100).tril(-1)), {}
    yield "padding inside a row", (q, k, v, hole), {}
    yield "mask differs between heads", (q, k, v, per_head), {}
    yield "mask with values other than 0 and -inf", (q, k, v, torch.randn(100, 100)), {}
    yield "mask is learned", (q, k, v, as_float(causal(100)).requires_grad_()), {}
    yield "mask admits keys beyond the queries", (*long, chunk), {}
    yield "fewer queries than keys", long, {}
    yield "more queries than keys", tensors(keys=60), {}
    yield "dropout", (q, k, v), {"dropout_p": 0.1, "is_causal": True}
    yield "dtype float64", [x.double() for x in (q, k, v)], {"is_causal": True}
    yield "not causal, and bidirectional=False", (q, k, v), {}
    every = torch.ones(2, 1, 1, 100, dtype=torch.bool)
    yield "not causal, and bidirectional=False", (q, k, v, every), {}
    yield "not (B, H, L, D)", [x[None] for x in (q, k, v)], {"is_causal": True}
    yield "shapes that broadcast", (q, k[:1], v[:1]), {"is_causal": True}


@pytest.mark.parametrize("why,args,kwargs", list(other_calls()))
def test_calls_passed_on(why, args, kwargs):
    """Alone they raise; after one that was replaced they come through as they were."""
    model = Attend()
    wrapping = wrap_plain(model, LOSSY)
    with pytest.raises(RuntimeError) as error:
        model(*args, **kwargs)
    assert f"call 0: {why})" in str(error.value)
    model(*tensors(), is_causal=True)
    torch.manual_seed(1)
    got = model(*args, **kwargs)
    unwrap_plain(model, wrapping)
    torch.manual_seed(1)
    assert torch.equal(got, model(*args, **kwargs))
    assert summary(wrapping) == [(True, f"causal; once: {why}", 1, 2, 100)]


def test_bidirectional_needs_the_prompt_scope():
    with pytest.raises(RuntimeError, match="not causal, and scope='causal'"):
        attend(*tensors(), config=small(scope="causal"), bidirectional=True)


def test_a_mask_changed_in_place_is_read_again():
    class Twice(nn.Module):
        def forward(self, q, k, v, mask):
            F.scaled_dot_product_attention(q, k, v, mask)
            F.scaled_dot_product_attention(q, k, v, mask)
            mask[:, 50] = False
            return F.scaled_dot_product_attention(q, k, v, mask)

    model = Twice()
    wrapping = wrap_plain(model, EXACT)
    model(*tensors(), causal(100))
    assert [row.why for row in wrapping.rows] == ["causal mask"] * 2 + ["padding inside a row"]


def test_short_sequences_and_layers_left_dense():
    model, idx = NanoGPT().eval(), text()
    want = model(idx)
    short = small(dense_below=300)
    wrapping = wrap_plain(model, LOSSY, lambda i: short if i else None)
    assert relative_error(model(idx), want) < TOLERANCE
    assert summary(wrapping) == [
        (False, "left dense by `layers`", 0, 1, 0),
        (True, "causal", 1, 0, 200),
    ]
    assert (wrapping.rows[1].slots, wrapping.rows[1].dense_below) == (200, 300)
    said = str(Report(wrapping.rows))
    assert "dense below" in said and "too short to gain, so dense" in said


# What is left behind


def test_unwrap_restores():
    for model, arguments in ((NanoGPT(), (text(),)), (Encoder(), (text(),))):
        model.eval()
        want, attributes = model(*arguments), set(vars(model))
        signature = inspect.signature(model.forward)
        wrapping = wrap_plain(model, LOSSY)
        assert inspect.signature(model.forward) == signature
        assert not torch.equal(model(*arguments), want)
        unwrap_plain(model, wrapping)
        assert set(vars(model)) == attributes
        assert torch.equal(model(*arguments), want)
        with pytest.raises(ValueError, match="carries this wrapping"):
            unwrap_plain(model, wrapping)


def test_unwrap_restores_an_instances_forward():
    model = Attend()
    own = model.forward = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    wrapping = wrap_plain(model, LOSSY)
    model(*tensors())
    unwrap_plain(model, wrapping)
    assert model.forward is own


def test_wrapping_twice_raises():
    model = NanoGPT()
    wrap_plain(model.h[1], LOSSY)
    with pytest.raises(ValueError, match=r"its part 'h\.1' is wrapped already"):
        wrap_plain(model, LOSSY)
    with pytest.raises(ValueError, match="it is wrapped already"):
        wrap_plain(model.h[1], LOSSY)


def test_a_wrapped_part_of_a_wrapped_model_raises():
    model = NanoGPT().eval()
    wrap_plain(model, LOSSY)
    wrap_plain(model.h[1], LOSSY)
    with pytest.raises(RuntimeError, match="inside the forward of a wrapped model"):
        model(text())
    assert not _get_current_function_mode_stack()


def test_wrong_arguments():
    for arguments, name in (
        ((lambda x: x, LOSSY), "model"),
        ((NanoGPT(), "lossy"), "config"),
        ((NanoGPT(), LOSSY, 3), "layers"),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            wrap_plain(*arguments)
    model = NanoGPT().eval()
    wrap_plain(model, LOSSY, lambda i: "lossy")
    with pytest.raises(TypeError, match="layers: expected a DGAConfig or None for call 0, got str"):
        model(text())


def test_other_models_are_untouched():
    """After the wrapped one, and in another thread while it runs."""
    wrapped, other, idx = NanoGPT().eval(), NanoGPT().eval(), text()
    want = other(idx)
    sdpa = F.scaled_dot_product_attention
    wrapping = wrap_plain(wrapped, LOSSY)
    wrapped(idx)
    assert torch.equal(other(idx), want)

    seen = []

    def hook(*_):
        assert F.scaled_dot_product_attention is sdpa
        with ThreadPoolExecutor(1) as pool, torch.no_grad():
            seen.append(pool.submit(torch.no_grad()(other), idx).result())

    wrapped.h[0].register_forward_hook(hook)
    wrapped(idx)
    assert torch.equal(seen[0], want)
    assert [row.replaced for row in wrapping.rows] == [2, 2]


def test_a_copy_runs_its_own_weights():
    model, idx = NanoGPT().eval(), text()
    wrapping = wrap_plain(model, EXACT)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    assert relative_error(other(idx), model(idx)) > 1e-2
    model(idx)
    assert [row.replaced for row in wrapping.rows] == [2, 2]
    assert [row.replaced for row in other.forward.rows] == [1, 1]
    unwrap_plain(other, other.forward)
    assert "forward" not in vars(other)
    assert "forward" in vars(model)


def test_exceptions_leave_no_mode():
    model = NanoGPT().eval()
    wrap_plain(model, LOSSY)
    with pytest.raises(IndexError):
        model(text() + VOCABULARY)
    assert not _get_current_function_mode_stack()
    model(text())


def test_models_without_sdpa_raise():
    model = nn.Linear(4, 4)
    wrap_plain(model, LOSSY)
    with pytest.raises(RuntimeError, match="made no call of F"):
        model(torch.randn(2, 4))


# Inside torch.compile


@pytest.fixture
def compiling():
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    torch.compiler.set_stance("force_eager")


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_in_one_graph(compiling, dynamic):
    model = NanoGPT().eval()
    idx = text(1, 200)
    want = model(idx)
    wrapping = wrap_plain(model, EXACT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for _ in range(3):
        assert relative_error(compiled(idx), want) < TOLERANCE
    assert compiling["unique_graphs"] == 1
    assert summary(wrapping) == [(True, "causal, compiled", 1, 0, 0)] * 2
    unwrap_plain(model, wrapping)
    assert torch.equal(model(idx), want)


def test_compiled_before_it_was_wrapped(compiling):
    model, idx = NanoGPT().eval(), text(1, 200)
    want = model(idx)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wrapping = wrap_plain(compiled, EXACT)
    for _ in range(3):
        assert relative_error(compiled(idx), want) < TOLERANCE
    assert compiling["unique_graphs"] == 1
    assert summary(wrapping) == [(True, "causal, compiled", 1, 0, 0)] * 2
    unwrap_plain(compiled, wrapping)
    assert torch.equal(compiled(idx), want)


def test_compiled_transformer_layer(compiling):
    """Its fused form is switched off by modes, but not where a compiler traces."""
    model = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True).eval()
    x, arguments = torch.randn(1, 200, 32), {"is_causal": True}
    arguments["src_mask"] = nn.Transformer.generate_square_subsequent_mask(200)
    want = model(x, **arguments)
    wrapping = wrap_plain(model, EXACT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="set_fastpath_enabled"):
        compiled(x, **arguments)
    with no_fused_layer():
        assert relative_error(compiled(x, **arguments), want) < TOLERANCE
    assert summary(wrapping) == [(True, "causal, compiled", 1, 0, 0)]


def test_compiled_parts_of_a_wrapped_model(compiling):
    model, idx = NanoGPT().eval(), text(1, 200)
    want = model(idx)
    for block in model.h:
        block.compile(backend="aot_eager")
    wrapping = wrap_plain(model, EXACT)
    for _ in range(2):
        assert relative_error(model(idx), want) < TOLERANCE
    assert [row.why for row in wrapping.rows] == ["causal, compiled"] * 2


def test_masks_are_not_read_while_compiling(compiling):
    model = Attend()
    wrap_plain(model, EXACT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="a mask cannot be compared in torch"):
        compiled(*tensors(), causal(100))
