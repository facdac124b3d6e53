"""mean(M), sum(M), var(M): over all entries."""

from collections.abc import Callable, Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "var": torch.var}


@structure(*FUNCTIONS)
class Reduction(Structure):
    """`[...] -> a number`."""

    def shape(self, *arguments: Expression) -> Shape:
        if not arguments[0].shape:
            raise ShapeProblem(f"{self.name} takes a vector or a matrix, not a number")
        return ()

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return FUNCTIONS[self.name](values[0])

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]
