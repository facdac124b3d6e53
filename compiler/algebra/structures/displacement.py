"""circ skewcirc toeplitz symtoeplitz: matrices whose entry [i, j] depends on i - j alone; products by FFT.

Low displacement rank: Sindhwani et al. 2015, arXiv:1510.01722; as adapters: Sehanobish et al. 2024, arXiv:2406.17740.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch.nn import functional

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.recorder import called
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure
from surgery.compiler.kernels.diagonals import from_diagonals
from surgery.compiler.kernels.forms import HALF

ENTRIES = 4900
"""How many entries of the matrix tensor cores multiply with in half precision while a transform, which runs in float32,
takes one point. On an H200 in bfloat16, 8192 rows, forward and backward, in microseconds: of 4096 points 1530 and the
matrix 1408, of 8192 points 2948 (a Toeplitz matrix of side 4096: 3056) and the matrix of side 8192 5620. In float32
transforms take 651 for 2048 points and the matrix 4201: they always win. In half precision the matrix was then built
in another way; at 2048, where transforms take 823, its three products take 280: that it wins there is a prediction."""


class _Displacement(Structure):
    """Everything but what stands on the diagonals; the product embeds the matrix in a circulant one."""

    has_product = True
    wide = True

    @abstractmethod
    def diagonals(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        """What stands above the diagonal, from the far corner inwards, `[n - 1]`, and the first column, `[m]`."""

    def shape(self, *arguments: Expression) -> Shape:
        vector = arguments[0].shape
        if not vector:
            raise ShapeProblem(f"{self.name} takes a vector, its first column")
        return (*vector, vector[-1])

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        rows, columns = (whole_of(size) for size in node.shape[-2:])
        return called(from_diagonals, torch.cat(self.diagonals(*values), -1), rows, columns)

    def forms(self, node: Expression, dtype: torch.dtype) -> bool:
        rows, columns = (whole_of(size) for size in node.shape[-2:])
        return dtype in HALF and rows * columns <= ENTRIES * self.length(node)

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        rows, columns = (whole_of(size) for size in node.shape[-2:])
        length = self.length(node)
        above, column = self.diagonals(*values)
        first = torch.cat((functional.pad(column, (0, length - rows - columns + 1)), above), -1)
        product = _circular(x, first, length, transposed)
        return product.narrow(-1, 0, rows if transposed else columns)

    def length(self, node: Expression) -> int:
        """The length of the Fourier transforms."""
        rows, columns = (whole_of(size) for size in node.shape[-2:])
        return smooth_length(rows + columns - 1)

    def product_cost(self, node: Expression, rows: int) -> int:
        length = self.length(node)
        return round(rows * length * (5 * math.log2(length) + 3))

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return all(zeros)


def _circular(x: Tensor, first: Tensor, length: int, transposed: bool) -> Tensor:
    """`x @ C.T` if transposed, else `x @ C`, for the circulant C with that first column; x is padded with zeros."""
    spectrum = torch.fft.rfft(first, n=length)
    if not transposed:
        spectrum = torch.conj(spectrum)
    return torch.fft.irfft(torch.fft.rfft(x, n=length) * spectrum, n=length)


def smooth_length(least: int) -> int:
    """The smallest length of at least that which has no prime factor above 7: such transforms are fast."""
    length = least
    while True:
        rest = length
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


@structure("circ")
class Circulant(_Displacement):
    """`[n] -> [n, n]`: entry [i, j] is v[(i - j) mod n], so v is the first column."""

    def diagonals(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        return values[0][..., 1:], values[0]

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        return _circular(x, values[0], self.length(node), transposed)

    def length(self, node: Expression) -> int:
        return whole_of(node.shape[-1])


@structure("skewcirc")
class SkewCirculant(_Displacement):
    """`[n] -> [n, n]`: the circulant matrix with the sign turned above the diagonal."""

    def diagonals(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        return -values[0][..., 1:], values[0]


@structure("symtoeplitz")
class SymmetricToeplitz(_Displacement):
    """`[n] -> [n, n]`: entry [i, j] is v[abs(i - j)]."""

    def diagonals(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        return values[0][..., 1:].flip(-1), values[0]


@structure("toeplitz")
class Toeplitz(_Displacement):
    """`[m], [n] -> [m, n]`: the first column and the first row, whose first entry is not read."""

    arity = 2

    def shape(self, *arguments: Expression) -> Shape:
        column, row = (argument.shape for argument in arguments)
        if not column or not row:
            raise ShapeProblem("toeplitz takes two vectors, its first column and its first row")
        if column[:-1] != row[:-1]:
            raise ShapeProblem("the first column and the first row of toeplitz need the same leading axes")
        return (*column, row[-1])

    def diagonals(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        column, row = values
        return row[..., 1:].flip(-1), column
