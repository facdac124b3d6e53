"""A grid of circulant blocks, `grid(circ(w))` or `grid(circ(w).T)`, as one structure whose product is by FFT.

As in C3A: Chen et al. 2024, arXiv:2407.19342.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.recorder import called
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure
from surgery.compiler.kernels.diagonals import from_diagonals
from surgery.compiler.kernels.forms import HALF


@structure("grid_circ", "grid_circ_turned")
class CirculantBlocks(Structure):
    """`[p, q, b] -> [p * b, q * b]`: block [i, j] is the circulant of w[i, j], turned: its transpose."""

    has_product = True
    wide = True
    internal = True

    def shape(self, *arguments: Expression) -> Shape:
        shape = arguments[0].shape
        if len(shape) != 3:
            raise ShapeProblem(f"{self.name} takes a tensor of 3 axes, this one has {len(shape)}")
        p, q, b = shape
        return (p * b, q * b)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        width = whole_of(node.arguments[0].shape[-1])
        blocks = called(from_diagonals, torch.cat((values[0][..., 1:], values[0]), -1), width, width)
        if self.name == "grid_circ_turned":
            blocks = blocks.transpose(-1, -2)
        return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        p, q, b = (whole_of(size) for size in node.arguments[0].shape)
        spectrum = torch.fft.rfft(values[0], n=b)
        if transposed == (self.name == "grid_circ_turned"):
            spectrum = torch.conj(spectrum)
        pieces = torch.fft.rfft(x.unflatten(-1, (q if transposed else p, b)), n=b)
        equation = "...qf,pqf->...pf" if transposed else "...pf,pqf->...qf"
        return torch.fft.irfft(torch.einsum(equation, pieces, spectrum), n=b).flatten(-2)

    def forms(self, node: Expression, dtype: torch.dtype) -> bool:
        # transforms of blocks, whose spectra are multiplied as complex numbers in float32: on an H200 1344 to 4246
        # microseconds where the matrix of half precision takes 922 to 1434, and in float32 4200 to 16600
        return dtype in HALF

    def product_cost(self, node: Expression, rows: int) -> int:
        p, q, b = (whole_of(size) for size in node.arguments[0].shape)
        return round(rows * (2.5 * (p + q) * b * math.log2(b) + 8 * p * q * (b // 2 + 1)))

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]
