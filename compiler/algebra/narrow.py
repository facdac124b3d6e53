"""A change of W as one product of two narrow factors, and the summands of it that are none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

from surgery.compiler.algebra.expression import Expression, negated, transposed
from surgery.compiler.algebra.facts import is_column, is_scalar
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.low_rank import Factors, factor
from surgery.compiler.algebra.quantity import Quantity, value_of
from surgery.compiler.algebra.sources import walk


@dataclass(frozen=True)
class Narrow:
    """`scale * left @ right + sum(rest)`, with left `[out, rank]`, right `[rank, in]` and rank below out and in."""

    left: Expression
    right: Expression
    scale: float
    rest: tuple[Expression, ...] = ()


def narrow(change: Expression) -> Narrow | None:
    """A change `[out, in]` with as much of it as there is in one narrow product, or None where nothing is narrow."""
    factors, rest = _narrow_factors(change), list[Expression]()
    if factors is None:
        chosen: list[Expression] = []
        for part in summands(change):
            wider = _narrow_factors(total([*chosen, part]))
            if wider is None:
                rest.append(part)
            else:
                factors, chosen = wider, [*chosen, part]
    if factors is None:
        return None
    (left_scale, left), (right_scale, right) = map(without_numbers, factors)
    return Narrow(left, right, left_scale * right_scale, tuple(_less_one(rest)))


def has_narrow_part(formula: MethodFormula) -> bool:
    """Whether a site of the method multiplies its input with W and with something narrow.

    A factor that selects rows is none: they are gathered, and then multiplied with the other factor alone.
    """
    found = [narrow(formula.change(term.matrix)) for term in formula.terms]
    return any(part and not _selects(part.left) and not _selects(part.right) for part in found)


def _selects(factor: Expression) -> bool:
    return any(part.operation == "selection" for part in walk(factor))


def _narrow_factors(node: Expression) -> Factors | None:
    """The two factors of a matrix whose sizes are known, if they are narrower than both of its sides."""
    factors = factor(node)
    width = factors[0].shape[-1].whole if factors is not None and len(node.shape) == 2 else None
    sides = [size.whole for size in node.shape]
    return factors if width is not None and all(side is not None and width < side for side in sides) else None


def _less_one(parts: list[Expression]) -> list[Expression]:
    """`diag(v) @ W` and `-W` as `diag(v - 1) @ W`: one pass over `x @ W.T` instead of two."""
    scaled = [part for part in parts if part.operation == "matmul" and part.arguments[1].operation == "weight"]
    if len(scaled) != 1 or scaled[0].arguments[0].operation != "diag":
        return parts
    diagonal, weight = scaled[0].arguments
    if _negative(weight) not in parts:
        return parts
    (vector,) = diagonal.arguments
    less = Expression("subtract", (vector, Expression("number", value=Quantity.of(1))), vector.shape)
    one = replace(scaled[0], arguments=(replace(diagonal, arguments=(less,)), weight))
    return [one, *(part for part in parts if part is not scaled[0] and part != _negative(weight))]


def total(parts: list[Expression]) -> Expression:
    """The sum of matrices of one shape."""
    return reduce(lambda left, right: Expression("add", (left, right), left.shape), parts)


def summands(node: Expression) -> list[Expression]:
    """The terms of a sum of matrices; what scales all of it, rows or entries, goes to each. W and -W cancel."""
    found: list[Expression] = []
    for part in _terms(node):
        opposite = _negative(part)
        if "weight" in (part.operation, opposite.operation) and opposite in found:
            found.remove(opposite)
        else:
            found.append(part)
    return found


def _terms(node: Expression) -> list[Expression]:
    parts = node.arguments
    match node.operation:
        case "add" | "subtract" if all(part.shape == node.shape for part in parts):
            left, right = map(_terms, parts)
            return left + (right if node.operation == "add" else [_negative(part) for part in right])
        case "negate":
            return [_negative(part) for part in _terms(parts[0])]
        case "stop":
            return [_over(node, (part,)) for part in _terms(parts[0])]
        case "transpose":
            return [turned(part) for part in _terms(parts[0])]
        case "multiply" if parts[1].shape == node.shape and (is_scalar(parts[0]) or is_column(parts[0])):
            return [_over(node, (parts[0], part)) for part in _terms(parts[1])]
        case "multiply" | "divide" if parts[0].shape == node.shape and (is_scalar(parts[1]) or is_column(parts[1])):
            return [_over(node, (part, parts[1])) for part in _terms(parts[0])]
        case "matmul" if parts[0].operation == "diag":
            return [_over(node, (parts[0], part)) for part in _terms(parts[1])]
    return [node]


def turned(node: Expression) -> Expression:
    """The transposed matrix."""
    return node.arguments[0] if node.operation == "transpose" else transposed(node)


def _over(node: Expression, arguments: tuple[Expression, ...]) -> Expression:
    """The same operation, the node itself where its arguments are too."""
    same = all(new is old for new, old in zip(arguments, node.arguments, strict=True))
    return node if same else replace(node, arguments=arguments)


def _negative(node: Expression) -> Expression:
    return node.arguments[0] if node.operation == "negate" else negated(node)


def without_numbers(node: Expression) -> tuple[float, Expression]:
    """A matrix as a number times a matrix without numbers in front."""
    parts = node.arguments
    match node.operation:
        case "negate":
            scale, inner = without_numbers(parts[0])
            return -scale, inner
        case "multiply" if _number(parts[0]) is not None and parts[1].shape == node.shape:
            scale, inner = without_numbers(parts[1])
            return scale * value_of(parts[0].value), inner  # type: ignore[arg-type]
        case "multiply" if _number(parts[1]) is not None and parts[0].shape == node.shape:
            scale, inner = without_numbers(parts[0])
            return scale * value_of(parts[1].value), inner  # type: ignore[arg-type]
        case "divide" if _number(parts[1]) is not None and parts[0].shape == node.shape:
            scale, inner = without_numbers(parts[0])
            return scale / value_of(parts[1].value), inner  # type: ignore[arg-type]
        case "transpose" | "stop" | "previous":
            scale, inner = without_numbers(parts[0])
            return scale, _over(node, (inner,))
        case "matmul":
            (first, left), (second, right) = map(without_numbers, parts)
            return first * second, _over(node, (left, right))
    return 1.0, node


def _number(node: Expression) -> float | None:
    known = node.operation == "number" and node.value is not None and node.value.constant is not None
    return value_of(node.value) if known else None  # type: ignore[arg-type]
