"""Graph -> Graph: algebra to ops, in each site's strategy."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from surgery.compiler.adapted import AdaptedSite
from surgery.compiler.graph import Graph, copy_module, drop_dead_nodes
from surgery.compiler.p6_rewrite import PREFIX

RECOMPUTED = "recomputed"  # where the lowered graph has the computations that its backward runs again


def run(graph: Graph) -> Graph:
    """Replace every algebra node by the operations of its strategy; the graph given is not changed."""
    return replace(graph, module=lower_module(graph.module))


def lower_module(module: fx.GraphModule) -> fx.GraphModule:
    """`run` on a GraphModule."""
    twin = copy_module(module)
    for node in list(twin.graph.nodes):
        owner = twin.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(owner, AdaptedSite):
            _lower(twin, node, owner)
    if PREFIX in twin._modules:
        del twin._modules[PREFIX]
    drop_dead_nodes(twin.graph)
    twin.graph.lint()
    twin.recompile()
    return twin


class _Recorder(fx.proxy.GraphAppendingTracer):
    """Appends what the lowering computes on proxies; every node keeps the span and the module path of its site."""

    def __init__(self, module: fx.GraphModule, meta: dict[str, Any], path: str) -> None:
        super().__init__(module.graph)
        self.module, self.meta, self.path = module, meta, path

    def call(self, owner: nn.Module, *arguments: Any) -> fx.Proxy:
        """A call of a module without tensors that is to stand in the graph."""
        target = f"{RECOMPUTED}.{self.path}"
        self.module.add_submodule(target, owner)
        return self.create_proxy("call_module", target, arguments, {})

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta = copy.copy(self.meta)
        return node


def _lower(module: fx.GraphModule, node: fx.Node, owner: AdaptedSite) -> None:
    graph, kept = module.graph, ("nn_module_stack", "span")
    path = str(node.target).removeprefix(f"{PREFIX}.")
    recorder = _Recorder(module, {name: node.meta[name] for name in kept if name in node.meta}, path)
    x, weight, bias, training, *tensors = (
        fx.Proxy(argument, recorder) if isinstance(argument, fx.Node) else argument for argument in node.args
    )
    dtype = _dtype_of(node.args[0], owner.adaptation.dtype)
    adaptation = replace(owner.adaptation, dtype=dtype)
    with graph.inserting_before(node):
        base, values = owner.read(weight, tensors)  # type: ignore[arg-type]
        y = adaptation(x, base, bias, values, training)
    assert isinstance(y, fx.Proxy)
    if "val" in node.meta:
        y.node.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(y.node)
    graph.erase_node(node)


def _dtype_of(x: Any, otherwise: torch.dtype) -> torch.dtype:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else otherwise
