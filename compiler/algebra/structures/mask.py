"""mask(W): one where the entry is not zero, else zero."""

from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("mask")
class Mask(Structure):
    """`[m, n] -> [m, n]`, in the dtype of its argument; no gradient passes through it."""

    def shape(self, *arguments: Expression) -> Shape:
        if not arguments[0].shape:
            raise ShapeProblem("mask takes a matrix, not a number")
        return arguments[0].shape

    def learning(self, arguments: Sequence[Expression]) -> Sequence[Expression]:
        return ()

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return torch.sign(torch.abs(values[0].detach()))

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]

    def keeps_zeros(self, kept: Sequence[bool]) -> bool:
        return kept[0]
