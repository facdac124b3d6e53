"""where(M, a, b): entries of a where M is not zero, of b elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("where")
class Where(Structure):
    """The shape of M; a and b are numbers or have that shape."""

    arity = 3

    def shape(self, *arguments: Expression) -> Shape:
        chosen = arguments[0].shape
        if not chosen:
            raise ShapeProblem("where takes a matrix first, then what stands where it is not zero, and elsewhere")
        for branch in arguments[1:]:
            sizes = zip(branch.shape, chosen, strict=False)
            if branch.shape and (len(branch.shape) != len(chosen) or any(a.differs_from(b) for a, b in sizes)):
                raise ShapeProblem("what where chooses from is a number or has the shape of its first argument")
        return chosen

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        chosen, yes, no = values
        like = chosen.new_ones(())
        return torch.where(chosen.detach() != 0, yes * like, no * like)

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        chosen, yes, no = zeros
        return (yes or chosen) and no
