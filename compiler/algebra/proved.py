"""Everything that the compiler states about a method, from its equation."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.compiler.algebra.affine import Affine, affine, effective, why_not_merged
from surgery.compiler.algebra.at_rest import at_rest
from surgery.compiler.algebra.facts import identity_at_start, keeps_zeros, needs_dense_weight
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.low_rank import factor
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.rank import bounded_rank
from surgery.compiler.algebra.sources import calibrated
from surgery.compiler.algebra.telescope import why_not

PLAIN = Affine(None, None)  # x itself, as it is in evaluation


@dataclass(frozen=True)
class Proved:
    """The facts of one formula; `rank_bound` is None where delta may have full rank."""

    identity_at_start: bool
    rank_bound: Quantity | None
    merges: bool
    exports_as_lora: bool
    keeps_zeros: bool
    moves_base: bool
    needs_dense_weight: bool
    needs_calibration: bool = False
    merge_reason: str = ""  # why it does not merge


def prove(formula: MethodFormula) -> Proved:
    """Everything the compiler states about a method."""
    dense = needs_dense_weight(formula.expression)
    unbounded = formula.moves_base and why_not(formula) is not None  # the rank of what W gains grows with the steps
    formula = at_rest(formula)
    rank, reason = bounded_rank(formula), why_not_merged(formula)
    meets_x = not reason and all(affine(term.input, formula.shape) == PLAIN for term in formula.terms)
    factored = rank is not None and not unbounded and factor(formula.expression) is not None
    kept = formula.expression if formula.form != "output" else None if reason else effective(formula).matrix
    return Proved(
        identity_at_start=identity_at_start(formula),
        rank_bound=rank,
        merges=not reason,
        exports_as_lora=meets_x and factored,
        keeps_zeros=kept is not None and keeps_zeros(kept),
        moves_base=formula.moves_base or bool(formula.corrections),
        needs_dense_weight=dense,
        needs_calibration=bool(calibrated(formula)),
        merge_reason=reason,
    )
