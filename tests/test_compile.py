"""One graph, and compiled once: torch's own counters say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import TOLERANCE, qkv, relative_error, small
from plain_models import NanoGPT
from test_export_decode import CAPACITY, CONFIGS, generated, llama, tokens
from test_planner import layout_arguments
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.utils import counters

import flexdga
from flexdga import DGAConfig, dga_attention, make_plan, reference


@pytest.fixture(autouse=True)
def _count_afresh():
    counters.clear()
    with torch.no_grad():
        yield


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("causal", [3, 3, 3, 3, 3, 3, 3]),
        pytest.param("prompt", [3, 3, 3, 3, 4, 4, 4], marks=pytest.mark.slow),
    ],
)
def test_lengths_texts_and_layouts_share_one_compilation(scope, expected):
    """All is compiled once; a prompt's plan once more for packed documents."""
    torch._dynamo.reset()  # other tests compile the same variants
    config = small(scope=scope, block_size=(32, 32), open_units=None, open_mass=0.02)
    seen = []
    for length, layout in (
        (200, "plain"), (1031, "plain"), (97, "lengths"), (4500, "plain"),
        (200, "packed"), (1031, "left"), (97, "packed"),
    ):  # fmt: skip
        inputs = qkv(2, 6, 2, length)
        arguments, _ = layout_arguments(layout, 2, length)
        out, plan = dga_attention(*inputs, config=config, return_plan=True, **arguments)
        if length < 1000:
            want = reference.attend(*inputs, plan)
            assert relative_error(out, want) < TOLERANCE[torch.float32]
            with torch.compiler.set_stance("force_eager"):
                eager = make_plan(*inputs, config=config, **arguments)
            assert torch.equal(plan.start, eager.start)
            assert torch.equal(plan.end, eager.end)
            assert (plan.open != eager.open).float().mean() < 1e-3  # a share may fall on the edge
        seen.append(graphs())
    dga_attention(*qkv(1, 9, 3, 300), config=config)  # another batch, other heads: 3 for 1 again
    assert [*seen, graphs()] == [*expected, expected[-1]]


def test_compiled_plans_are_those_of_plain_torch():
    inputs = qkv(1, 8, 8, 1500, 64)
    plan = make_plan(*inputs)
    with torch.compiler.set_stance("force_eager"):
        eager = make_plan(*inputs)
    for name in ("start", "end", "position", "focal", "members"):
        assert torch.equal(getattr(plan, name), getattr(eager, name))


def layer(query, key, value, config=small(block_size=(32, 32))):  # noqa: B008
    return dga_attention(query * 2, key, value, config=config).transpose(1, 2).flatten(2)


def test_a_users_compile_captures_one_graph():
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    inputs = qkv(1, 4, 2, 150)
    got = compiled(*inputs)
    assert graphs() == 1
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(got, layer(*inputs)) < TOLERANCE[torch.float32]


def test_a_users_compile_takes_the_scale_for_a_symbol():
    """As it does with what a model computes from its sizes."""
    config = small()

    def call(query, key, value, scale):
        return dga_attention(query, key, value, config=config, scale=scale)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    inputs = qkv(1, 4, 2, 150)
    for scale in (0.2, 0.3):
        got = compiled(*inputs, scale)
        with torch.compiler.set_stance("force_eager"):
            assert relative_error(got, call(*inputs, scale)) < TOLERANCE[torch.float32]


@pytest.mark.slow
def test_a_users_compile_serves_every_length():
    """In one graph, whether lengths fill whole steps of the plan or not."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (150, 333, 160, 1024, 777):
        inputs = qkv(1, 4, 2, length)
        got = compiled(*inputs)
        with torch.compiler.set_stance("force_eager"):
            assert relative_error(got, layer(*inputs)) < TOLERANCE[torch.float32]
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_the_modes_of_torch_compile(mode):
    """On CPU torch has no graphs to replay, and its products alone are tuned; numbers hold."""
    config = DGAConfig.streaming_llm(window=32, dense_below=0)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, mode=mode)
    for length in (150, 333):
        inputs = qkv(1, 4, 2, length)
        got = compiled(*inputs, config)
        with torch.compiler.set_stance("force_eager"):
            assert relative_error(got, layer(*inputs, config)) < TOLERANCE[torch.float32]
    assert graphs() == 1


OWN_AND_A_USERS = """
import json, torch
from torch._dynamo.utils import counters
from flexdga import DGAConfig, dga_attention
config = DGAConfig.streaming_llm(window=32, dense_below=0)
query, key, value = (torch.randn(2, heads, 200, 32) for heads in (4, 2, 2))
call = lambda query: dga_attention(query, key, value, config=config)
with torch.no_grad():
    call(query)
    torch.compile(lambda query: call(query * 2) + 1, fullgraph=True, dynamic=True)(query)
