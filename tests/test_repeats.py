"""Layers that repeat are compiled once: what is cut out of a graph, and that it says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import flexdga
from flexdga.compiling import compiled
from flexdga.repeats import REGION, callable_pieces, folded


class Layer(nn.Module):
    """Stores a row, and mixes all rows that were stored."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, state: Tensor, time: Tensor) -> Tensor:
        state.index_copy_(1, time.view(1), self.into(x)[:, None])
        seen = torch.where(torch.arange(state.shape[1]) <= time, 0.0, -torch.inf)
        weights = torch.softmax((state @ x[..., None])[..., 0] + seen, -1)
        return x + self.out((weights[:, None] @ state)[:, 0])


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: Tensor, time: Tensor, *state: Tensor) -> Tensor:
        for layer, own in zip(self.layers, state):
            x = layer(x, own, time)
        return x.relu()


class Late(Layer):
    """It reads a view that was made before its tensor changed."""

    def forward(self, x: Tensor, state: Tensor, time: Tensor) -> Tensor:
        first = state[:, 0]
        return super().forward(x, state, time) + first


def inputs(count: int, batch: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(batch)
    return torch.randn(batch, 8), torch.tensor(2), *(torch.randn(batch, 5, 8) for _ in range(count))


def program(model: Layers) -> torch.export.ExportedProgram:
    given = inputs(len(model.layers))
    rows = Dim("batch", min=1)
    by_row = tuple({0: rows} if x.dim() else None for x in given)
    shapes = {"x": by_row[0], "time": by_row[1], "state": by_row[2:]}
    with torch.no_grad():
        return torch.export.export(model, given, dynamic_shapes=shapes)


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [x.args[2] for x in graph.graph.find_nodes(op="call_function", target=REGION)]


@pytest.mark.parametrize("functional", [False, True])
@torch.no_grad()
def test_layers_become_calls_that_say_the_same(functional: bool) -> None:
    model = Layers(4)
    exported = program(model)
    if functional:
        exported = exported.run_decompositions({})
    graph, known = folded(exported.module(check_guards=False))
    names = calls(graph)
    # Before the change of the state and after it.
    assert len(known) == 2 and [names.count(name) for name in known] == [4, 4]
    given, alike = inputs(4, batch=3), inputs(4, batch=3)
    with callable_pieces(known):
        got = graph(*given)
    torch.testing.assert_close(got, model(*alike), rtol=0, atol=0)
    for x, y in zip(given[2:], alike[2:]):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@torch.no_grad()
def test_what_differs_or_is_rare_stays() -> None:
    assert not folded(program(Layers(1)).module(check_guards=False))[1]
    model = Layers(4)
    model.layers[1].into = nn.Linear(8, 8, bias=False)
    graph, known = folded(program(model).module(check_guards=False))
    assert sorted(calls(graph).count(name) for name in known) == [3, 4]


@torch.no_grad()
def test_a_view_of_what_changes_later_is_left_alone() -> None:
    model = Layers(3)
    model.layers = nn.ModuleList(Late() for _ in range(3))
    graph, known = folded(program(model).module(check_guards=False))
    assert not known
    given, alike = inputs(3), inputs(3)
    torch.testing.assert_close(graph(*given), model(*alike), rtol=0, atol=0)


@pytest.mark.slow
def test_a_package_of_layers_changes_its_state(tmp_path: Path) -> None:
    from torch._inductor.package.package import package_aoti

    model = Layers(4)
    path = tmp_path / "layers.pt2"
    package_aoti(str(path), {"model": compiled("model", program(model), None)})
    run = flexdga.load(path)
    for batch in (1, 3):
        given, alike = inputs(4, batch), inputs(4, batch)
        with torch.no_grad():
            torch.testing.assert_close(run(*given), model(*alike))
        for x, y in zip(given[2:], alike[2:]):
            torch.testing.assert_close(x, y)


@pytest.mark.slow
@torch.no_grad()
def test_constants_of_a_lowering_are_the_packages(tmp_path: Path) -> None:
    """The int4 kernel takes its group size as a constant, which Inductor makes in a call."""
    transformers = pytest.importorskip("transformers")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    sizes = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(sizes).eval()
    flexdga.wrap(model, flexdga.DGAConfig.streaming_llm(window=32, scope="causal"))
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=64))
    path = flexdga.export(model, torch.randint(512, (2, 70)), tmp_path / "int4.pt2")
    tokens = torch.randint(512, (1, 90))
    want = model(tokens, use_cache=False).logits
    torch.testing.assert_close(flexdga.load(path)(tokens), want, rtol=1e-3, atol=1e-3)
