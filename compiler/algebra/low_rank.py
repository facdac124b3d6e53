"""A matrix of low rank as the product of two factors, exact by algebra."""

from __future__ import annotations

from surgery.compiler.algebra.expression import Expression, Shape, negated, transposed
from surgery.compiler.algebra.facts import is_column, is_row, is_scalar
from surgery.compiler.algebra.quantity import Quantity, value_of
from surgery.compiler.algebra.structures import STRUCTURES

Factors = tuple[Expression, Expression]


def factor(node: Expression) -> Factors | None:
    """Matrices L `[m, k]` and R `[k, n]` with `node == L @ R` and k the rank bound, or None.

    Products split at their narrowest place, sums stack, scalings and `stop` go to both or one side; leading axes are
    kept.
    """
    parts = node.arguments
    match node.operation:
        case "matmul":
            return _factor_product(node)
        case "multiply":
            for part, other in (parts, parts[::-1]):
                inner = factor(part) if part.shape == node.shape else None
                if inner is None:
                    continue
                left, right = inner
                if is_scalar(other) or is_column(other):
                    return Expression("multiply", (other, left), left.shape), right
                if is_row(other):
                    return left, Expression("multiply", (right, other), right.shape)
            return _factor_entries(node)
        case "divide":
            inner = factor(parts[0]) if is_scalar(parts[1]) and parts[0].shape == node.shape else None
            if inner is not None:
                return Expression("divide", (inner[0], parts[1]), inner[0].shape), inner[1]
        case "negate":
            if inner := factor(parts[0]):
                return negated(inner[0]), inner[1]
        case "stop" | "previous":
            if inner := factor(parts[0]):
                left, right = (Expression(node.operation, (side,), side.shape) for side in inner)
                return left, right
        case "transpose":
            if inner := factor(parts[0]):
                return transposed(inner[1]), transposed(inner[0])
        case "add" | "subtract" if all(part.shape == node.shape for part in parts):
            first, second = factor(parts[0]), factor(parts[1])
            if first is None or second is None:
                return None
            minus = second[0] if node.operation == "add" else negated(second[0])
            return structure("hstack", first[0], minus), structure("vstack", first[1], second[1])
        case "sum_for":
            if inner := factor(parts[0]):
                return structure("hstack_for", inner[0], parts[1]), structure("vstack_for", inner[1], parts[1])
        case "blockdiag":
            inner = factor(parts[0])
            if inner and _share_axes(parts[0], *inner):
                return structure("blockdiag", inner[0]), structure("blockdiag", inner[1])
        case "grid":
            inner = factor(parts[0])
            if inner and _share_axes(parts[0], *inner):
                return structure("grid_left", inner[0]), structure("grid_right", inner[1])
        case "kron" if len(node.shape) == 2:
            (left, right), (above, below) = (factor(part) or _with_identity(part) for part in parts)
            return _if_narrow(node, structure("kron", left, above), structure("kron", right, below))
    return None


def _factor_product(node: Expression) -> Factors:
    parts = node.arguments
    best = (parts[0], parts[1])
    for side in (0, 1):
        inner = factor(parts[side])
        if inner is None or not _narrower(inner[0].shape[-1], best[0].shape[-1]):
            continue
        best = (inner[0], _matmul(inner[1], parts[1])) if side == 0 else (_matmul(parts[0], inner[0]), inner[1])
    return best


def _factor_entries(node: Expression) -> Factors | None:
    """`(P @ Q) * (R @ S)` entry by entry: the rows of P and R, and the columns of Q and S, as Kronecker products."""
    parts = node.arguments
    if len(node.shape) != 2 or any(part.shape != node.shape for part in parts):
        return None
    first, second = factor(parts[0]), factor(parts[1])
    if first is None or second is None:
        return None
    rows = structure("khatri_rao", transposed(first[0]), transposed(second[0]))
    return _if_narrow(node, transposed(rows), structure("khatri_rao", first[1], second[1]))


def _with_identity(node: Expression) -> Factors:
    """A matrix times the identity, on its narrow side."""
    rows, columns = node.shape[-2:]
    if _narrower(rows, columns):
        return structure("eye", Expression("number", value=rows)), node
    return node, structure("eye", Expression("number", value=columns))


def _if_narrow(node: Expression, left: Expression, right: Expression) -> Factors | None:
    """The two factors if they are narrower than the matrix."""
    return (left, right) if all(_narrower(left.shape[-1], side) for side in node.shape) else None


def split(node: Expression) -> Expression | None:
    """The matrix in a form whose product needs fewer operations than the matrix itself, where its sizes are known."""
    if node.operation not in ("multiply", "blockdiag", "grid"):
        return None
    if node.operation == "grid" and (blocks := _circulants(node.arguments[0])):
        return blocks
    factors = factor(node)
    if factors is None:
        return None
    if node.operation == "multiply":
        rows, columns, width = *node.shape, factors[0].shape[-1]
    else:
        inner = factor(node.arguments[0])
        assert inner is not None
        rows, columns, width = *node.arguments[0].shape[-2:], inner[0].shape[-1]
    if value_of(width * (rows + columns)) >= value_of(rows * columns):
        return None
    return _matmul(*factors)


def _circulants(blocks: Expression) -> Expression | None:
    """The grid of circulant blocks, or of transposed ones, as one structure."""
    turned = blocks.operation == "transpose"
    inner = blocks.arguments[0] if turned else blocks
    if inner.operation != "circ" or len(inner.shape) != 4:
        return None
    return structure("grid_circ_turned" if turned else "grid_circ", inner.arguments[0])


def structure(name: str, *arguments: Expression) -> Expression:
    """A structure of `structures/` by its name, with its shape."""
    return Expression(name, arguments, STRUCTURES[name].shape(*arguments))


def _share_axes(node: Expression, left: Expression, right: Expression) -> bool:
    return left.shape[:-2] == right.shape[:-2] == node.shape[:-2]


def _narrower(a: Quantity, b: Quantity) -> bool:
    if a.constant is not None and b.constant is not None:
        return a.constant < b.constant
    return bool(b.symbols & {"in", "out"}) and not a.symbols & {"in", "out"}


def _matmul(left: Expression, right: Expression) -> Expression:
    leading: Shape = max(left.shape[:-2], right.shape[:-2], key=len)
    return Expression("matmul", (left, right), (*leading, left.shape[-2], right.shape[-1]))
