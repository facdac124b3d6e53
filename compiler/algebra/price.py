"""What it costs to multiply rows with a matrix as its expression says, without forming it."""

from __future__ import annotations

from surgery.compiler.algebra.expression import Expression, Range
from surgery.compiler.algebra.factors import Scale, flatten
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.structures import STRUCTURES


def price(node: Expression, rows: int) -> int:
    """Floating-point operations of a product of that many rows with a matrix, by its parts where that is cheaper."""
    if node.operation in STRUCTURES and STRUCTURES[node.operation].has_product:
        return STRUCTURES[node.operation].product_cost(node, rows)
    return min(_dense(node, rows), _by_parts(node, rows))


def is_parted(node: Expression, rows: int) -> bool:
    """Whether a stack, or a piece of a structure, is multiplied by its parts."""
    return node.operation in ("hstack", "vstack", "slice") and _by_parts(node, rows) < _dense(node, rows)


def bounds(node: Expression) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """First and last row and column of a slice that is a piece of one matrix; None of any other slice."""
    if len(node.arguments[0].shape) != 2 or not all(isinstance(part, Range) for part in node.index):
        return None
    rows, columns = ((whole_of(part.start), whole_of(part.stop)) for part in node.index if isinstance(part, Range))
    return rows, columns


def _dense(node: Expression, rows: int) -> int:
    return 2 * rows * whole_of(node.shape[-2]) * whole_of(node.shape[-1])


def _by_parts(node: Expression, rows: int) -> int:
    match node.operation:
        case "hstack" | "vstack" | "add" | "subtract" if all(len(part.shape) == 2 for part in node.arguments):
            return sum(price(part, rows) for part in node.arguments)
        case "slice" if bounds(node) is not None:
            inner = node.arguments[0]
            structured = inner.operation in STRUCTURES and STRUCTURES[inner.operation].has_product
            return price(inner, rows) if structured else _dense(node, rows)
    factors = flatten(node, False, False, Scale())
    if len(factors) == 1 and factors[0].node is node:
        return _dense(node, rows)
    return sum(price(factor.node, rows) for factor in factors)
