"""What lowering computes twice of the same operands in one block is computed once: the Fourier transform of an x that
several sites read, or its cast."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.compiler.emit.outline import is_ordered, list_entry
from surgery.compiler.graph import writes


def share_repeated(module: fx.GraphModule) -> int:
    """Let nodes that sites were lowered to stand for later ones of the same operation and operands; in place.

    The model's own nodes stay as they were written, as does what draws, writes or is written into. Returns how many
    nodes are gone.
    """
    known: dict[Any, fx.Node] = {}
    gone = 0
    for node in list(module.graph.nodes):
        if writes(node):  # what was read before it may be another value behind it, through any view
            known.clear()
        key = _key(node)
        if key is None:
            continue
        if key in known:
            node.replace_all_uses_with(known[key])
            module.graph.erase_node(node)
            gone += 1
        else:
            known[key] = node
    return gone


def _key(node: fx.Node) -> Any:
    """What two nodes have in common that give the same value; None for a node that is to stay."""
    if node.op not in ("call_function", "call_method") or "span" not in node.meta:
        return None
    if is_ordered(node) or any(map(writes, node.users)):
        return None
    key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs), list_entry(node))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    """A value that is equal to another if both are the same to a program: 1, 1.0 and True are three."""
    match value:
        case dict():
            return tuple((name, _frozen(entry)) for name, entry in value.items())
        case list() | tuple():
            return type(value).__name__, tuple(map(_frozen, value))
        case slice():
            return "slice", _frozen((value.start, value.stop, value.step))
        case fx.Node():
            return value
    return type(value), value
