"""Whether an equation fits a kind of weight, beyond its sizes."""

from __future__ import annotations

from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.weights import Weight


def why_unfit(formula: MethodFormula, weight: Weight, tied: bool) -> str | None:
    """Why a method cannot adapt a weight, for people; None if it can. `tied`: the weight is used by several modules."""
    if weight.layout.module_class == "Norm" and formula.form != "output" and not is_diagonal(formula.expression):
        return "W of a norm is the diagonal matrix of its vector, and this change of it is not diagonal"
    if tied and formula.form == "output":
        return "the uses of a tied weight have outputs of different sizes, so an `output` equation does not fit both"
    if tied and any(not _is_plain(term.input) for term in formula.terms):
        return "the uses of a tied weight have inputs of different sizes, so only x, or dropout(x), fits both"
    return None


def _is_plain(rows: Expression) -> bool:
    return rows.operation == "x" or (rows.operation == "dropout" and _is_plain(rows.arguments[0]))


def is_diagonal(node: Expression) -> bool:
    """Whether a square matrix over a diagonal W is diagonal by its form."""
    parts = node.arguments
    match node.operation:
        case "weight" | "eye":
            return True
        case "diag":
            return len(node.shape) == 2
        case "transpose" | "negate" | "stop":
            return is_diagonal(parts[0])
        case "add" | "subtract" | "matmul" | "surrogate":
            return all(part.shape == node.shape and is_diagonal(part) for part in parts)
        case "multiply":
            return any(part.shape == node.shape and is_diagonal(part) for part in parts)
        case "divide":
            return not parts[1].shape and is_diagonal(parts[0])
    return False
