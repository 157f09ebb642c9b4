"""Exported decoding is `DGACache`'s: step by step uncompiled, and as a package without flexdga."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TOLERANCE, by_landmarks, qkv, relative_error, small
from plain_models import VOCABULARY, NanoGPT
from torch import nn
from torch._inductor.package.package import package_aoti

import flexdga
from flexdga import DGAConfig
from flexdga.compiling import all_compiled
from flexdga.decode import LayerCache
from flexdga.static_cache import remember, step
from flexdga.static_layout import Layout

CAPACITY = 640
OPENS = {"dense_below": 0, "open_mass": 0.02}
CONFIGS = {
    "window": DGAConfig.streaming_llm(window=32, scope="causal"),
    "groups": small(scope="causal"),
    "openings": DGAConfig(**OPENS),
    "landmarks": by_landmarks(open_mass=0.02),
    "openings-of-groups": DGAConfig(scope="causal", rest="group", focal_ratio=0.1, **OPENS),
    "exact-int8": DGAConfig(open_by="exact", keep_raw="int8", **OPENS),
    "three-units": DGAConfig(scope="causal", open_units=3, open_mass=0.0, dense_below=0),
    "mass": small(scope="causal", group_bias="mass", group_weights="importance", sinks=3),
    "many-due-at-once": small(scope="causal", block_size=(128, 16), focal_ratio=0.2),
    "paper": DGAConfig.paper(scope="causal", unit_size=18, block_size=(16, 16)),
    "dense": DGAConfig.dense(),
}
EXAMPLES = Path(__file__).parent.parent / "examples"


def llama(config: DGAConfig, layers: int = 2) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    return flexdga.wrap(transformers.LlamaForCausalLM(sizes).eval(), config)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape)


def generated(model: nn.Module, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """By the model's own `generate`, over a DGACache."""
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [3, 150])
def test_each_step_is_that_of_a_layer_cache(name, length, eager):
    config = CONFIGS[name]
    capacity = 1152 if name in ("paper", "many-due-at-once") else CAPACITY
    layout, cache, scale = Layout(config, capacity), LayerCache(config), 32**-0.5
    inputs = qkv(2, 4, 2, length + 120)
    steps = max(-(-length // layout.step), 2) * layout.step

    with torch.no_grad():
        prompt = [x[:, :, :length] for x in inputs]
        got, state = remember(*prompt, steps, layout, scale)
        assert list(state) == layout.names
        assert relative_error(got, cache.attend(*prompt)) < TOLERANCE[torch.float32]
        before = {name: x.data_ptr() for name, x in state.items()}
        for time in range(length, length + 120):
            new = [x[:, :, time : time + 1] for x in inputs]
            got = step(*new, state, torch.tensor(time), layout, scale)
            assert relative_error(got, cache.attend(*new)) < TOLERANCE[torch.float32], time
    assert before == {name: x.data_ptr() for name, x in state.items()}


@pytest.mark.parametrize("name", ["window", "openings", "dense"])
def test_prompt_and_step_generate_the_models_tokens(name, eager):
    model = llama(CONFIGS[name])
    from flexdga.entry_points import Prompt, Step

    prompt = tokens(2, 100)
    with torch.no_grad():
        want = generated(model, prompt, 60)
        decode = Step(model, CAPACITY)
        logits, length, *state = Prompt(model, CAPACITY)(prompt)
        out = [prompt]
        for _ in range(60):
            out.append(logits.argmax(-1))
            logits = decode(out[-1], length, *state)
    assert torch.equal(torch.cat(out, 1), want)
    assert length == 160


@pytest.mark.parametrize(
    ("name", "dynamic"), [("window", False), ("dense", True), ("openings", True)]
)
def test_the_exported_programs_generate_the_models_tokens_uncompiled(name, dynamic, eager):
    from flexdga.packaging import _dynamic, _generation

    model, prompt, shapes = llama(CONFIGS[name], layers=1), tokens(2, 90), None
    with torch.no_grad():
        if dynamic:
            (prompt,), _, shapes = _dynamic((prompt,), {}, CAPACITY)
        programs = dict(_generation(model, prompt, shapes, CAPACITY))
        prefill, decode = (programs[name].module() for name in ("prefill", "decode"))
        prompt = tokens(3, 133) if dynamic else prompt
        logits, *state = prefill(prompt)
        out = [prompt]
        for _ in range(40):
            out.append(logits.argmax(-1))
            logits = decode(out[-1], *state)
        assert torch.equal(torch.cat(out, 1), generated(model, prompt, 40))


def test_what_cannot_be_decoded_so_is_refused_before_work_is_lost(tmp_path):
    plain, target = flexdga.wrap(NanoGPT().eval(), CONFIGS["window"]), tmp_path / "model.pt2"
    with pytest.raises(TypeError, match="a transformers model"):
        flexdga.export(plain, tokens(2, 50), target, decode=CAPACITY)
    model = llama(CONFIGS["window"])
    for error, match, changes in (
        (ValueError, "token ids", {"example_inputs": torch.randn(2, 50)}),
        (ValueError, "token ids", {"example_inputs": {"input_ids": tokens(2, 50)}}),
        (ValueError, "room for the example's 50", {"decode": 32}),
        (ValueError, "whole steps of 32", {"decode": 1000}),
        (TypeError, "number of tokens", {"decode": 640.0}),
        (ValueError, "processes: expected 1, 2", {"processes": 3}),
    ):
        arguments = {"example_inputs": tokens(2, 50), "decode": CAPACITY} | changes
        with pytest.raises(error, match=match):
            flexdga.export(model, path=target, **arguments)
    for match, config in (
        ("scope='causal'", DGAConfig.paper()),
        ("scope='causal'", DGAConfig.h2o()),
        ("one device", DGAConfig(keep_raw="cpu")),
        ("32\\) sinks", small(scope="causal", unit_size=32, block_size=(64, 64), sinks=40)),
    ):
        with pytest.raises(NotImplementedError, match=match):
            flexdga.export(llama(config), tokens(2, 50), target, decode=4096)
    assert not target.exists()


GENERATE = """
import sys, torch
from torch._inductor.package import load_package
prefill, decode = (load_package('model.pt2', name) for name in ('prefill', 'decode'))
outputs = []
for prompt in torch.load('prompts.pt'):
    logits, *state = prefill(prompt)
    out = [prompt]
    for _ in range(80):
        out.append(logits.argmax(-1))
        logits = decode(out[-1], *state)
    outputs.append(torch.cat(out, 1))
torch.save(outputs, 'generated.pt')
assert not {'flexdga', 'transformers', 'score_mods'} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A model with one layer that keeps a window and sinks, and its package, of two processes."""
    torch.manual_seed(0)
    model = llama(CONFIGS["window"], layers=1)
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    return model, flexdga.export(model, tokens(1, 100), path, decode=CAPACITY, processes=2)


def check_package(model: nn.Module, path: Path) -> None:
    prompts = [tokens(1, 77), tokens(3, 200)]
    torch.save(prompts, path.parent / "prompts.pt")
    run = subprocess.run(
        [sys.executable, "-c", GENERATE], cwd=path.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for prompt, got in zip(prompts, torch.load(path.parent / "generated.pt")):
        assert torch.equal(got, generated(model, prompt, 80))


@pytest.mark.slow
def test_a_package_generates_the_models_tokens_with_torch_alone(package, eager):
    check_package(*package)


@pytest.mark.slow
def test_what_another_process_does_not_know_is_compiled_in_this_one(tmp_path, caplog):
    class Mine(nn.Module):
        def forward(self, x):
            return torch.ops.test_export_decode.twice(x) + 1

    with torch.library._scoped_library("test_export_decode", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        program = torch.export.export(Mine(), (torch.randn(3),))
        files = all_compiled(iter([("mine", program)]), None, processes=2)
        assert "another process" in caplog.text and "test_export_decode" in caplog.text
        path = package_aoti(str(tmp_path / "model.pt2"), files)
        assert torch.equal(flexdga.load(path, "mine")(torch.ones(3)), torch.full((3,), 3.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openings", "landmarks", "groups"])
def test_a_package_of_other_configs_generates_the_models_tokens(name, tmp_path):
    model = llama(CONFIGS[name], layers=1)
    path = flexdga.export(model, tokens(1, 100), tmp_path / "model.pt2", decode=CAPACITY)
    torch.compiler.set_stance("force_eager")
    try:
        check_package(model, path)
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.slow
def test_a_step_beyond_the_capacity_is_refused(package):
    _, path = package
    logits, length, *state = flexdga.load(path, "prefill")(tokens(1, CAPACITY))
    with pytest.raises(RuntimeError):
        flexdga.load(path, "decode")(logits.argmax(-1), length, *state)
    with pytest.raises(ValueError, match=r"\['decode', 'prefill'\]"):
        flexdga.load(path)


def built(folder: Path, source: Path) -> Path:
    """A C++ program by the example's CMakeLists, whose source it takes the place of."""
    shutil.copy(EXAMPLES / "cpp" / "CMakeLists.txt", folder)
    shutil.copy(source, folder / "generate.cpp")
    where = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", str(folder), "-B", str(folder), where],
        ["cmake", "--build", str(folder)],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return folder / "generate"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_program_in_cpp_generates_the_models_tokens(package, tmp_path, eager):
    model, path = package
    program = built(tmp_path, EXAMPLES / "cpp" / "generate.cpp")
    prompt = tokens(1, 123)
    words = [str(token) for token in prompt[0].tolist()]
    run = subprocess.run([program, path, "50", *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [int(word) for word in run.stdout.split()] == generated(model, prompt, 50)[0].tolist()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_package_refuses_in_cpp_what_it_would_read_wrongly(package, tmp_path):
    program = built(tmp_path, Path(__file__).parent / "refused_inputs.cpp")
    run = subprocess.run([program, package[1]], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["refused", "refused", "1 taken"], run.stderr
    for reason in ("input 0: expected another dtype", "input 0: expected a contiguous tensor"):
        assert reason in run.stderr
