"""Sites that read one input as one call: their narrow products are one, and so is the gradient to their input."""

from __future__ import annotations

import operator
from itertools import takewhile
from typing import Any

from torch import fx

from surgery.compiler.emit.outline import is_ordered, list_entry
from surgery.compiler.graph import writes
from surgery.compiler.kernels.low_rank import low_rank_linear

_LISTS = ("weights", "biases", "lefts", "rights", "scales")


def join_sites(module: fx.GraphModule) -> int:
    """Join the calls of `low_rank_linear` in one block that read the same x, at the first of them; in place.

    A site whose operands are made only later, or behind an operation that writes into a tensor, stays by itself.
    Returns how many calls stand for several.
    """
    graph, joined = module.graph, 0
    for group in _groups(graph):
        while group:
            first, *others = group
            position = {node: number for number, node in enumerate(graph.nodes)}
            movable = {call: _needed(call, first, position) for call in others}
            calls = [first, *(call for call in others if movable[call] is not None)]
            if len(calls) > 1:
                for node in sorted(
                    {node for call in calls[1:] for node in movable[call] or ()}, key=position.__getitem__
                ):
                    first.prepend(node)
                _join(graph, calls)
                joined += 1
            group = [call for call in group if call not in calls]
    return joined


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Calls that read one input in one block, with nothing between them that writes."""
    found: list[list[fx.Node]] = []
    current: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is low_rank_linear:
            key = (node.args[0], node.kwargs.get("narrow"), list_entry(node))
            if key not in current:
                found.append(current.setdefault(key, []))
            current[key].append(node)
        elif writes(node):
            current.clear()
    return found


def _needed(call: fx.Node, first: fx.Node, position: dict[fx.Node, int]) -> set[fx.Node] | None:
    """What has to move in front of `first` for a call to stand there; None if something of it has to stay."""
    needed: set[fx.Node] = set()
    todo = [*call.all_input_nodes]
    while todo:
        node = todo.pop()
        if position[node] < position[first] or node in needed:
            continue
        if node.op not in ("get_attr", "call_function", "call_method") or node is first or is_ordered(node):
            return None
        needed.add(node)
        todo += node.all_input_nodes
    return needed


def _join(graph: fx.Graph, calls: list[fx.Node]) -> None:
    """One call in the place of the first, which gives the outputs of all."""
    first = calls[0]
    operands: dict[str, Any] = {name: [part for call in calls for part in _list(call, name)] for name in _LISTS}
    if "narrow" in first.kwargs:
        operands["narrow"] = first.kwargs["narrow"]
    with graph.inserting_before(first):
        whole = graph.call_function(low_rank_linear, first.args, operands)
        whole.meta = {**first.meta, "nn_module_stack": _common(calls)}
        if list_entry(whole) != list_entry(first):  # what they share, a ModuleDict, has not run: they keep their block
            whole.meta = dict(first.meta)
        before = 0
        for call in calls:
            results = {user.args[1]: user for user in call.users}
            for number in range(len(_list(call, "weights"))):
                if number in results:
                    moved = graph.call_function(operator.getitem, (whole, before + number))
                    moved.meta = results[number].meta
                    results[number].replace_all_uses_with(moved)
                    graph.erase_node(results[number])
            before += len(_list(call, "weights"))
    for call in calls:
        graph.erase_node(call)


def _list(call: fx.Node, name: str) -> list[Any]:
    operands = call.kwargs[name]
    assert isinstance(operands, list | tuple)
    return [*operands]


def _common(calls: list[fx.Node]) -> dict[str, Any]:
    """The modules in which all of the calls ran."""
    stacks = [(call.meta.get("nn_module_stack") or {}).items() for call in calls]
    shared = takewhile(lambda entries: len({path for _, (path, _) in entries}) == 1, zip(*stacks, strict=False))
    return dict(entries[0] for entries in shared)
