"""Outlining: the same computation in a valid order, whatever the model; equal blocks found, odd ones left inline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from surgery.compiler import p5_capture
from surgery.compiler.emit.forward import forward_source
from surgery.compiler.emit.loops import spans
from surgery.compiler.emit.outline import Block, is_ordered, outline
from surgery.compiler.graph import Graph, tensors
from surgery.compiler.kernels.added_linear import added_linear
from surgery.compiler.kernels.low_rank import low_rank_linear

PREAMBLE = "import math, torch\nimport torch.nn.functional as F\nfrom torch import Tensor\nfrom typing import Any\n"


def execute(source: str) -> dict[str, Any]:
    """The functions of an emitted forward."""
    namespace: dict[str, Any] = {}
    exec(f"from __future__ import annotations\n{PREAMBLE}Weights = dict[str, Tensor]\n{source}", namespace)
    return namespace


def same(graph: Graph, source: str, inputs: dict[str, Tensor]) -> None:
    """The emitted forward gives the graph's outputs and gradients to the bit, in training and in evaluation."""
    weights = tensors(graph.module)
    learned = [tensor for tensor in dict.fromkeys(weights.values()) if tensor.requires_grad]
    forward = execute(source)["forward"]
    for training in (True, False):
        found = []
        runs: list[Callable[..., Any]] = [graph.module, lambda *a: forward(weights, *a)]
        for run in runs:
            torch.manual_seed(3)
            output = run(*inputs.values(), training)
            output = output if isinstance(output, Tensor) else output[0]
            gradients = torch.autograd.grad(output.square().sum(), learned, allow_unused=True)
            found.append((output, *gradients))
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 6), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(torch.tanh(self.linear(x)))
        return y


class Plain(nn.Module):
    """Blocks one after the other."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Skips(Plain):
    """A block's output is read again further on, as in a U-Net."""

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.layers[0](x)
        x = first
        for layer in self.layers[1:]:
            x = layer(x)
        return x + first


class Collected(Plain):
    """All the blocks' outputs are results."""

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return torch.stack(found)


class Interleaved(nn.Module):
    """Two stacks that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(Layer() for _ in range(3))
        self.right = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for left, right in zip(self.left, self.right, strict=True):
            x = right(left(x))
        return x


class Recurrent(Plain):
    """One block is used twice, with another one between."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](self.layers[1](self.layers[0](x)))
        return y


class Reentered(nn.Module):
    """A part of a block runs after a later block has run, so that the block cannot be gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": Layer(), "b": Layer()}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.get_submodule("a")(x)
        for layer in self.layers:
            x = layer.get_submodule("b")(x)
        return x


class Nested(nn.Module):
    """The outer list has one entry, whose own list is the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([Plain()])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.towers[0](x)
        return y


MODELS = [Plain, Skips, Collected, Interleaved, Recurrent, Reentered, Nested]


def capture(model: nn.Module) -> Graph:
    return p5_capture.run(model, {"x": torch.randn(3, 6)}, None)


@pytest.mark.parametrize("kind", MODELS)
def test_any_way_to_call_blocks_is_the_same_computation(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    graph = capture(kind())
    same(graph, forward_source(graph).source, {"x": torch.randn(5, 6)})


@pytest.mark.parametrize("kind", MODELS)
def test_every_node_once_and_in_order(kind: type[nn.Module]) -> None:
    graph = capture(kind()).module.graph
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    flat = [node for item in outline(graph) for node in (item.nodes if isinstance(item, Block) else (item,))]
    assert sorted(map(str, flat)) == sorted(map(str, nodes))
    seen: set[fx.Node] = set()
    for node in flat:
        assert all(needed in seen for needed in node.all_input_nodes if needed in nodes)
        seen.add(node)
    assert [node for node in flat if is_ordered(node)] == [node for node in nodes if is_ordered(node)]


@pytest.mark.parametrize("kind", [Plain, Nested, Interleaved])
def test_equal_blocks_share_a_function(kind: type[nn.Module]) -> None:
    forward = forward_source(capture(kind()))
    assert all(name.endswith("layer") for name in forward.block_functions)
    assert len(forward.block_functions) == (2 if kind is Interleaved else 1)


def test_the_length_does_not_depend_on_the_depth() -> None:
    short, long = (forward_source(capture(Plain(depth))).source for depth in (3, 9))
    assert short.replace("0..2", "0..8").replace("range(3)", "range(9)") == long


def test_blocks_that_differ_have_functions_of_their_own() -> None:
    model = Plain(6)
    for layer in model.layers[3:]:
        layer.linear = nn.Linear(6, 6, bias=False)
    graph = capture(model)
    forward = forward_source(graph)
    assert forward.block_functions == ("layer_0", "layer_3")
    assert "if index < 3:" in forward.source
    same(graph, forward.source, {"x": torch.randn(4, 6)})


@pytest.mark.parametrize("operation", [added_linear, low_rank_linear])
def test_what_an_adapted_site_multiplies_with_is_its_block_s_own_work(operation: Callable[..., Any]) -> None:
    model = Plain()
    for layer in model.layers:
        layer.dropout = nn.Identity()
    graph = capture(model).module.graph
    for node in graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            node.target = operation
    assert [item.index for item in outline(graph) if isinstance(item, Block)] == [0, 1, 2, 3]


def test_every_second_block() -> None:
    model = Plain(6)
    for layer in model.layers[1::2]:
        layer.dropout = nn.Dropout(0.5)
    forward = forward_source(capture(model))
    assert forward.block_functions == ("layer_0", "layer_1")
    assert "if index % 2 == 0:" in forward.source


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2], "0..2"), ([0, 2, 4, 6], "(0, 2, ..., 6)"), ([0, 3], "(0, 3)")]
)
def test_numbers_of_blocks_in_words(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text
