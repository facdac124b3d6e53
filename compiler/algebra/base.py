"""How a site's weight is stored and meets its input: the one place through which W and `x @ W.T` are reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from surgery.compiler.algebra.expression import Shape
from surgery.compiler.algebra.inputs import Image, Input, Tokens
from surgery.compiler.algebra.recorder import called
from surgery.compiler.algebra.structures import Tensor
from surgery.compiler.kernels.quantized_linear import dequantized, quantized_linear
from surgery.compiler.plan import Site


def logical(stored: Tensor, site: Site) -> Tensor:
    """A site's stored weight as W `[out, in]`, behind a leading `[experts]` where it is a stack of them."""
    match site.module_class:
        case "Conv2d":
            return stored.flatten(1)
        case "Norm":
            return torch.diag_embed(stored)
    return stored.transpose(-1, -2) if site.transposed else stored


def scale_of(parameter: str) -> str:
    """The name of the scales of a parameter that is kept in few bits."""
    return f"{parameter}_scale"


def dense(site: Site, weights: Mapping[str, Tensor]) -> Tensor:
    """A site's weight as it is stored; what its codes stand for, in the site's dtype, where it is kept in few bits."""
    held = weights[site.parameter].detach()
    if not site.quantized:
        return held
    matrix = dequantized(held, weights[scale_of(site.parameter)].detach(), getattr(torch, site.dtype))
    return stored_like(matrix, site)


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


def stacked(site: Site) -> frozenset[str]:
    """The names, W among them, of what has a leading axis for a site's experts: all that is the site's own."""
    if site.experts is None:
        return frozenset()
    return frozenset({"W", *(tensor.name for tensor in site.tensors if not tensor.key.startswith("shared."))})


@dataclass(frozen=True)
class Base:
    """The frozen weight of a site, the one place through which W and `x @ W.T` are reached: a plain matrix.

    The algebra works on rows `[..., n]`: `input` says what a site's x is to it, `output` gives rows back as the model
    expects them. Subclasses are the other kinds of weights; none of them is known to what calls these methods.
    """

    stored: Tensor
    transposed: bool  # stored as [in, out], as Conv1D does
    dtype: torch.dtype
    is_matrix: ClassVar[bool] = True
    """Whether `linear` is `x @ weight.T + bias` for a 2-D weight and any x `[..., in]`."""

    def input(self, x: Tensor) -> Tensor | Input:
        """What the algebra calls x: rows `[..., in]`, or an `Input` that stands for them."""
        return x

    def output(self, rows: Tensor) -> Tensor:
        """Rows `[..., out]` in the layout of the site's own output."""
        return rows

    def base_weight(self) -> Tensor:
        """W as `[..., out, in]`."""
        return self.stored.transpose(-1, -2) if self.transposed else self.stored

    def base_linear(self, x: Tensor | Input, bias: Tensor | None = None) -> Tensor:
        """Rows `x @ W.T + bias`; a transposed one with a bias takes x as `[rows, in]`, as Conv1D does."""
        if isinstance(x, Input):
            return x.base(self.stored, bias)
        if not self.transposed:
            return functional.linear(x, self.stored, bias)
        return torch.matmul(x, self.stored) if bias is None else torch.addmm(bias, x, self.stored)

    def base_linear_transposed(self, x: Tensor | Input) -> Tensor:
        """Rows `x @ W`."""
        if isinstance(x, Input):
            return x.product(self.base_weight().transpose(-1, -2))
        return functional.linear(x, self.stored) if self.transposed else torch.matmul(x, self.stored)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The site's own operation on its own x with another weight `[..., out, in]` in W's place (fold)."""
        return functional.linear(x, weight, bias)

    def product(
        self, x: Tensor | Input, matrix: Tensor, *, transposed: bool, stack: tuple[int, int] | None = None
    ) -> Tensor:
        """Rows `x @ matrix.T`, or `x @ matrix` if not transposed, for a dense matrix of the method.

        `stack` is for one that has a leading axis for the experts, as W has: how many columns x and the result have.
        """
        if isinstance(x, Input):
            return x.product(matrix if transposed else matrix.transpose(-1, -2))
        return functional.linear(x, matrix) if transposed else torch.matmul(x, matrix)

    def per_row(self, x: Tensor, value: Tensor, shape: Shape) -> Tensor:
        """A number or vector of every expert, of `shape` without their axis, as entries for the rows of x."""
        return value


@dataclass(frozen=True)
class Quantized(Base):
    """A matrix `[out, in]` in few bits, `stored` in codes, which is dequantized for a product and never kept."""

    scale: Tensor
    is_matrix: ClassVar[bool] = False

    def base_weight(self) -> Tensor:
        return dequantized(self.stored, self.scale, self.dtype)

    def base_linear(self, x: Tensor | Input, bias: Tensor | None = None) -> Tensor:
        return called(quantized_linear, x, self.stored, self.scale, *([] if bias is None else [bias]))

    def base_linear_transposed(self, x: Tensor | Input) -> Tensor:
        return called(quantized_linear, x, self.stored, self.scale, transposed=True)


@dataclass(frozen=True)
class Lookup(Base):
    """An embedding, stored as `[vocabulary, width]`: x is one-hot, so in = vocabulary and out = width."""

    vocabulary: int
    is_matrix = False

    def input(self, x: Tensor) -> Input:
        return Tokens(x, self.vocabulary, self.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.embedding(x, weight.transpose(-1, -2))


@dataclass(frozen=True)
class Convolution(Base):
    """A Conv2d without groups: W is its kernel as `[out, channels * height * width]`, x the image's patches."""

    channels: int
    kernel: tuple[int, int]
    stride: int | tuple[int, ...]
    padding: int | tuple[int, ...] | str
    dilation: int | tuple[int, ...]
    is_matrix = False

    def input(self, x: Tensor) -> Input:
        size = self.channels * self.kernel[0] * self.kernel[1]
        return Image(x, size, self.kernel, self.stride, self.padding, self.dilation)

    def output(self, rows: Tensor) -> Tensor:
        return rows.movedim(-1, -3)

    def base_weight(self) -> Tensor:
        return self.stored.flatten(1)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernel = weight.unflatten(1, (-1, *self.kernel))
        return functional.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class Diagonal(Base):
    """The vector of a norm: W is its diagonal matrix, x the normalised input."""

    is_matrix = False

    def base_weight(self) -> Tensor:
        return torch.diag_embed(self.stored)

    def base_linear(self, x: Tensor | Input, bias: Tensor | None = None) -> Tensor:
        y = x * self.stored
        return y if bias is None else y + bias

    def base_linear_transposed(self, x: Tensor | Input) -> Tensor:
        return x * self.stored

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x * torch.diagonal(weight, dim1=-2, dim2=-1)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class Output(Base):
    """A module without a weight of its own: what the method reads is its output y."""

    is_matrix = False

    def base_linear(self, x: Tensor | Input, bias: Tensor | None = None) -> Tensor:
        return x


KINDS: dict[str, type[Base]] = {"Embedding": Lookup, "Conv2d": Convolution, "Norm": Diagonal, "Module": Output}
"""What W is of a site, by the class of its module; of all others it is a plain matrix, or a stack of such."""
