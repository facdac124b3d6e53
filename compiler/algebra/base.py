"""How a site's weight is stored and meets its input: the one place through which W and `x @ W.T` are reached."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from surgery.compiler.algebra.structures import Tensor
from surgery.compiler.plan import Site


def logical(stored: Tensor, site: Site) -> Tensor:
    """A site's stored weight as W `[out, in]`, behind a leading `[experts]` where it is a stack of them."""
    match site.module_class:
        case "Conv2d":
            return stored.flatten(1)
        case "Norm":
            return torch.diag_embed(stored)
    return stored.transpose(-1, -2) if site.transposed else stored


def stored_like(weight: Tensor, site: Site) -> Tensor:
    """A matrix `[..., out, in]` in the layout in which the site's weight is stored: the inverse of `logical`.

    Of a norm's matrix it is the diagonal, which is the matrix only where that is diagonal.
    """
    match site.module_class:
        case "Conv2d":
            return weight.unflatten(1, (-1, *site.kernel))
        case "Norm":
            return torch.diagonal(weight, dim1=-2, dim2=-1)
    return weight.transpose(-1, -2) if site.transposed else weight


@dataclass(frozen=True)
class Base:
    """The frozen weight of a site, the one place through which W and `x @ W.T` are reached."""

    stored: Tensor
    transposed: bool  # stored as [in, out], as Conv1D does
    dtype: torch.dtype

    @property
    def is_matrix(self) -> bool:
        """Whether `linear` is `x @ weight.T + bias` for a 2-D weight and any x `[..., in]`."""
        return True

    def base_weight(self) -> Tensor:
        """W as `[out, in]`."""
        return self.stored.transpose(0, 1) if self.transposed else self.stored

    def base_linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`; a transposed one takes x as `[rows, in]`, as Conv1D does."""
        if not self.transposed:
            return functional.linear(x, self.stored, bias)
        return torch.matmul(x, self.stored) if bias is None else torch.addmm(bias, x, self.stored)

    def base_linear_transposed(self, x: Tensor) -> Tensor:
        """`x @ W`."""
        return functional.linear(x, self.stored) if self.transposed else torch.matmul(x, self.stored)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias` for another weight `[out, in]` in W's place (fold)."""
        return functional.linear(x, weight, bias)

    def product(self, x: Tensor, matrix: Tensor, *, transposed: bool) -> Tensor:
        """`x @ matrix.T`, or `x @ matrix` if not transposed, for a dense matrix of the method."""
        return functional.linear(x, matrix) if transposed else torch.matmul(x, matrix)
