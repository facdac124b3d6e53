"""A graph before it is written: what is equal is read from one place, and what does nothing is gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgery.compiler.graph import drop_dead_nodes, is_constant, tensors


def tidy(module: fx.GraphModule, autocast: bool = False) -> fx.Graph:
    """Let equal sizes and constants be read from one place and take out what does nothing; works in place."""
    graph, named = module.graph, tensors(module)
    seen: dict[str, fx.Node] = {}
    constants: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op == "get_attr" and is_constant(str(node.target)):
            equal = next((other for other in constants if _same(named, node, other)), None)
            if equal is not None:
                node.replace_all_uses_with(equal)
                graph.erase_node(node)
            else:
                constants.append(node)
        value = node.meta.get("val")
        twin: Any = None
        if node.op != "call_function":
            continue
        if node.target is torch.ops.aten.sym_size.int and isinstance(value, torch.SymInt):
            twin = seen.setdefault(str(value.node.expr), node)
        elif _adds_nothing(node) or (not autocast and _casts_nothing(node)):
            twin = node.args[0]
        if isinstance(twin, fx.Node) and twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
    drop_dead_nodes(graph)
    return graph


def _same(named: dict[str, Tensor], node: fx.Node, other: fx.Node) -> bool:
    left, right = named[str(node.target)], named[str(other.target)]
    if left.is_meta or right.is_meta or left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left, right)


def _casts_nothing(node: fx.Node) -> bool:
    """`x.to(x.dtype)`, which gives back x itself."""
    if node.target is not torch.ops.aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return False
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == node.args[1]


def _adds_nothing(node: fx.Node) -> bool:
    """`positions + 0`, as transformers writes it for an empty cache; exact, since the numbers are whole."""
    value = node.meta.get("val")
    whole = isinstance(value, torch.Tensor) and value.dtype == torch.int64 and node.target is torch.ops.aten.add.Tensor
    return whole and len(node.args) == 2 and type(node.args[1]) is int and node.args[1] == 0
