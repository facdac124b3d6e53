"""mean sum var min max norm fro: of all entries, or along one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, axis_of, structure

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "var": torch.var,
    "min": torch.amin,
    "max": torch.amax,
    "norm": torch.linalg.vector_norm,
    "fro": torch.linalg.vector_norm,
}


@structure(*FUNCTIONS)
class Reduction(Structure):
    """`[...] -> a number`, or the shape without the axis: `mean(E, axis = 0)`. norm and fro are roots of squares."""

    optional = ("axis",)

    def shape(self, *arguments: Expression) -> Shape:
        shape = arguments[0].shape
        if not shape:
            raise ShapeProblem(f"{self.name} takes a vector or a matrix, not a number")
        if len(arguments) == 1:
            return ()
        axis = len(shape) + axis_of(self.name, *arguments)
        return shape[:axis] + shape[axis + 1 :]

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        if len(node.arguments) > 1:
            return FUNCTIONS[self.name](values[0], dim=axis_of(self.name, *node.arguments))
        return FUNCTIONS[self.name](values[0], dim=tuple(range(-len(node.arguments[0].shape), 0)))

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]
