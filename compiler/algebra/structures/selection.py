"""select(idx, n), selection(A), scatter(v, idx, m, n): rows and entries by their index; gathers, no matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, counting, structure


def _gathered(x: Tensor, index: Tensor, columns: int, transposed: bool) -> Tensor:
    """`x @ S.T` if transposed, else `x @ S`, for the rows S of the identity of that many columns with that index."""
    return x.index_select(-1, index) if transposed else _added(x, index, columns)


def _added(x: Tensor, index: Tensor, length: int) -> Tensor:
    """Zeros `[..., length]` with the columns of x added at their index."""
    return functional.pad(x.detach().narrow(-1, 0, 0), (0, length)).index_add(-1, index, x)


@structure("select")
class Select(Structure):
    """`[k], n -> [k, n]`: the rows of the n x n identity with the index tensor's numbers."""

    arity = 2
    sizes = (1,)
    has_product = True
    constant = True

    def shape(self, *arguments: Expression) -> Shape:
        index, columns = arguments
        if index.operation != "tensor" or not index.shape or columns.value is None:
            raise ShapeProblem("select takes an index tensor, as `choice` starts it, and a size")
        chosen, total = index.shape[-1].whole, columns.value.whole
        if chosen is not None and total is not None and chosen > total:
            advice = "the second argument is how many rows there are to choose from"
            raise ShapeProblem(f"select takes {chosen} different rows of {total}", advice)
        return (*index.shape, columns.value)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        like, index, columns = values
        return torch.eq(index.unsqueeze(-1), counting(like, columns)) * like.new_ones(())

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        return _gathered(x, values[0], whole_of(node.shape[-1]), transposed)

    def product_cost(self, node: Expression, rows: int) -> int:
        return rows * whole_of(node.shape[-2])


@structure("selection")
class Selection(Structure):
    """`[k, n] -> [k, n]`: a matrix that is known to have one 1 in every row, as `onehot_rows` starts it."""

    internal = True
    has_product = True

    def shape(self, *arguments: Expression) -> Shape:
        return arguments[0].shape

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return values[0]

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        return _gathered(x, values[0].argmax(-1), whole_of(node.shape[-1]), transposed)

    def product_cost(self, node: Expression, rows: int) -> int:
        return rows * whole_of(node.shape[-2])


@structure("scatter")
class Scatter(Structure):
    """`[k], [k], m, n -> [m, n]`: entry k of the vector is added at the flat position `row * n + column` of its index.

    FourierFT: Gao et al. 2024, arXiv:2405.03003.
    """

    arity = 4
    sizes = (2, 3)
    has_product = True

    def shape(self, *arguments: Expression) -> Shape:
        vector, index, rows, columns = arguments
        if index.operation != "tensor" or rows.value is None or columns.value is None or len(vector.shape) != 1:
            raise ShapeProblem("scatter takes a vector, an index tensor and two sizes: `scatter(v, idx, out, in)`")
        if len(index.shape) != 1 or vector.shape[0].differs_from(index.shape[0]):
            raise ShapeProblem("the vector and the index tensor of scatter need the same length")
        entries, total = vector.shape[0].whole, (rows.value * columns.value).whole
        if entries is not None and total is not None and entries > total:
            raise ShapeProblem(f"scatter places {entries} entries in a matrix of {total}")
        return (rows.value, columns.value)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        vector, index, rows, columns = values
        return _added(vector, index, rows * columns).unflatten(-1, (rows, columns))

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        vector, index, rows, columns = values
        row, column = index // columns, index % columns
        if transposed:
            return _added(x.index_select(-1, column) * vector, row, rows)
        return _added(x.index_select(-1, row) * vector, column, columns)

    def product_cost(self, node: Expression, rows: int) -> int:
        return 2 * rows * whole_of(node.arguments[0].shape[0])

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]
