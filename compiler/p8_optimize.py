"""Graph -> Graph: the same values for fewer operations and less memory; what was done is in the graph's log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from surgery.compiler.graph import Graph, copy_module, drop_dead_nodes
from surgery.compiler.optimize.attention import group_queries

# Each changes a graph in place and returns in how many places it did.
OPTIMIZATIONS: tuple[Callable[[fx.GraphModule], int], ...] = (group_queries,)


def run(graph: Graph) -> Graph:
    """Apply every optimization, in order; the graph given is not changed."""
    return replace(graph, module=optimize_module(graph.module))


def optimize_module(module: fx.GraphModule) -> fx.GraphModule:
    """`run` on a GraphModule."""
    twin = copy_module(module)
    for optimization in OPTIMIZATIONS:
        optimization(twin)
    drop_dead_nodes(twin.graph)
    twin.graph.lint()
    twin.recompile()
    return twin
