"""fro(M), norm(v): the square root of the sum of squares of all entries."""

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("fro", "norm")
class Norm(Structure):
    """`[...] -> a number`."""

    def shape(self, *arguments: Expression) -> Shape:
        if not arguments[0].shape:
            raise ShapeProblem(f"{self.name} takes a vector or a matrix, not a number")
        return ()

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return torch.linalg.vector_norm(values[0])
