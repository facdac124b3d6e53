"""tile(n, q), wrap(n, q): the q x q identity repeated down n rows, as MoRA compresses and decompresses.

Jiang et al. 2024, arXiv:2405.12130, section 3.2 (sharing); `wrap` is the released reading, whose padding is circular.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure
from surgery.compiler.kernels.forms import ceil_div


class _Cyclic(Structure):
    """`[n, q]` of two sizes; products are repetitions and sums of pieces of x, no matrix product."""

    arity = 2
    sizes = (0, 1)
    has_product = True
    constant = True

    def shape(self, *arguments: Expression) -> Shape:
        rows, columns = (argument.value for argument in arguments)
        if rows is None or columns is None:
            raise ShapeProblem(f"{self.name} takes two sizes")
        return (rows, columns)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        like = values[0]
        identity = torch.diag_embed(like.new_ones(whole_of(node.shape[0])))
        return self.product(node, identity, False)

    def product_cost(self, node: Expression, rows: int) -> int:
        return rows * max(whole_of(size) for size in node.shape)


@structure("tile")
class Tile(_Cyclic):
    """`[n, q]`: row i has its one at i mod q."""

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        n, q = (whole_of(size) for size in node.shape)
        return _repeated(x, q, n) if transposed else _summed(x, n, q)


@structure("wrap")
class Wrap(_Cyclic):
    """`[n, q]`: tile, with the last partial group filled from the first rows on; every column has equally many ones.

    Entry [c, j] counts the p in 0..g*q-1 with p mod n = c and p mod q = j, where g = ceil(n / q).
    """

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        n, q = (whole_of(size) for size in node.shape)
        padded = ceil_div(n, q) * q
        if transposed:
            return _summed(_repeated(x, q, padded), padded, n)
        return _summed(_repeated(x, n, padded), padded, q)


def _repeated(x: Tensor, period: int, length: int) -> Tensor:
    """`[..., period] -> [..., length]`: entry p is that of p mod period."""
    if length <= period:
        return x if length == period else x.narrow(-1, 0, length)
    if length < 2 * period:
        return torch.cat((x, x.narrow(-1, 0, length - period)), -1)
    whole = x.unsqueeze(-2).repeat_interleave(ceil_div(length, period), -2).flatten(-2)
    return whole if length % period == 0 else whole.narrow(-1, 0, length)


def _summed(x: Tensor, length: int, period: int) -> Tensor:
    """`[..., length] -> [..., period]`: entry j is the sum of those p with p mod period = j."""
    groups = ceil_div(length, period)
    if length != groups * period:
        x = functional.pad(x, (0, groups * period - length))
    return x if groups == 1 else x.unflatten(-1, (groups, period)).sum(-2)
