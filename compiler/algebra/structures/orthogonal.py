"""skew(v): skew-symmetric matrices. cayley(S): orthogonal ones. As in OFT: Qiu et al. 2023, arXiv:2306.07280."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity, whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, counting, is_filled, structure

ONE, TWO = Quantity.of(1), Quantity.of(2)


@structure("skew")
class Skew(Structure):
    """`[b * (b - 1) / 2] -> [b, b]`: v fills the strict upper triangle row by row, its negative the lower one.

    The size b is found from the length, or given: `skew(v, size = b)`.
    """

    optional = ("size",)
    sizes = (1,)

    def shape(self, *arguments: Expression) -> Shape:
        vector = arguments[0].shape
        if not vector:
            raise ShapeProblem("skew takes a vector")
        side = arguments[1].value if len(arguments) > 1 else _side(vector[-1])
        if side is None and len(arguments) == 1:
            if vector[-1].whole is not None:
                raise ShapeProblem(f"no size b has b * (b - 1) / 2 = {vector[-1]} entries above its diagonal")
            raise ShapeProblem(f"the size b cannot be seen from the length {vector[-1]}: write `skew(v, size = b)`")
        if side is None:
            raise ShapeProblem("the size of skew is a number")
        if vector[-1].differs_from(_entries(side)):
            raise ShapeProblem(f"skew of size {side} takes {_entries(side)} entries, these are {vector[-1]}")
        return (*vector[:-1], side, side)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        side = whole_of(node.shape[-1])
        numbers = counting(values[0], side)
        low, high = torch.minimum(numbers.unsqueeze(-1), numbers), torch.maximum(numbers.unsqueeze(-1), numbers)
        place = low * (2 * side - 1 - low) // 2 + high - low - 1  # on the diagonal any place will do: its sign is zero
        place = place.clamp(0, side * (side - 1) // 2 - 1)
        entries = values[0].index_select(-1, place.flatten()).unflatten(-1, (side, side))
        return entries * torch.sign(numbers - numbers.unsqueeze(-1))

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]


def _entries(side: Quantity) -> Quantity:
    return side * (side - ONE) / TWO


def _side(entries: Quantity) -> Quantity | None:
    """The b with b * (b - 1) / 2 entries; of symbols it is found where b is one term, such as `in / groups`."""
    if entries.whole is not None:
        side = (1 + math.isqrt(1 + 8 * entries.whole)) // 2 if entries.whole > 0 else 0
        return Quantity.of(side) if side * (side - 1) // 2 == entries.whole and side > 1 else None
    for monomial, factor in entries.terms:
        side_of = Quantity(((monomial, factor),)) * Quantity.of(-2)
        if _entries(side_of) == entries:
            return side_of
    return None


@structure("cayley")
class Cayley(Structure):
    """`[n, n] -> [n, n]`: (I + S) @ inverse(I - S), orthogonal for a skew-symmetric S; the identity at S = 0."""

    def shape(self, *arguments: Expression) -> Shape:
        matrix = arguments[0].shape
        if len(matrix) < 2 or matrix[-1].differs_from(matrix[-2]):
            raise ShapeProblem("cayley takes a square matrix")
        return matrix

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        identity = torch.diag_embed(values[0].new_ones(whole_of(node.shape[-1])))
        return torch.linalg.solve(identity - values[0], identity + values[0])  # the two factors commute

    def is_identity(self, *arguments: Expression) -> bool:
        return is_filled(arguments[0], 0)
