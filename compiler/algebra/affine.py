"""What a site computes as one weight and one bias, proved by induction over its equation, where that is so.

Dropout counts as nothing: merging is what the site computes in evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.compiler.algebra.at_rest import at_rest
from surgery.compiler.algebra.expression import Expression, Shape, negated, transposed
from surgery.compiler.algebra.facts import is_scalar
from surgery.compiler.algebra.formula import MethodFormula, reads_rows
from surgery.compiler.algebra.quantity import Quantity

BIAS = "bias"  # the leaf that stands for the site's bias, `[out]`
ONE = Expression("number", value=Quantity.of(1))


class NotAffine(Exception):
    """An expression of x that is not `x @ M.T + c`; its text says why."""


@dataclass(frozen=True)
class Affine:
    """`x @ matrix.T + offset`: `[out, in]` and `[out]`; None stands for the identity, and for no offset."""

    matrix: Expression | None
    offset: Expression | None

    def weight(self, size: Quantity) -> Expression:
        """The matrix, with the identity `[size, size]` written out."""
        return self.matrix or _diagonal(_filled(size))


def effective(formula: MethodFormula, biased: bool = True) -> Affine:
    """The weight and the bias that a site has in effect, over W, its bias if it has one, and the method's tensors.

    Raises NotAffine.
    """
    formula = at_rest(formula)
    if formula.form == "output":
        return affine(formula.expression, formula.shape, biased)
    inputs = [affine(term.input, formula.shape, biased) for term in formula.terms]
    base = Expression("weight", (), formula.shape, name="W")
    if all(rows.matrix is None for rows in inputs):
        plain = formula.expression if formula.form == "weight" else _add(base, formula.expression)
    else:
        plain = base
        for term, rows in zip(formula.terms, inputs, strict=True):
            plain = _add(plain, _times(formula.change(term.matrix), rows.matrix))
    offset = _bias(formula.shape) if biased else None
    for term, rows in zip(formula.terms, inputs, strict=True):
        if rows.offset is not None:
            moved = _row_times(rows.offset, transposed(formula.change(term.matrix)))
            offset = moved if offset is None else _add(offset, moved)
    return Affine(plain, offset)


def _bias(shape: Shape) -> Expression:
    return Expression("tensor", (), shape[:1], name=BIAS)


def why_not_merged(formula: MethodFormula) -> str:
    """Why what a site computes is no weight and bias; empty if it is."""
    try:
        effective(formula)
    except NotAffine as problem:
        return str(problem)
    return ""


def why_not_folded(formula: MethodFormula) -> str:
    """Why a site cannot be run as one product with one weight, in training too; empty if it can."""
    if formula.form == "output":
        return "an `output` equation is one of activations"
    if formula.dropout:
        return "dropout acts on its input alone"
    return "" if formula.reads_plain_x else "its input is not x itself"


def affine(node: Expression, shape: Shape, biased: bool = True) -> Affine:
    """An expression of activations as `x @ M.T + c`, for a site whose W is `shape`; raises NotAffine."""
    parts = node.arguments
    match node.operation:
        case "x" if node.name == "x":
            return Affine(None, None)
        case "x":
            raise NotAffine("it reads the input of an earlier block")
        case "y":
            return Affine(Expression("weight", (), shape, name="W"), _bias(shape) if biased else None)
        case "dropout" | "stop" | "sum_for":  # the last stands for a symbolic number of terms, like its own
            return affine(parts[0], shape, biased)
        case "negate":
            return _scaled(affine(parts[0], shape, biased), Expression("number", value=Quantity.of(-1)), node)
        case "add" | "subtract":
            return _sum(node, shape, biased)
        case "multiply" | "divide":
            return _product(node, shape, biased)
        case "matmul":
            rows, matrix = affine(parts[0], shape, biased), parts[1]
            offset = None if rows.offset is None else _row_times(rows.offset, matrix)
            return Affine(_times(transposed(matrix), rows.matrix), offset)
        case "slice":
            rows = affine(parts[0], shape, biased)
            size, columns = parts[0].shape[-1], node.index[1]
            matrix = rows.weight(size)
            cut = Expression("slice", (matrix,), (node.shape[-1], matrix.shape[-1]), index=(columns,))
            if rows.offset is None:
                return Affine(cut, None)
            offset = Expression("slice", (_spread(rows.offset, size),), (node.shape[-1],), index=(columns,))
            return Affine(cut, offset)
    raise NotAffine(f"`{node.operation}` of an activation is not linear in x")


def _sum(node: Expression, shape: Shape, biased: bool) -> Affine:
    left, right = node.arguments
    if not (reads_rows(left) and reads_rows(right)):
        rows, other = (left, right) if reads_rows(left) else (right, left)
        _same_width(rows, node)
        known = affine(rows, shape, biased)
        if node.operation == "subtract" and rows is right:
            known = _scaled(known, Expression("number", value=Quantity.of(-1)), node)
        added = other if node.operation == "add" or rows is right else negated(other)
        offset = _vector(added, node.shape[-1])
        return Affine(known.matrix, offset if known.offset is None else _add(known.offset, offset))
    _same_width(left, node)
    _same_width(right, node)
    first, second = affine(left, shape, biased), affine(right, shape, biased)
    if node.operation == "subtract":
        second = _scaled(second, Expression("number", value=Quantity.of(-1)), node)
    size = node.shape[-1]
    offsets = [offset for offset in (first.offset, second.offset) if offset is not None]
    joined = _add(*offsets) if len(offsets) == 2 else (*offsets, None)[0]
    return Affine(_add(first.weight(size), second.weight(size)), joined)


def _product(node: Expression, shape: Shape, biased: bool) -> Affine:
    left, right = node.arguments
    if reads_rows(left) and reads_rows(right):
        raise NotAffine("a product of two activations is not linear in x")
    if node.operation == "divide" and reads_rows(right):
        raise NotAffine("`/` by an activation is not linear in x")
    rows, factor = (left, right) if reads_rows(left) else (right, left)
    _same_width(rows, node)
    if node.operation == "divide":
        factor = Expression("divide", (ONE, factor), factor.shape)
    return _scaled(affine(rows, shape, biased), factor, node)


def _scaled(rows: Affine, factor: Expression, node: Expression) -> Affine:
    """Every column of the rows times its entry of `factor`, a number or a vector."""
    size = node.shape[-1]
    offset = None
    if rows.offset is not None:
        by = factor if is_scalar(factor) and not factor.shape else _vector(factor, size)
        offset = Expression("multiply", (by, rows.offset), (size,))
    if not factor.shape and rows.matrix is not None:
        return Affine(Expression("multiply", (factor, rows.matrix), rows.matrix.shape), offset)
    return Affine(_times(_diagonal(_vector(factor, size)), rows.matrix), offset)


def _same_width(rows: Expression, node: Expression) -> None:
    if rows.shape != node.shape:
        raise NotAffine("an activation of one column is spread over several")


def _vector(node: Expression, size: Quantity) -> Expression:
    """A number, `[1]`, `[n]` or `[1, n]` as `[n]`."""
    if len(node.shape) == 2:
        node = Expression("slice", (node,), node.shape[1:], index=(Quantity.of(0),))
    return _spread(node, size)


def _spread(node: Expression, size: Quantity) -> Expression:
    if node.shape == (size,):
        return node
    return Expression("multiply", (node, _filled(size)), (size,))


def _filled(size: Quantity) -> Expression:
    return Expression("filled", (), (size,), value=Quantity.of(1))


def _diagonal(vector: Expression) -> Expression:
    return Expression("diag", (vector,), (*vector.shape, vector.shape[-1]))


def _add(left: Expression, right: Expression) -> Expression:
    return Expression("add", (left, right), left.shape)


def _times(left: Expression, right: Expression | None) -> Expression:
    return left if right is None else Expression("matmul", (left, right), (left.shape[-2], right.shape[-1]))


def _row_times(row: Expression, matrix: Expression) -> Expression:
    """A vector `[n]` times `[n, m]`."""
    lifted = Expression("slice", (row,), (Quantity.of(1), *row.shape), index=(None,))
    product = Expression("matmul", (lifted, matrix), (Quantity.of(1), matrix.shape[-1]))
    return Expression("slice", (product,), (matrix.shape[-1],), index=(Quantity.of(0),))
