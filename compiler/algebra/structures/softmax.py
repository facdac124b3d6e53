"""softmax(M): over the last axis."""

import torch

from surgery.compiler.algebra.expression import Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("softmax")
class Softmax(Structure):
    """The shape of its argument."""

    def shape(self, *arguments: Shape) -> Shape:
        if not arguments[0]:
            raise ShapeProblem("softmax takes a vector or a matrix, not a number")
        return arguments[0]

    def evaluate(self, *values: Tensor) -> Tensor:
        return torch.softmax(values[0], -1)
