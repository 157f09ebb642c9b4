"""An exported model gives the numbers of the model, at lengths and batches it was not exported at.

Programs are run uncompiled where compiling is not the point: what `lower` traced is then checked
operator by operator, in seconds.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL, TOLERANCE, qkv, relative_error, small
from plain_models import VOCABULARY, NanoGPT
from torch import nn
from torch.export import Dim

import flexdga
from flexdga import DGAConfig, DGAttention, dga_attention, make_plan, reference
from flexdga.spelling import read, spell

OPERATOR = torch.ops.flexdga.attention.default
BATCH, LENGTH = Dim("batch", min=1), Dim("length", min=2)
UNSEEN = [(1, 77), (3, 200)]
"""Batch and length of calls; exports are of batch 2 and length 150 or 100."""
FLOAT32 = TOLERANCE[torch.float32]


class Attention(nn.Module):
    """The attention op alone."""

    def __init__(self, config: DGAConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, query, key, value, document_ids=None):
        return dga_attention(query, key, value, config=self.config, document_ids=document_ids)


def llama(config: DGAConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return flexdga.wrap(transformers.LlamaForCausalLM(sizes).eval(), config)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length))


def hidden(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, 64)


def attention_program(config: DGAConfig, *more: torch.Tensor) -> torch.export.ExportedProgram:
    inputs = (*qkv(2, 4, 2, 150), *more)
    heads, rows = {0: BATCH, 2: LENGTH}, {0: BATCH, 1: LENGTH}
    shapes = tuple(heads if x.dim() == 4 else rows for x in inputs)
    shapes += (None,) * (4 - len(inputs))
    return torch.export.export(Attention(config), inputs, dynamic_shapes=shapes[: len(inputs)])


def nodes(program: torch.export.ExportedProgram, target: object) -> int:
    return sum(node.target is target for node in program.graph.nodes)


@pytest.mark.parametrize(
    "config",
    [DGAConfig(), small(), DGAConfig.paper(), DGAConfig.h2o(), DGAConfig.dense(),
     DGAConfig(focal_budget=7, focal_ratio=0.3, block_size=(64, 16), scope="prompt", align=True)],
)  # fmt: skip
def test_a_config_survives_its_spelling(config):
    assert read(spell(config)) == config


@pytest.mark.parametrize("text", ["[]", '{"window": -1}', "nonsense"])
def test_a_wrong_spelling_is_refused(text):
    with pytest.raises(ValueError):
        read(text)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DGAConfig.dense(), id="dense"),
        pytest.param(small(), id="groups", marks=pytest.mark.slow),
    ],
)
def test_the_operator_passes_torchs_own_checks(config):
    """Compiled, as in use: under these checks the vmap of uncompiled flex_attention fails."""
    for lengths in (None, torch.tensor([150, 80])):
        inputs = [x.requires_grad_() for x in qkv(2, 4, 2, 150)]
        torch.library.opcheck(OPERATOR, (*inputs, None, lengths, spell(config), True, 0.2))
        given = (torch.randn_like(inputs[0]), *(x.detach() for x in inputs))
        backward = torch.ops.flexdga.attention_backward.default
        torch.library.opcheck(backward, (*given, None, lengths, spell(config), True, 0.2))


def test_the_operator_is_dga_attention_and_its_fake_kernel_knows_the_layout(eager):
    inputs = qkv(2, 4, 2, 150)
    config = small()
    got = OPERATOR(*inputs, None, None, spell(config), True, 0.2)
    assert torch.equal(got, dga_attention(*inputs, config=config, scale=0.2))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        fake = OPERATOR(*fakes, None, None, spell(config), True, 0.2)
    assert (fake.shape, fake.stride(), fake.dtype) == (got.shape, got.stride(), got.dtype)


@pytest.mark.parametrize(
    "config", [DGAConfig.dense(), small(scope="causal"), DGAConfig(scope="causal", dense_below=0)]
)
def test_gradients_through_the_operator_are_those_of_dga_attention(config, eager):
    inputs = [x.requires_grad_() for x in qkv(2, 4, 2, 150)]
    lengths, grad = torch.tensor([150, 80]), torch.randn_like(inputs[0])
    got = OPERATOR(*inputs, None, lengths, spell(config), True, 0.2)
    want = dga_attention(*inputs, config=config, lengths=lengths, scale=0.2)
    assert torch.equal(got, want)
    for x, y in zip(*(torch.autograd.grad(out, inputs, grad) for out in (got, want))):
        assert relative_error(x, y) < FLOAT32


def test_a_program_from_a_file_can_be_trained(tmp_path, eager):
    layer = DGAttention(64, 4, num_kv_heads=2, config=small(scope="causal"))
    program = torch.export.export(layer, (hidden(2, 100),), dynamic_shapes=({0: BATCH, 1: LENGTH},))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    x = hidden(3, 200)
    for module in (layer, loaded):
        module(x).square().sum().backward()
    want, got = (dict(module.named_parameters()) for module in (layer, loaded))
    assert set(want) == set(got) != set()
    for name in want:
        assert relative_error(got[name].grad, want[name].grad) < FLOAT32


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["layer", "plain", "transformers"])
def test_each_attention_is_one_node_and_the_program_survives_a_file(kind, strict, tmp_path, eager):
    config = small()
    if kind == "layer":
        model, make, expected = DGAttention(64, 4, num_kv_heads=2, config=config), hidden, 1
    elif kind == "plain":
        model, make, expected = flexdga.wrap(NanoGPT().eval(), config), tokens, 2
    else:
        model, make, expected = Logits(llama(config)), tokens, 2
    with torch.no_grad():
        program = torch.export.export(
            model, (make(2, 100),), dynamic_shapes=({0: BATCH, 1: LENGTH},), strict=strict
        )
        assert nodes(program, OPERATOR) == expected
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        for batch, length in UNSEEN:
            x = make(batch, length)
            assert relative_error(loaded(x), model(x)) < FLOAT32


def test_a_saved_program_runs_in_another_process(tmp_path, eager):
    torch.export.save(attention_program(small()), tmp_path / "program.pt2")
    inputs = [tuple(qkv(batch, 4, 2, length)) for batch, length in UNSEEN]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import torch, flexdga\n"
        "torch.compiler.set_stance('force_eager')\n"
        "program = torch.export.load('program.pt2').module()\n"
        "torch.save([program(*x) for x in torch.load('inputs.pt')], 'outputs.pt')\n"
    )
    run_python(code, tmp_path)
    for x, got in zip(inputs, torch.load(tmp_path / "outputs.pt")):
        assert relative_error(got, dga_attention(*x, config=small())) < FLOAT32


def run_python(code: str, folder: Path) -> None:
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("changes", "packed"),
    [
        pytest.param({"open_units": None, "open_mass": 0.02, "rest": "drop", "focal_ratio": 0.0,
                      "block_size": (32, 32)}, False, id="openings", marks=pytest.mark.slow),
        pytest.param({}, True, id="groups-packed", marks=pytest.mark.slow),
        pytest.param({"group_weights": "importance", "group_bias": "mass"}, False, id="mass",
                     marks=pytest.mark.slow),
        pytest.param({"grouping": "similarity"}, False, id="similarity", marks=pytest.mark.slow),
        pytest.param({"scope": "causal", "open_units": 3, "block_size": (32, 32)}, True,
                     id="three-units-causal", marks=pytest.mark.slow),
        pytest.param({"focal_budget": 9, "rest": "drop"}, False, id="budget",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_lowered_program_has_only_torchs_operators_and_equal_numbers(changes, packed, eager):
    config = small(**changes)

    def documents(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(length) // 60).expand(batch, -1).clone()
        ids[-1, :5] = -1
        return {"document_ids": ids} if packed else {}

    program = flexdga.lower(attention_program(config, *documents(2, 150).values()))
    assert nodes(program, OPERATOR) == 0
    assert nodes(program, torch.ops.higher_order.flex_attention) == 1
    lowered = program.module()
    for batch, length in UNSEEN:
        inputs = qkv(batch, 4, 2, length)
        ids = documents(batch, length)
        want = reference.attend(
            *inputs, make_plan(*inputs, config=config, **ids),
            group_weights=config.group_weights, group_bias=config.group_bias,
        )  # fmt: skip
        assert relative_error(lowered(*inputs, *ids.values()), want) < FLOAT32


@pytest.mark.slow
def test_lowering_says_where_dense_below_is_not_heard_and_keeps_dense_layers(caplog, eager):
    with caplog.at_level(logging.WARNING, "flexdga"):
        program = flexdga.lower(attention_program(DGAConfig.dense()))
        assert nodes(program, torch.ops.higher_order.flex_attention) == 0
        assert not caplog.records
        sinks_and_window = SMALL | {"rest": "drop", "focal_ratio": 0.0, "dense_below": 300}
        program = flexdga.lower(attention_program(DGAConfig(**sinks_and_window)))
    assert nodes(program, torch.ops.higher_order.flex_attention) == 1
    assert [record.message for record in caplog.records if "dense_below=300" in record.message]


def test_a_program_without_dga_is_left_alone():
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert flexdga.lower(program) is program


def test_wrong_arguments_are_refused_before_work_is_lost(tmp_path):
    layer = DGAttention(64, 4)
    target = tmp_path / "layer.pt2"
    with pytest.raises(TypeError, match="ExportedProgram"):
        flexdga.lower(layer)
    for error, match, arguments in (
        (TypeError, "nn.Module", (len, hidden(2, 9), target)),
        (TypeError, "example_inputs", (layer, 3, target)),
        (TypeError, "among them", (layer, (3,), target)),
        (ValueError, "at least one", (layer, (), target)),
        (ValueError, "ends in .pt2", (layer, hidden(2, 9), tmp_path / "layer")),
        (ValueError, "folder", (layer, hidden(2, 9), tmp_path / "no" / "layer.pt2")),
        (ValueError, "1 to 4 dimensions", (layer, torch.zeros(1, 1, 1, 1, 1), target)),
        (ValueError, "one length", (layer, (hidden(2, 9), hidden(2, 8)), target)),
        (ValueError, "length of at least 2", (layer, hidden(2, 1), target)),
        (ValueError, "goes through dga_attention", (nn.Linear(64, 64), hidden(2, 9), target)),
    ):
        with pytest.raises(error, match=match):
            flexdga.export(*arguments)
    with pytest.raises(ValueError, match="a package"):
        flexdga.load(target)


RUN_WITH_TORCH_ALONE = """
import sys, torch
model = torch._inductor.aoti_load_package('model.pt2')
torch.save([model(*x) for x in torch.load('inputs.pt')], 'outputs.pt')
assert not {'flexdga', 'transformers', 'score_mods'} & set(sys.modules)
"""


def outputs_without_flexdga(model, inputs, path):
    """Of an exported model, in a process that imports torch alone; and here, through `load`."""
    torch.save(inputs, path.parent / "inputs.pt")
    run_python(RUN_WITH_TORCH_ALONE, path.parent)
    outputs = torch.load(path.parent / "outputs.pt")
    loaded = flexdga.load(path)
    assert all(torch.equal(loaded(*x), got) for x, got in zip(inputs, outputs))
    return outputs


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DGAConfig.streaming_llm(window=32), id="window"),
        pytest.param(DGAConfig(dense_below=0), id="default", marks=pytest.mark.slow),
        pytest.param(small(), id="groups", marks=pytest.mark.slow),
    ],
)
def test_the_attention_op_alone_as_a_package(config, tmp_path):
    """Made with one thread, and run with more, where there are more."""
    model = Attention(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        path = flexdga.export(model, qkv(2, 4, 2, 150), tmp_path / "model.pt2")
    finally:
        torch.set_num_threads(threads)
    torch.compiler.set_stance("force_eager")
    inputs = [tuple(qkv(batch, 4, 2, length)) for batch, length in (*UNSEEN, (1, 1031))]
    try:
        for x, got in zip(inputs, outputs_without_flexdga(model, inputs, path)):
            want = reference.attend(*x, make_plan(*x, config=config))
            assert relative_error(got, want) < FLOAT32
    finally:
        torch.compiler.set_stance("default")


def test_a_package_refuses_what_it_would_read_wrongly(tmp_path):
    """With and without flexdga; AOTInductor itself takes strides and dtypes for granted."""
    model = Attention(DGAConfig.dense())
    path = flexdga.export(model, qkv(2, 4, 2, 150), tmp_path / "model.pt2")
    program, loaded = torch._inductor.aoti_load_package(str(path)), flexdga.load(path)
    query, *others = qkv(1, 8, 2, 77)
    cut = query[:, :4]  # of one row, and so contiguous
    assert relative_error(program(cut, *others), model(cut, *others)) < FLOAT32
    for wrong in (query[:, ::2], qkv(1, 4, 4, 200)[0][:, :, :77], cut.mT.contiguous().mT):
        with pytest.raises(ValueError, match="input 0: expected a contiguous tensor"):
            loaded(wrong, *others)
        with pytest.raises(RuntimeError):
            program(wrong, *others)
    with pytest.raises(RuntimeError):
        program(cut.double(), *others)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_whole_model_as_a_package(dynamic, tmp_path):
    model = llama(DGAConfig.streaming_llm(window=32))
    path = flexdga.export(model, tokens(1, 100), tmp_path / "model.pt2", dynamic=dynamic)
    torch.compiler.set_stance("force_eager")
    inputs = [(tokens(batch, length),) for batch, length in (UNSEEN if dynamic else [(1, 100)])]
    try:
        for x, got in zip(inputs, outputs_without_flexdga(model, inputs, path)):
            with torch.no_grad():
                assert relative_error(got, model(*x, use_cache=False).logits) < FLOAT32
    finally:
        torch.compiler.set_stance("default")
