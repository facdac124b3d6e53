"""ifft2(S): the matrix of a spectrum, as FourierFT has it. Gao et al. 2024, arXiv:2405.03003, equation 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("ifft2")
class InverseFourier(Structure):
    """`[m, n] -> [m, n]`: the real part of the two-dimensional inverse Fourier transform of a real spectrum."""

    def shape(self, *arguments: Expression) -> Shape:
        if len(arguments[0].shape) < 2:
            raise ShapeProblem("ifft2 takes a matrix")
        return arguments[0].shape

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return torch.real(torch.fft.ifft2(values[0]))

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0]
