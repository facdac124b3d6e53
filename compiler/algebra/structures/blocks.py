"""blockdiag(T): blocks along the diagonal. grid(T): a grid of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity, whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


class _Blocks(Structure):
    """What all matrices made of blocks have in common: blocks that are zero make a matrix that is."""

    has_product = True

    def sizes_of(self, *arguments: Expression, axes: int) -> tuple[Shape, Shape]:
        """The leading axes, and the `axes` last ones."""
        shape = arguments[0].shape
        if len(shape) < axes:
            raise ShapeProblem(f"{self.name} takes a tensor of {axes} axes, this one has {len(shape)}")
        return shape[:-axes], shape[-axes:]

    def product_cost(self, node: Expression, rows: int) -> int:
        return 2 * rows * math.prod(whole_of(size) for size in node.arguments[0].shape)

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]


@structure("blockdiag")
class BlockDiagonal(_Blocks):
    """`[g, m, n] -> [g * m, g * n]`: block k stands at rows k*m and columns k*n."""

    def shape(self, *arguments: Expression) -> Shape:
        leading, (g, m, n) = self.sizes_of(*arguments, axes=3)
        return (*leading, g * m, g * n)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        blocks = torch.diag_embed(values[0].movedim(-3, -1))  # [m, n, g, g]
        return blocks.movedim(-2, -4).transpose(-1, -2).flatten(-2).flatten(-3, -2)

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        g, m, n = (whole_of(size) for size in node.arguments[0].shape[-3:])
        if transposed:
            return torch.einsum("...gn,gmn->...gm", x.unflatten(-1, (g, n)), values[0]).flatten(-2)
        return torch.einsum("...gm,gmn->...gn", x.unflatten(-1, (g, m)), values[0]).flatten(-2)

    def is_identity(self, *arguments: Expression) -> bool:
        return arguments[0].operation == "identity"

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        return None if bounds[0] is None else node.arguments[0].shape[-3] * bounds[0]


@structure("grid")
class Grid(_Blocks):
    """`[p, q, m, n] -> [p * m, q * n]`: block [i, j] stands at rows i*m and columns j*n."""

    has_product = False

    def shape(self, *arguments: Expression) -> Shape:
        leading, (p, q, m, n) = self.sizes_of(*arguments, axes=4)
        return (*leading, p * m, q * n)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return values[0].transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        p, q = node.arguments[0].shape[-4:-2]
        return None if bounds[0] is None else p * q * bounds[0]


@structure("grid_left")
class GridLeft(_Blocks):
    """`[p, q, m, r] -> [p * m, p * q * r]`, so that `grid(B @ A) = grid_left(B) @ grid_right(A)`."""

    internal = True

    def shape(self, *arguments: Expression) -> Shape:
        leading, (p, q, m, r) = self.sizes_of(*arguments, axes=4)
        return (*leading, p * m, p * q * r)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        wide = values[0].transpose(-3, -2).flatten(-2)  # [p, m, q * r]
        return torch.diag_embed(wide.movedim(-3, -1)).movedim(-2, -4).transpose(-1, -2).flatten(-2).flatten(-3, -2)

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        p, q, m, r = (whole_of(size) for size in node.arguments[0].shape[-4:])
        if transposed:
            return torch.einsum("...pqr,pqmr->...pm", x.unflatten(-1, (p, q, r)), values[0]).flatten(-2)
        return torch.einsum("...pm,pqmr->...pqr", x.unflatten(-1, (p, m)), values[0]).flatten(-3)


@structure("grid_right")
class GridRight(_Blocks):
    """`[p, q, r, n] -> [p * q * r, q * n]`: every row of blocks acts on its own columns."""

    internal = True

    def shape(self, *arguments: Expression) -> Shape:
        leading, (p, q, r, n) = self.sizes_of(*arguments, axes=4)
        return (*leading, p * q * r, q * n)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        blocks = torch.diag_embed(values[0].movedim(-3, -1))  # [p, r, n, q, q]
        return blocks.movedim(-2, -4).transpose(-1, -2).flatten(-2).flatten(-4, -2)

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        p, q, r, n = (whole_of(size) for size in node.arguments[0].shape[-4:])
        if transposed:
            return torch.einsum("...qn,pqrn->...pqr", x.unflatten(-1, (q, n)), values[0]).flatten(-3)
        return torch.einsum("...pqr,pqrn->...qn", x.unflatten(-1, (p, q, r)), values[0]).flatten(-2)
