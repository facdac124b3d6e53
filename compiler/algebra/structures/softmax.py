"""softmax(M): over the last axis."""

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("softmax")
class Softmax(Structure):
    """The shape of its argument."""

    rowwise = True

    def shape(self, *arguments: Expression) -> Shape:
        if not arguments[0].shape:
            raise ShapeProblem("softmax takes a vector or a matrix, not a number")
        return arguments[0].shape

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return torch.softmax(values[0], -1)
