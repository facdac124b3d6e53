"""Where a model ends in a wide product: its last hidden states, and the head that makes logits of them row by row."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.nn import functional

from surgery.compiler.emit.body import WIDTH, Body
from surgery.compiler.emit.naming import Names
from surgery.compiler.emit.outline import is_ordered
from surgery.compiler.graph import TRAINING
from surgery.compiler.kernels.low_rank import low_rank_linear

_aten = torch.ops.aten
_PRODUCTS = (_aten.linear.default, _aten.matmul.default, functional.linear, torch.matmul, operator.matmul)
_OPERATORS = (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg)
_CASTS = (_aten.to.dtype, "to")
_DROPOUTS = (_aten.dropout.default, functional.dropout)


@dataclass(frozen=True)
class Head:
    """The end of a graph: `nodes` make logits [batch, length, vocabulary] of `hidden` [batch, length, width].

    Each row of the logits depends on its own row of `hidden` alone. `prepared` are nodes that are made of weights
    alone, once for all rows; `reads` are the weights and the prepared values that `nodes` read.
    """

    hidden: fx.Node
    nodes: tuple[fx.Node, ...]
    prepared: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    vocabulary: int

    @property
    def training(self) -> fx.Node | None:
        """The graph's `training`, if the head has a dropout of its own."""
        sources = (source for node in self.nodes for source in node.all_input_nodes)
        return next((source for source in sources if source.target == TRAINING), None)

    @property
    def pointwise(self) -> bool:
        """Whether it does more than products, such as a soft cap: that is worth compiling."""
        return any(_is_pointwise(node) for node in self.nodes)


def head_of(graph: fx.Graph, named: Mapping[str, Tensor]) -> Head | None:
    """The head of a graph whose one output is logits; None where they cannot be made row by row.

    `named` are the graph's tensors.
    """
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    vocabulary = _sizes(output)[-1:] if isinstance(output, fx.Node) else []
    if not isinstance(output, fx.Node) or not vocabulary or not isinstance(vocabulary[0], int):
        return None
    order = {node: number for number, node in enumerate(graph.nodes)}
    weights = _of_weights_alone(graph)
    nodes: set[fx.Node] = set()
    waiting = {output}  # rows that `nodes` read
    while not _is_hidden(waiting, output):
        node = max(waiting, key=order.__getitem__)
        if not _is_by_row(node, weights):
            return None
        nodes.add(node)
        waiting.remove(node)
        waiting |= {source for source in node.all_input_nodes if source not in weights and source.target != TRAINING}
    (hidden,) = waiting
    reads = {source: None for node in order if node in nodes for source in node.all_input_nodes if source in weights}
    prepared: set[fx.Node] = set()
    for node in reversed(order):
        made = node in weights and node.op != "get_attr"
        if made and (node in reads or any(user in prepared for user in node.users)):
            prepared.add(node)
    inside = nodes | prepared
    if any(user not in inside and user.op != "output" for node in inside for user in node.users):
        return None
    head = Head(hidden, _in_order(order, nodes), _in_order(order, prepared), tuple(reads), vocabulary[0])
    return head if _keeps_rows(head, named) else None


def _in_order(order: Mapping[fx.Node, int], nodes: set[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(sorted(nodes, key=order.__getitem__))


def _sizes(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else []


def _is_hidden(waiting: set[fx.Node], output: fx.Node) -> bool:
    """Whether this is one value, with a narrow row for each row of the output."""
    (found, *more) = waiting
    sizes, whole = _sizes(found), _sizes(output)
    return not more and sizes[:-1] == whole[:-1] and len(sizes) > 1 and sizes[-1] < whole[-1]


def _of_weights_alone(graph: fx.Graph) -> set[fx.Node]:
    """Tensors of the model, and what is computed of them and of nothing else, without chance."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        made = node.op in ("call_function", "call_method") and node.all_input_nodes and not is_ordered(node)
        if node.op == "get_attr" or (made and all(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _is_pointwise(node: fx.Node) -> bool:
    return node.target in _OPERATORS or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_by_row(node: fx.Node, weights: set[fx.Node]) -> bool:
    """Whether an operation gives each row from the same rows of what it reads, and from weights."""
    rows = [source for source in node.all_input_nodes if source not in weights and source.target != TRAINING]
    if node.target in _PRODUCTS:
        return rows == [node.args[0]]
    if node.target is low_rank_linear:
        return rows in ([node.args[0]], [node.args[0], node.kwargs.get("narrow")])
    if node.target is operator.getitem:
        return node.args[0] in rows and rows[0].target is low_rank_linear
    return node.target in (*_CASTS, *_DROPOUTS) or _is_pointwise(node)


def _keeps_rows(head: Head, named: Mapping[str, Tensor]) -> bool:
    """Whether one row gives one: nothing that a row meets on its way, such as a bias, has several rows itself."""
    example = head.hidden.meta["val"]
    values = {head.hidden: torch.empty(1, example.shape[-1], dtype=example.dtype, device="meta")}

    def value(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return torch.empty_like(named[str(node.target)], device="meta")
        return True if node.target == TRAINING else values[node]

    for node in (*head.prepared, *head.nodes):
        arguments, keywords = map_arg(node.args, value), map_arg(node.kwargs, value)
        with torch.no_grad():
            if isinstance(node.target, str):
                values[node] = getattr(arguments[0], node.target)(*arguments[1:], **keywords)
            else:
                values[node] = node.target(*arguments, **keywords)
        shape = getattr(values[node], "shape", (1, 1))  # a list is of several tensors, whose turn comes
        if node in head.nodes and (len(shape) != 2 or shape[0] != 1):
            return False
    return True


# --- the text ---------------------------------------------------------------------------------------------------------


def head_source(head: Head) -> str:
    """`head_weights`, what is read for all rows, and `head`, which makes their logits."""
    known: dict[fx.Node, str] = {}
    body = Body(known, lambda name: f'weights["{name}"]', Names(), set(head.reads))
    body.write(head.prepared)
    entries = [f'"{known.get(node, str(node.target))}": {body.text(node).source}' for node in head.reads]
    returned = [f"return {{{', '.join(entries)}}}"]
    if len(returned[0]) > WIDTH:
        returned = ["return {", *(f"    {entry}," for entry in entries), "}"]
    lines = [
        "def head_weights(weights: Weights) -> Weights:",
        '    """What `head` reads, the same for all rows."""',
        *(f"    {line}" for line in (*body.lines, *returned)),
        "",
        "",
    ]
    known = {node: f'w["{name}"]' for node, name in known.items() if node in head.reads}
    known[head.hidden] = "hidden"
    dropout = head.training
    if dropout is not None:
        known[dropout] = TRAINING
    body = Body(known, lambda name: f'w["{name}"]', Names(frozenset(["hidden"])), {head.nodes[-1]})
    body.write(head.nodes)
    more = f", {TRAINING}: bool = True" if dropout is not None else ""
    lines += [
        f"def head(w: Weights, hidden: Tensor{more}) -> Tensor:",
        '    """The logits of rows, [..., vocabulary], each from its own last hidden state."""',
        *(f"    {line}" for line in body.lines),
        f"    return {known[head.nodes[-1]]}",
    ]
    return "\n".join(lines) + "\n"
