"""What sites compute twice of the same operands is computed once, and nothing else is touched."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional

from surgery.compiler.optimize.repeated import share_repeated


def graph_of(*blocks: str, spans: bool = True) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Two transforms of x, each in a block, and their sum."""
    graph = fx.Graph()
    x, found = graph.placeholder("x"), []
    for block in blocks:
        cast = graph.call_method("to", (x, torch.float64))
        transform = graph.call_function(torch.fft.rfft, (cast,), {"n": 8})
        for node in (cast, transform):
            node.meta["nn_module_stack"] = {"key": (block, torch.nn.Module)}
            if spans:
                node.meta["span"] = object()
        found.append(transform)
    total = found[0]
    for other in found[1:]:
        total = graph.call_function(torch.add, (total, other))
    graph.output(total)
    return fx.GraphModule(torch.nn.Module(), graph), found


def count(module: fx.GraphModule, target: object) -> int:
    return sum(node.target is target for node in module.graph.nodes)


def test_sites_of_one_block_share_what_is_the_same() -> None:
    module, _ = graph_of("layers.0.q", "layers.0.k", "layers.0.v")
    x = torch.randn(4, 8)
    expected = module(x)
    assert share_repeated(module) == 4
    module.recompile()
    assert count(module, torch.fft.rfft) == 1 and torch.equal(module(x), expected)


def test_blocks_share_nothing() -> None:
    module, _ = graph_of("layers.0.q", "layers.1.q")
    assert share_repeated(module) == 0 and count(module, torch.fft.rfft) == 2


def test_the_model_s_own_nodes_stay() -> None:
    module, _ = graph_of("layers.0.q", "layers.0.k", spans=False)
    assert share_repeated(module) == 0


def test_numbers_that_are_equal_to_python_alone_are_told_apart() -> None:
    module, transforms = graph_of("layers.0.q", "layers.0.k")
    for node, power in zip(transforms, (1, True), strict=True):
        node.kwargs = {"n": power}
    assert share_repeated(module) == 1, "the cast alone"


def test_what_draws_or_is_written_into_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    dropped = [graph.call_function(functional.dropout, (x, 0.5)) for _ in range(2)]
    doubled = [graph.call_function(torch.mul, (x, 2)) for _ in range(2)]
    moved = graph.call_method("add_", (doubled[0], 1))
    for node in (*dropped, *doubled, moved):
        node.meta = {"span": object(), "nn_module_stack": {"key": ("layers.0.q", torch.nn.Module)}}
    graph.output((*dropped, *doubled, moved))
    module = fx.GraphModule(torch.nn.Module(), graph)
    share_repeated(module)
    module.recompile()
    first, second, third, fourth, _ = module(torch.ones(64))
    assert not torch.equal(first, second)
    assert torch.equal(third, torch.full((64,), 3.0)) and torch.equal(fourth, torch.full((64,), 2.0))


def test_nothing_is_shared_over_an_operation_that_writes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    copy = graph.call_method("clone", (x,))
    part = graph.call_method("narrow", (copy, 0, 0, 2))  # a view: what writes into `copy` changes it too
    before = graph.call_function(torch.mul, (part, 2))
    graph.call_method("add_", (copy, 1))
    after = graph.call_function(torch.mul, (part, 2))
    for node in (before, after):
        node.meta = {"span": object()}
    graph.output((before, after))
    module = fx.GraphModule(torch.nn.Module(), graph)
    expected = module(torch.ones(4))
    assert share_repeated(module) == 0
    for ours, theirs in zip(module(torch.ones(4)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_lists_and_tensors_among_the_operands() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.cat([x, x], -1) + torch.cat([x, x], -1)

    module = fx.symbolic_trace(run)
    for node in module.graph.nodes:
        node.meta["span"] = object()
    assert share_repeated(module) == 1
    module.recompile()
    x = torch.randn(3)
    assert torch.equal(module(x), run(x))
