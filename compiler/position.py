"""Where a weight stands among all that share a tensor with it: the numbers of a site that an equation may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.compiler import nodes
from surgery.compiler.program import Rule
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.weights import Weight


@dataclass(frozen=True)
class Position:
    """The block that a weight is in, counted from 0 (None outside of blocks), its kind, and its coordinates by name."""

    layer: int | None
    kind: str
    coordinates: dict[str, int]


def positions(weights: Sequence[Weight], skeleton: Skeleton) -> dict[int, Position]:
    """The position of every weight by its identity; they count over all the weights given, in their order."""
    blocks = sorted(
        {block for weight in weights if (block := skeleton.block(weight.path))},
        key=lambda block: (skeleton.module_lists.index(block[0]), block[1]),
    )
    kinds = list(dict.fromkeys(skeleton.kind(weight.path) for weight in weights))
    heads = {weight.identity: skeleton.heads(weight.path) for weight in weights}
    largest = {
        "max_in": max((weight.inputs for weight in weights), default=0),
        "max_out": max((weight.outputs for weight in weights), default=0),
    }
    if known := [found["heads"] for found in heads.values() if found]:
        largest["max_heads"] = max(known)
    found = {}
    for number, weight in enumerate(weights):
        block, kind = skeleton.block(weight.path), skeleton.kind(weight.path)
        layer = blocks.index(block) if block else None
        coordinates = {
            **({} if layer is None else {"layer": layer}), "layers": len(blocks), "slot": kinds.index(kind),
            "slots": len(kinds), "site": number, "sites": len(weights), **largest, **heads[weight.identity],
        }  # fmt: skip
        found[weight.identity] = Position(layer, kind, coordinates)
    return found


def joined(rules: Sequence[Rule]) -> list[list[int]]:
    """For every rule the rules that share a tensor with it `as NAME`, itself included, in the spec's order."""
    names = [
        {node.shared_as for node in rule.method.statements if isinstance(node, nodes.Tensor) and node.shared_as}
        for rule in rules
    ]
    groups = []
    for index in range(len(rules)):
        group, known = {index}, set(names[index])
        while more := {other for other in range(len(rules)) if other not in group and names[other] & known}:
            group |= more
            known = known.union(*(names[other] for other in more))
        groups.append(sorted(group))
    return groups
