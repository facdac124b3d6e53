"""An upper bound on the rank of a matrix, by induction over its expression."""

from __future__ import annotations

from contextlib import suppress

from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.facts import ONE, is_column, is_row, is_scalar
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.names import COORDINATES
from surgery.compiler.algebra.quantity import ArithmeticProblem, Monomial, Quantity
from surgery.compiler.algebra.structures import STRUCTURES

SIDES = frozenset({"in", "out", "max_in", "max_out"})  # a rank that depends on them is no bound worth stating


def bounded_rank(formula: MethodFormula) -> Quantity | None:
    """The rank bound of `delta`, or None where it is the full rank (always so for the `weight` form)."""
    if formula.form != "delta":
        return None
    bound = rank_bound(formula.expression)
    if bound.constant is None:
        return None if bound.symbols & SIDES else bound
    rows, columns = (size.constant or 0 for size in formula.expression.shape)
    return bound if bound.constant < min(rows, columns) else None


def rank_bound(node: Expression) -> Quantity:
    """An upper bound on the rank of a matrix; where nothing is known, its smaller side."""
    return _least(_bounds(node))


def _bounds(node: Expression) -> list[Quantity]:
    """Upper bounds on the rank of a matrix, of which none is known to be at most another."""
    bounds: list[Quantity] = []
    parts = node.arguments
    # each part once: asking again in several places would double the work at every level
    inner = [_bounds(part) if len(part.shape) >= 2 else [ONE] for part in parts]
    match node.operation:
        case "filled":
            bounds.append(Quantity.of(0) if node.value == Quantity.of(0) else ONE)
        case "matmul":
            bounds += inner[0] + inner[1]
        case "add" | "subtract" if all(part.shape == node.shape for part in parts):
            bounds.append(_least(inner[0]) + _least(inner[1]))
        case "multiply":
            for part, other, bound in zip(parts, parts[::-1], inner, strict=True):
                if is_scalar(other) or is_row(other) or is_column(other):
                    bounds += bound if part.shape == node.shape else []
            if all(part.shape == node.shape for part in parts):
                with suppress(ArithmeticProblem):  # a symbolic bound of too many terms is none
                    bounds.append(_least(inner[0]) * _least(inner[1]))
        case "divide" if is_scalar(parts[1]) or is_row(parts[1]) or is_column(parts[1]):
            bounds += inner[0] if parts[0].shape == node.shape else []
        case "negate" | "transpose" | "stop" | "previous":
            bounds += inner[0]
        case "slice" if len(parts[0].shape) == 2 and all(part is not None for part in node.index):
            bounds += inner[0]
        case name if name in STRUCTURES:
            known = [_least(bound) if len(part.shape) >= 2 else None for part, bound in zip(parts, inner, strict=True)]
            found = STRUCTURES[name].rank_bound(node, known)
            bounds += [found] if found is not None else []
    return _smallest([*bounds, *node.shape[-2:]])


def _least(bounds: list[Quantity]) -> Quantity:
    """One bound of several true ones, as people read it: `min(rank, outer)`; those without a site's sizes if any."""
    for sizes in (COORDINATES | SIDES, SIDES):
        bounds = [bound for bound in bounds if not bound.symbols & sizes] or bounds
    best = _smallest(bounds)
    with suppress(ArithmeticProblem):  # too long to be read
        return best[0] if len(best) == 1 else Quantity.function("min", *best)
    return best[0]


def _smallest(bounds: list[Quantity]) -> list[Quantity]:
    """The bounds without those that are no better than another, in their order."""
    kept: list[Quantity] = []
    for bound in bounds:
        if not any(_at_most(other, bound) for other in kept):
            kept = [*(other for other in kept if not _at_most(bound, other)), bound]
    return kept


def _at_most(left: Quantity, right: Quantity) -> bool:
    """Whether every term of `left` has one of `right` to itself that is no smaller, where all symbols are 1 or more."""
    if any(factor < 0 for _, factor in (*left.terms, *right.terms)):
        return left == right
    free = list(right.terms)
    for monomial, factor in left.terms:
        above = next((term for term in free if factor <= term[1] and _divides(monomial, term[0])), None)
        if above is None:
            return False
        free.remove(above)
    return True


def _divides(left: Monomial, right: Monomial) -> bool:
    """Whether every symbol has at most the exponent in `left` that it has in `right`."""
    powers, others = dict(left), dict(right)
    return all(powers.get(atom, 0) <= others.get(atom, 0) for atom in {*powers, *others})
