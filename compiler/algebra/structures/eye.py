"""eye(n): the identity matrix."""

from __future__ import annotations

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("eye")
class Eye(Structure):
    """`[n, n]` of a size."""

    sizes = (0,)
    has_product = True
    constant = True

    def shape(self, *arguments: Expression) -> Shape:
        length = arguments[0].value
        if length is None:
            raise ShapeProblem("eye takes a size")
        return (length, length)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        like = values[0]
        return torch.diag_embed(like.new_ones(whole_of(node.shape[-1])))

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        return x

    def product_cost(self, node: Expression, rows: int) -> int:
        return 0

    def is_identity(self, *arguments: Expression) -> bool:
        return True
