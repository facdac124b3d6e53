"""Norms of the rows of W with a narrow update, from their parts: `|W_i + L_i R|` without that matrix."""

from __future__ import annotations

from dataclasses import replace

from surgery.compiler.algebra.expression import Expression, rewriting, transposed
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.updated import updated


def with_norms_by_parts(formula: MethodFormula) -> MethodFormula:
    """The same equation, where each `row_norm(W + scale * left @ right)`, transposed or not, forms no matrix."""
    rewritten = rewriting(_by_parts)
    terms = tuple(replace(term, matrix=rewritten(term.matrix)) for term in formula.terms)
    return replace(formula, expression=rewritten(formula.expression), terms=terms)


def _by_parts(node: Expression) -> Expression:
    if node.operation != "row_norm" or len(node.shape) != 1:
        return node
    matrix = node.arguments[0]
    turned = matrix.operation == "transpose"
    whole = matrix.arguments[0] if turned else matrix
    found = updated(whole)
    if found is None or found.times != "one":
        return node
    sides = (Expression("weight", (), whole.shape, name="W"), found.left, found.right)
    if turned:
        sides = (transposed(sides[0]), transposed(found.right), transposed(found.left))
    return Expression("updated_row_norm", (*sides, Expression("number", value=Quantity.of(found.scale))), node.shape)
