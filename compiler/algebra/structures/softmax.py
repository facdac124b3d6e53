"""softmax(M): over the last axis, or another one."""

from __future__ import annotations

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, axis_of, structure


@structure("softmax")
class Softmax(Structure):
    """The shape of its argument: `softmax(M)`, `softmax(M, axis = 0)`."""

    optional = ("axis",)
    rowwise = True

    def shape(self, *arguments: Expression) -> Shape:
        shape = arguments[0].shape
        if not shape:
            raise ShapeProblem("softmax takes a vector or a matrix, not a number")
        if len(arguments) > 1 and shape[axis_of(self.name, *arguments)] == Quantity.symbol("tokens"):
            raise ShapeProblem("softmax treats every row of an activation by itself")
        return shape

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return torch.softmax(values[0], axis_of(self.name, *node.arguments) if len(node.arguments) > 1 else -1)
