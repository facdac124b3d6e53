"""A sum or a stack over a range while the number of terms is a symbol: for shapes and facts alone."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import Structure, Tensor, structure


@structure("sum_for", "hstack_for", "vstack_for")
class Repeated(Structure):
    """One term, in which the variable is a symbol (the node's `name`), and how many there are."""

    arity = 2
    internal = True

    def shape(self, *arguments: Expression) -> Shape:
        term, count = arguments[0].shape, arguments[1].value
        assert count is not None
        match self.name:
            case "hstack_for":
                return (*term[:-1], count * term[-1])
            case "vstack_for":
                return (*term[:-2], count * term[-2], term[-1])
        return term

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        raise AssertionError("a sum over a range is written out before it is computed")

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]

    def keeps_zeros(self, kept: Sequence[bool]) -> bool:
        return self.name == "sum_for" and kept[0]

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        term, count = bounds[0], node.arguments[1].value
        return None if term is None or count is None or node.name in term.symbols else count * term
