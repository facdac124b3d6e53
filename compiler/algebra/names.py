"""Names that mean something in every method, and the names in a part of a method."""

from __future__ import annotations

import keyword

from torch import nn

from surgery.compiler import nodes

_COORDINATES = "layer layers slot slots site sites heads head_dim max_in max_out max_heads"
COORDINATES = frozenset(_COORDINATES.split())  # numbers of a site beside its sizes
RESERVED = COORDINATES | frozenset(["W", "x", "y", "in", "out", "kind", "step", "steps", "training"])
FORMS = ("delta", "weight", "output")
SPECIAL = (*FORMS, "input", "penalty")
MEASURED = frozenset({"hidden_dimension_gain"})  # numbers of the data, which a rule gives to its method
FUNCTIONS_IN_TIME = frozenset(
    ["ema", "sensitivity", "keep_top", "quantile", "cosine_up", "cubic_budget", "late_budget", "gaussian", "bernoulli"]
)

# Starts and how many numbers each may take.
STARTS: dict[str, tuple[int, int]] = {
    "zeros": (0, 0),
    "ones": (0, 0),
    "eye": (0, 0),
    "constant": (1, 1),
    "normal": (1, 1),
    "uniform": (1, 1),
    "kaiming_uniform": (0, 1),
    "kaiming_normal": (0, 0),
    "xavier": (0, 0),
    "orthogonal": (0, 0),
    "onehot_rows": (0, 0),
    "choice": (1, 1),
}


def taken(name: str) -> str:
    """Why no part of a module can have a name, as the end of a sentence; empty if it can."""
    if keyword.iskeyword(name) or name == "self":
        return "which is a word of Python"
    return "which every module of torch has already" if hasattr(nn.Module(), name) else ""


def names_in(node: nodes.Node) -> set[str]:
    """All names in a part of the tree."""
    found = {node.name} if isinstance(node, nodes.Name) else set()
    for value in vars(node).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, nodes.Node):
                found |= names_in(part)
    return found
