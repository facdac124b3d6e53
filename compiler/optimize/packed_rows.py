"""Rows that hold several documents: attention within each, without the mask that says so for each two tokens.

p8_optimize does not use this yet: what flex attention compiles has to pass tests/gpu/test_attention_on_gpu.py first.
Elsewhere one mask for all layers costs less than what `packed_attention` is by definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgery.compiler.capture.causal import (
    ATTENTION,
    LONGEST,
    argument,
    choose,
    evaluate,
    largest_number,
    number_of,
    seen_by,
    size_of,
    sources,
)
from surgery.compiler.graph import drop_dead_nodes, tensors
from surgery.compiler.kernels.packed_attention import document_starts, packed_attention
from surgery.compiler.optimize.attention import unrepeated


def pack_rows(module: fx.GraphModule) -> int:
    """Replace, in place, attention whose mask is provably that of documents in rows by `packed_attention`.

    Provably: beside sizes the mask depends on one input of positions [rows, length] alone, and for positions of many
    kinds, in rows longer than every number in its subgraph, it is causal within documents. Returns how many changed.
    """
    graph, named = module.graph, tensors(module)
    verdicts: dict[fx.Node, fx.Node | None] = {}  # by mask: the positions that it is made of
    starts: dict[fx.Node, fx.Node] = {}  # by positions
    changed = 0
    for node in list(graph.nodes):
        mask = _mask(node)
        if mask is None:
            continue
        if mask not in verdicts:
            verdicts[mask] = _positions(graph, named, mask, node)
        positions = verdicts[mask]
        if positions is None:
            continue
        if positions not in starts:
            last = [other for other in graph.nodes if other.op == "placeholder"][-1]
            with graph.inserting_after(last):
                starts[positions] = graph.call_function(document_starts, (positions,))
            starts[positions].meta = dict(positions.meta)
        query: Any = node.args[0]
        repeated = node.args[1:3]
        key, value = (unrepeated(argument, size_of(query.meta["val"].shape[1])) for argument in repeated)
        if key is None or value is None:
            key, value = repeated
        scale = {name: node.kwargs[name] for name in ("scale",) if name in node.kwargs}
        with graph.inserting_before(node):
            packed = graph.call_function(packed_attention, (query, key, value, starts[positions]), scale)
        packed.meta = dict(node.meta)
        node.replace_all_uses_with(packed)
        graph.erase_node(node)
        changed += 1
    drop_dead_nodes(graph)
    module.recompile()
    return changed


def _mask(node: fx.Node) -> fx.Node | None:
    """The mask of an attention of rows to themselves, without dropout."""
    mask = argument(node, 3, "attn_mask", None) if node.target is ATTENTION else None
    if not isinstance(mask, fx.Node) or argument(node, 5, "is_causal", False) is not False:
        return None
    query, key = (value.meta["val"].shape for value in node.all_input_nodes[:2])
    fits = len(query) == 4 and size_of(query[2]) == size_of(key[2]) and argument(node, 4, "dropout_p", 0.0) == 0.0
    return mask if fits and "enable_gqa" not in node.kwargs else None


def _positions(graph: fx.Graph, named: dict[str, Tensor], mask: fx.Node, attention: fx.Node) -> fx.Node | None:
    """The positions of which a mask makes documents."""
    query = attention.args[0].meta["val"].shape  # type: ignore[union-attr]
    for positions in graph.nodes:
        value = positions.meta.get("val")
        whole = isinstance(value, Tensor) and value.ndim == 2 and value.dtype == torch.int64
        if positions.op != "placeholder" or not whole or size_of(value.shape[1]) != size_of(query[2]):
            continue
        nodes = sources(graph, named, mask, positions)
        if nodes is not None and any(positions in node.all_input_nodes for node in nodes):
            return positions if _is_of_documents(nodes, named, mask, positions, query) else None
    return None


def _is_of_documents(
    nodes: list[fx.Node], named: dict[str, Tensor], mask: fx.Node, positions: fx.Node, query: torch.Size
) -> bool:
    """Whether the mask is causal within documents, for positions that rise by one, start over, stand still or jump."""
    largest = largest_number(nodes, named)
    if largest >= LONGEST:
        return False
    for rows, length in ((2, 3), (3, 8), (2, 33), (1, largest + 9)):
        sizes = choose((query[0], query[2], query[2]), rows, length)
        if sizes is None:
            return False
        try:
            shape = [number_of(size, sizes) for size in positions.meta["val"].shape]
            for given in _samples(*shape):
                found = seen_by(evaluate(nodes, named, mask, sizes, {positions: given}))
                index = torch.arange(length)
                expected = (index <= index[:, None]) & (index >= document_starts(given)[:, None, :, None])
                if found is None or not torch.equal(found, expected.expand_as(found)):
                    return False
        except (RuntimeError, IndexError, KeyError):  # not defined at this length, so nothing is proved
            return False
    return True


def _samples(rows: int, length: int) -> list[Tensor]:
    """Positions [rows, length]: one document, several of random lengths, each from 0 or from anywhere, and no order."""
    random = torch.Generator().manual_seed(length)
    index = torch.arange(length).expand(rows, length)
    begins = torch.rand(rows, length, generator=random) < 3 / length
    first = index.where(begins, 0).cummax(-1).values
    offsets = torch.randint(0, 9, (rows, length), generator=random).gather(1, first)
    return [index, index - first, index - first + offsets, torch.randint(0, 4, (rows, length), generator=random)]
