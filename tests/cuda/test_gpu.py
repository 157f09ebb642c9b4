"""flexdga's compiled kernels on a GPU, against the oracle; skipped where there is none.

The inputs alone are placed there: what the library makes for itself must follow them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import TOLERANCE, by_landmarks, qkv, relative_error, small
from test_backward import gradients, oracle
from torch import Tensor
from torch._dynamo.utils import counters

import flexdga
import score_mods
from flexdga import (
    DGAConfig,
    DGAttention,
    applied,
    attention,
    dga_attention,
    make_plan,
    reference,
    saying,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CONFIGS = {
    "default": by_landmarks(),
    "groups": DGAConfig(dense_below=0, open_units=0, rest="group", group_bias="mass"),
    "small": small(),
    "causal": small(scope="causal", group_weights="importance"),
    "published": DGAConfig.paper(dense_below=0),
    "window": DGAConfig.streaming_llm(window=256, dense_below=0),
    "blocks": DGAConfig.block_selection(dense_below=0),
    "dense": DGAConfig.dense(),
}
LENGTHS = (1000, 3001)
KINDS = [(torch.float32, (6, 2)), (torch.float16, (4, 4)), (torch.bfloat16, (6, 2))]
"""Each pair is half a minute of compiling: with every config they would be an hour."""


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [t.cuda() for t in tensors]


def wanted(inputs, config, plan, **arguments):
    return reference.attend(
        *inputs, plan, group_weights=config.group_weights, group_bias=config.group_bias, **arguments
    )


@pytest.mark.parametrize(("dtype", "heads"), KINDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_forward(name, dtype, heads):
    config = CONFIGS[name]
    for length in LENGTHS:
        inputs = on_gpu(*qkv(2, *heads, length, 64, dtype))
        out, plan = dga_attention(*inputs, config=config, return_plan=True)
        assert out.device == inputs[0].device and out.dtype == dtype
        assert relative_error(out, wanted(inputs, config, plan)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["default", "small"])
@pytest.mark.parametrize("head_dim", [80, 128, 256])
@torch.no_grad()
def test_head_dims(name, head_dim):
    config = CONFIGS[name]
    inputs = on_gpu(*qkv(1, 4, 2, 1500, head_dim, torch.bfloat16))
    out, plan = dga_attention(*inputs, config=config, return_plan=True)
    assert relative_error(out, wanted(inputs, config, plan)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", ["default", "groups"])
@torch.no_grad()
def test_padding_and_documents(name):
    config, inputs = CONFIGS[name], on_gpu(*qkv(2, 4, 2, 1000, 64, torch.float16))
    packed = torch.arange(1000).div(300, rounding_mode="floor").expand(2, -1)
    left = torch.where(torch.arange(1000) < torch.tensor([[0], [400]]), -1, 0)
    for layout in (
        {"lengths": torch.tensor([1000, 300])}, {"document_ids": packed}, {"document_ids": left},
    ):  # fmt: skip
        layout = {k: v.cuda() for k, v in layout.items()}
        out, plan = dga_attention(*inputs, config=config, return_plan=True, **layout)
        assert relative_error(out, wanted(inputs, config, plan)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(("dtype", "heads"), KINDS, ids=str)
@pytest.mark.parametrize("name", ["default", "groups", "causal"])
def test_backward(name, dtype, heads, monkeypatch):
    monkeypatch.setattr(saying, "_said", {attention.LEAK})
    config = CONFIGS[name]
    inputs = on_gpu(*qkv(1, *heads, LENGTHS[0], 64, dtype))
    with torch.no_grad():
        plan = make_plan(*inputs, config=config)
    direction = torch.randn(inputs[0].shape).cuda()
    out, got = gradients(lambda *x: dga_attention(*x, config=config), inputs, direction)
    want_out, want = gradients(oracle(plan, config), inputs, direction)
    assert relative_error(out, want_out) < TOLERANCE[dtype]
    for g, w in zip(got, want):
        assert relative_error(g, w) < TOLERANCE[dtype]


def test_gradients_of_a_score_mod():
    config, inputs = CONFIGS["groups"], on_gpu(*qkv(1, 4, 2, 700, 64, torch.float16))
    with torch.no_grad():
        plan = make_plan(*inputs, config=config)
    start, found = torch.rand(4).cuda(), []
    for call in (
        lambda mod: dga_attention(*inputs, config=config, score_mod=mod),
        lambda mod: wanted(inputs, config, plan, score_mod=mod),
    ):
        slopes = start.clone().requires_grad_()
        call(score_mods.alibi(slopes)).double().square().sum().backward()
        found.append(slopes.grad)
    assert relative_error(*found) < 0.01


@torch.no_grad()
def test_a_call_does_not_wait_for_the_gpu():
    """Nothing that is computed there decides what is launched next."""
    inputs = on_gpu(*qkv(1, 4, 2, 1000, 64, torch.bfloat16))
    for config in (CONFIGS["default"], CONFIGS["groups"]):
        dga_attention(*inputs, config=config)
        torch.cuda.set_sync_debug_mode("error")
        try:
            dga_attention(*inputs, config=config)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_a_new_length_compiles_nothing():
    config = CONFIGS["default"]
    for length in (1000, 2000):
        dga_attention(*on_gpu(*qkv(1, 4, 4, length, 64, torch.bfloat16)), config=config)
    counters.clear()
    for length in (1537, 4000, 8191):
        dga_attention(*on_gpu(*qkv(1, 4, 4, length, 64, torch.bfloat16)), config=config)
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@torch.no_grad()
def test_compiled_by_the_caller(mode):
    layer = DGAttention(256, 4, num_kv_heads=2, config=CONFIGS["groups"]).cuda().eval()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for length in (1000, 1000, 1000, 1300):
        x = torch.randn(1, length, 256).cuda()
        assert relative_error(compiled(x), layer(x)) < 1e-4


@pytest.mark.parametrize("keep_raw", ["full", "cpu", "int8"])
@torch.no_grad()
def test_generation(keep_raw):
    transformers = pytest.importorskip("transformers")
    sizes = transformers.LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    here = transformers.LlamaForCausalLM(sizes).eval()
    there = copy.deepcopy(here).cuda()
    ids = torch.randint(1, 97, (2, 300))
    settings = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    settings |= {"output_logits": True}
    config = small(keep_raw=keep_raw, open_units=2, unit_size=32)
    found = []
    for model, tokens in ((here, ids), (there, ids.cuda())):
        with applied(model, config), torch.compiler.set_stance("force_eager"):
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        found.append((out.sequences.cpu(), torch.stack(out.logits).cpu()))
    (want, want_logits), (got, got_logits) = found
    assert torch.equal(got, want)
    assert relative_error(got_logits, want_logits) < 1e-3


@pytest.mark.parametrize("name", ["groups", "window"])
@torch.no_grad()
def test_a_package(name, tmp_path):
    layer = DGAttention(256, 4, num_kv_heads=2, config=CONFIGS[name]).cuda().eval()
    path = flexdga.export(layer, torch.randn(2, 500, 256).cuda(), tmp_path / "layer.pt2")
    loaded = flexdga.load(path)
    for batch, length in ((1, 700), (3, 1111)):
        x = torch.randn(batch, length, 256).cuda()
        for _ in range(2):
            assert relative_error(loaded(x), layer(x)) < 1e-4
