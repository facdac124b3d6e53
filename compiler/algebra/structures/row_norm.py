"""row_norm(M): the Euclidean norm of every row."""

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.recorder import called
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure
from surgery.compiler.kernels.row_norms import updated_row_norms


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


@structure("updated_row_norm")
class UpdatedRowNorm(Structure):
    """`[m, n], [m, r], [r, n], a number -> [m]`: of the rows of `W + number * left @ right`, which is not formed."""

    arity = 4
    as_stored = True
    internal = True

    def shape(self, *arguments: Expression) -> Shape:
        return arguments[0].shape[:-1]

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return called(updated_row_norms, *values)
