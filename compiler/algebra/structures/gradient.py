"""stop(e): no gradient. surrogate(value, gradient): the value of the first, the gradient of the second."""

from collections.abc import Sequence

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


class _AsItsFirst(Structure):
    """A structure whose value is its first argument's, so that its facts are too."""

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]

    def keeps_zeros(self, kept: Sequence[bool]) -> bool:
        return kept[0]

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        return bounds[0]


@structure("stop")
class Stop(_AsItsFirst):
    """The argument itself, held constant in the backward pass."""

    rowwise = True

    def shape(self, *arguments: Expression) -> Shape:
        return arguments[0].shape

    def learning(self, arguments: Sequence[Expression]) -> Sequence[Expression]:
        return ()

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return values[0].detach()


@structure("surrogate")
class Surrogate(_AsItsFirst):
    """Two expressions of one shape (LoRS, arXiv:2501.08582: the mask is left out of the gradient)."""

    arity = 2

    def shape(self, *arguments: Expression) -> Shape:
        value, gradient = (argument.shape for argument in arguments)
        if len(value) != len(gradient) or any(a.differs_from(b) for a, b in zip(value, gradient, strict=True)):
            raise ShapeProblem("the two arguments of surrogate need the same shape")
        return value

    def learning(self, arguments: Sequence[Expression]) -> Sequence[Expression]:
        return arguments[1:]

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        value, gradient = values
        # gradient - gradient is exactly zero, so the value is exact
        return value.detach() + (gradient - gradient.detach())
