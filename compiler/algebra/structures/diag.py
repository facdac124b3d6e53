"""diag(v): the square matrix with v on its diagonal."""

from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, is_filled, structure


@structure("diag")
class Diagonal(Structure):
    """`[n] -> [n, n]`; its product scales columns, so no matrix is formed."""

    has_product = True
    entrywise = True

    def shape(self, *arguments: Expression) -> Shape:
        vector = arguments[0].shape
        if not vector:
            raise ShapeProblem("diag takes a vector, not a number")
        return (*vector, vector[-1])

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return torch.diag_embed(values[0])

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        return x * values[0]

    def product_cost(self, node: Expression, rows: int) -> int:
        return rows * whole_of(node.shape[-1])

    def is_identity(self, *arguments: Expression) -> bool:
        return is_filled(arguments[0], 1)

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]
