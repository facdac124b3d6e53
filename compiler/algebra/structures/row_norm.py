"""row_norm(M): the Euclidean norm of every row."""

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("row_norm")
class RowNorm(Structure):
    """`[m, n] -> [m]`."""

    def shape(self, *arguments: Expression) -> Shape:
        matrix = arguments[0].shape
        if len(matrix) < 2:
            raise ShapeProblem("row_norm takes a matrix")
        return matrix[:-1]

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return torch.linalg.vector_norm(values[0], dim=-1)
