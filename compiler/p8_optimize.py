"""Graph -> Graph: the same values for fewer operations and less memory; what was done is in the graph's log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import fx

from surgery.compiler.graph import Graph, copy_module, drop_dead_nodes
from surgery.compiler.optimize.attention import group_queries
from surgery.compiler.optimize.repeated import share_repeated
from surgery.compiler.optimize.shared_inputs import join_sites

# Each changes a graph in place and returns in how many places it did; here with the log's word for these.
OPTIMIZATIONS: Mapping[Callable[[fx.GraphModule], int], str] = {
    group_queries: "attentions without repeated keys",
    share_repeated: "operations that another site has done",
    join_sites: "groups of sites that read one input",
}


def run(graph: Graph) -> Graph:
    """Apply every optimization, in order; the graph given is not changed."""
    twin = graph.copy()
    return replace(twin, log=(*graph.log, *_optimize(twin.module)))


def optimize_module(module: fx.GraphModule) -> fx.GraphModule:
    """`run` on a GraphModule."""
    twin = copy_module(module)
    _optimize(twin)
    return twin


def _optimize(module: fx.GraphModule) -> list[str]:
    """What was done to the module, in the log's words."""
    counts = {word: optimization(module) for optimization, word in OPTIMIZATIONS.items()}
    drop_dead_nodes(module.graph)
    module.graph.lint()
    module.recompile()
    return [f"{count} {word}" for word, count in counts.items() if count]