print(json.dumps([counters["inductor"], counters["aot_autograd"]]))
"""


@pytest.mark.slow
def test_another_process_finds_what_was_compiled_on_disk(tmp_path):
    """In Inductor's cache and in AOTAutograd's."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    seen = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", OWN_AND_A_USERS], capture_output=True, text=True, env=environment
        )
        assert run.returncode == 0, run.stderr
        seen.append(json.loads(run.stdout.splitlines()[-1]))
    (first, first_aot), (again, again_aot) = seen
    assert "fxgraph_cache_hit" not in first and "autograd_cache_hit" not in first_aot
    assert again["fxgraph_cache_hit"] == first["fxgraph_cache_miss"] >= 2
    assert again_aot["autograd_cache_hit"] == first_aot["autograd_cache_saved"] >= 2
    assert "fxgraph_cache_miss" not in again


def of_any_batch(*tensors):
    """Tells compilers not to look at the batch: of one row they would make another graph."""
    for tensor in tensors:
        if tensor.dim():
            mark_unbacked(tensor, 0, hint_override=2, shape_id="batch", min=1)
    return tensors


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("openings", "eager"),
        pytest.param("groups", "eager", marks=pytest.mark.slow),
        pytest.param("window", "inductor", marks=pytest.mark.slow),
        pytest.param("openings", "inductor", marks=pytest.mark.slow),
    ],
)
def test_prompt_and_step_are_two_graphs_for_all_lengths_and_batches(name, backend):
    """Over tensors of fixed size, generation too."""
    from flexdga.entry_points import Prompt, Step

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = llama(CONFIGS[name], layers=2)  # of one, Dynamo forgets nothing
    prompt, step = (
        torch.compile(entry(model, CAPACITY), fullgraph=True, dynamic=True, backend=backend)
        for entry in (Prompt, Step)
    )
    seen = []
    for batch, length in ((3, 200), (2, 133), (4, 301), (1, 77), (1, 250)):
        first = tokens(batch, length)
        logits, *state = prompt(*of_any_batch(first))
        out = [first]
        for _ in range(40):
            out.append(logits.argmax(-1))
            logits = step(*of_any_batch(out[-1], *state))
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(torch.cat(out, 1), generated(model, first, 40))
        seen.append(graphs())
    assert seen == [2, 2, 2, 2, 2], seen


@pytest.mark.parametrize("marked", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["transformers", pytest.param("plain", marks=pytest.mark.slow)])
def test_a_wrapped_model_is_compiled_twice_at_most(kind, marked):
    """Whatever the lengths, the padding and the rows; once if the batch is marked."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = CONFIGS["openings"]
    model = llama(config) if kind == "transformers" else flexdga.wrap(NanoGPT().eval(), config)

    def call(function, tokens, mask):
        if kind == "plain":
            return function(tokens)
        return function(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    seen = []
    for batch, length, padded in (
        (3, 200, slice(0)), (2, 133, slice(50)), (1, 77, slice(0)), (4, 300, slice(200, None)),
        (1, 250, slice(90)), (2, 160, slice(0)),
    ):  # fmt: skip
        inputs = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
        inputs[1][0, padded] = 0
        got = call(compiled, *(of_any_batch(*(x.clone() for x in inputs)) if marked else inputs))
        with torch.compiler.set_stance("force_eager"):
            real = inputs[1].bool() if kind == "transformers" else ...
            want = call(model, *inputs)
            assert relative_error(got[real], want[real]) < TOLERANCE[torch.float32]
        seen.append(graphs())
    assert seen == ([1] * 6 if marked else [1, 1, 2, 2, 2, 2])


def test_no_create_block_mask_on_the_way(monkeypatch):
    from torch.nn.attention import flex_attention

    def refuse(*args, **kwargs):
        raise AssertionError("create_block_mask forms Q×KV booleans")

    monkeypatch.setattr(flex_attention, "create_block_mask", refuse)
    with torch.compiler.set_stance("force_eager"):
        dga_attention(*qkv(length=150), config=small())
