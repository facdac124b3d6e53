"""kron(P, Q): the Kronecker product. khatri_rao(P, Q): the Kronecker product of each pair of columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity, whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


class _OfTwo(Structure):
    """What both products of two matrices have in common."""

    arity = 2

    def leading(self, *arguments: Expression) -> Shape:
        """The leading axes, which both have or one has; raises `ShapeProblem`."""
        left, right = (argument.shape for argument in arguments)
        if len(left) < 2 or len(right) < 2:
            raise ShapeProblem(f"{self.name} takes two matrices", "a vector v is a column as `v[:, None]`")
        if left[:-2] and right[:-2] and left[:-2] != right[:-2]:
            raise ShapeProblem(f"the two matrices of {self.name} need the same leading axes")
        return left[:-2] or right[:-2]

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return any(zeros)


@structure("kron")
class Kronecker(_OfTwo):
    """`[a, b], [c, d] -> [a * c, b * d]`; its product takes x as `[b, d]` and multiplies from both sides."""

    has_product = True

    def shape(self, *arguments: Expression) -> Shape:
        leading = self.leading(*arguments)
        (a, b), (c, d) = (argument.shape[-2:] for argument in arguments)
        return (*leading, a * c, b * d)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        left, right = values
        entries = left.unsqueeze(-1).unsqueeze(-3) * right.unsqueeze(-2).unsqueeze(-4)  # [a, c, b, d]
        return entries.flatten(-2).flatten(-3, -2)

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        (a, b), (c, d) = _sides(node)
        left, right = values  # x @ M.T = left @ X @ right.T with X = [b, d]
        if transposed:
            left, right, rows, columns = left.transpose(-1, -2), right.transpose(-1, -2), b, d
        else:
            rows, columns = a, c
        grid = x.unflatten(-1, (rows, columns))
        first, second = _costs(node, transposed)
        if second < first:
            grid = torch.matmul(torch.matmul(grid.transpose(-1, -2), left).transpose(-1, -2), right)
        else:
            grid = torch.matmul(torch.matmul(grid, right).transpose(-1, -2), left).transpose(-1, -2)
        return grid.flatten(-2)

    def product_cost(self, node: Expression, rows: int) -> int:
        return 2 * rows * max(min(_costs(node, transposed)) for transposed in (True, False))

    def is_identity(self, *arguments: Expression) -> bool:
        return all(argument.operation == "identity" for argument in arguments)

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        left, right = bounds
        return None if left is None or right is None else left * right


def _sides(node: Expression) -> tuple[tuple[int, int], tuple[int, int]]:
    left, right = ([whole_of(size) for size in part.shape[-2:]] for part in node.arguments)
    return (left[0], left[1]), (right[0], right[1])


def _costs(node: Expression, transposed: bool) -> tuple[int, int]:
    """Products for one row with the right matrix first, and with the left one first."""
    (a, b), (c, d) = _sides(node)
    if not transposed:
        a, b, c, d = b, a, d, c
    return b * d * c + a * b * c, a * b * d + a * d * c


@structure("khatri_rao")
class KhatriRao(_OfTwo):
    """`[h, r], [d, r] -> [h * d, r]`: column k is the Kronecker product of both columns k."""

    def shape(self, *arguments: Expression) -> Shape:
        leading = self.leading(*arguments)
        (h, r), (d, columns) = (argument.shape[-2:] for argument in arguments)
        if r.differs_from(columns):
            raise ShapeProblem(f"khatri_rao pairs columns: {r} columns meet {columns}")
        return (*leading, h * d, r)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        left, right = values
        return (left.unsqueeze(-2) * right.unsqueeze(-3)).flatten(-3, -2)

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        left, right = bounds
        return None if left is None or right is None else left * right
