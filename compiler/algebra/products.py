"""Which tensors a method reads only as one product: the factors that an optimizer may move together.

With `M = scale * left @ right` the only way in which a method reads `left` and `right`, they may be turned into
`left @ R` and `inverse(R) @ right` without a change of what the site computes, and the gradient of each is a product
of the other with the gradient of M. That is what pair optimizers are made of, whatever the method does with M.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.narrow import without_numbers

Leaf = tuple[str, bool]  # the name of a tensor, and whether it stands transposed
Leaves = tuple[Leaf, ...]


@dataclass
class Reading:
    """How a method reads its tensors: in products of the site's shape `[out, in]`, and otherwise.

    `products` has the factors from left to right, and the numbers in front of where gradients pass.
    """

    products: dict[Leaves, set[float]] = field(default_factory=dict)
    alone: set[str] = field(default_factory=set)


def reading(formula: MethodFormula) -> Reading:
    """How a method's equation and penalty read its tensors; events do not count, they have no gradients."""
    found = Reading()
    penalty = () if formula.penalty is None else (formula.penalty,)
    for node in (formula.expression, *(term.input for term in formula.terms), *penalty):
        _read(node, formula, found, learns=True)
    return found


def _read(node: Expression, formula: MethodFormula, found: Reading, learns: bool) -> None:
    scale, inner = without_numbers(node)
    leaves = _chain(inner)
    if leaves and len(leaves) in (2, 3) and inner.shape == formula.shape:
        found.products.setdefault(leaves, set()).update({scale} if learns else ())
        return
    if node.operation == "tensor":
        found.alone.add(node.name)
    for place, part in enumerate(node.arguments):
        stopped = node.operation == "stop" or (node.operation == "surrogate" and place == 0)
        _read(part, formula, found, learns and not stopped)


def _chain(node: Expression) -> Leaves | None:
    """The tensors of a product of nothing else, from left to right."""
    match node.operation:
        case "tensor":
            return ((node.name, False),)
        case "transpose":
            inner = _chain(node.arguments[0])
            return None if inner is None else tuple((name, not turned) for name, turned in reversed(inner))
        case "matmul":
            left, right = map(_chain, node.arguments)
            return None if left is None or right is None else left + right
    return None
