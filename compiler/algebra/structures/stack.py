"""hstack(P, Q), vstack(P, Q): matrices side by side, or one above the other."""

from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("hstack", "vstack")
class Stack(Structure):
    """`[m, n], [m, k] -> [m, n + k]`, or `[m, n], [k, n] -> [m + k, n]`."""

    arity = 2

    def shape(self, *arguments: Expression) -> Shape:
        left, right = (argument.shape for argument in arguments)
        joined, kept = (-1, -2) if self.name == "hstack" else (-2, -1)
        if len(left) < 2 or len(right) < 2 or left[kept].differs_from(right[kept]):
            raise ShapeProblem(f"{self.name} takes two matrices with equal {'rows' if kept == -2 else 'columns'}")
        shape = list(left)
        shape[joined] = left[joined] + right[joined]
        return tuple(shape)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return torch.cat(values, -1 if self.name == "hstack" else -2)

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return all(zeros)

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        left, right = bounds
        return None if left is None or right is None else left + right
