"""What a site multiplies with as `diag(scale) @ (W + left @ right)`, the factors narrow: what LoRA and DoRA hold."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.compiler.algebra.affine import BIAS, NotAffine, effective
from surgery.compiler.algebra.expression import Expression, Range
from surgery.compiler.algebra.facts import is_column, is_scalar
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.narrow import Narrow, narrow, summands, total
from surgery.compiler.algebra.quantity import Quantity


class NotNarrow(Exception):
    """A site whose weight is no such product; its text says why."""


@dataclass(frozen=True)
class Change:
    """`scale`, `[out, 1]` or a number, scales the rows of the whole, None for one; `narrow` is None where W stays."""

    scale: Expression | None
    narrow: Narrow | None


def change(formula: MethodFormula, biased: bool) -> Change:
    """How a method changes W, W as it is now; `biased` says whether the site has a bias. Raises NotNarrow."""
    try:
        found = effective(formula, biased)
    except NotAffine as reason:
        raise NotNarrow(str(reason)) from reason
    offset = found.offset
    if offset is not None and not (biased and offset.operation == "tensor" and offset.name == BIAS):
        raise NotNarrow("it changes the bias")
    size = formula.shape[0]
    scale, weight = _rows(found.weight(size))
    parts = summands(weight)
    rest = [part for part in parts if part.operation != "weight"]
    if len(rest) != len(parts) - 1:
        raise NotNarrow("what it multiplies with is not W and a change of W")
    if not rest:
        return Change(scale, None)
    factors = narrow(total(rest))
    if factors is None or factors.rest:
        raise NotNarrow("its change of W may have full rank")
    return Change(scale, factors)


def _rows(node: Expression) -> tuple[Expression | None, Expression]:
    """A matrix as what scales its rows, `[out, 1]` or a number, times the rest."""
    parts = node.arguments
    match node.operation:
        case "stop":
            return _rows(parts[0])
        case "matmul" if parts[0].operation == "diag":
            (vector,) = parts[0].arguments
            size = vector.shape[-1]
            index = (Range(Quantity.of(0), size), None)
            return _scaled(Expression("slice", (vector,), (size, Quantity.of(1)), index=index), parts[1])
        case "multiply" if parts[1].shape == node.shape and (is_scalar(parts[0]) or is_column(parts[0])):
            return _scaled(parts[0], parts[1])
        case "multiply" if parts[0].shape == node.shape and (is_scalar(parts[1]) or is_column(parts[1])):
            return _scaled(parts[1], parts[0])
        case "divide" if parts[0].shape == node.shape and (is_scalar(parts[1]) or is_column(parts[1])):
            one = Expression("number", value=Quantity.of(1))
            return _scaled(Expression("divide", (one, parts[1]), parts[1].shape), parts[0])
    return None, node


def _scaled(scale: Expression, node: Expression) -> tuple[Expression, Expression]:
    inner, rest = _rows(node)
    if inner is None:
        return scale, rest
    shape = max(scale.shape, inner.shape, key=len)
    return Expression("multiply", (scale, inner), shape), rest
