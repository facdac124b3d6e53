"""What a method is in evaluation, in merging and in all that is proved of it: `training` is 0 there."""

from __future__ import annotations

from dataclasses import replace

from surgery.compiler.algebra.expression import Expression, rewriting
from surgery.compiler.algebra.formula import MethodFormula, Term
from surgery.compiler.algebra.previous import without_zeros
from surgery.compiler.algebra.quantity import Quantity

TRAINING = Expression("training")  # 1 in a step's forward


def reads_training(node: Expression) -> bool:
    """Whether an expression is another in training."""
    return node.operation == "training" or any(map(reads_training, node.arguments))


def at_rest(formula: MethodFormula) -> MethodFormula:
    """The formula without what happens in training alone."""
    if not any(map(reads_training, (formula.expression, *(term.matrix for term in formula.terms)))):
        return formula
    resting = rewriting(lambda node: _ZERO if node.operation == "training" else node)

    def rested(node: Expression) -> Expression:
        return without_zeros(resting(node))

    return replace(
        formula,
        expression=rested(formula.expression),
        terms=tuple(Term(rested(term.matrix), rested(term.input)) for term in formula.terms),
    )


_ZERO = Expression("number", value=Quantity.of(0))
