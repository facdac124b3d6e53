"""What a site reads where that is no `[..., in]` of numbers: token ids, which stand for one-hot rows, and images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from surgery.compiler.algebra.structures import Tensor


class Input(ABC):
    """An x whose rows are never formed: the products with it are operations of their own, and give rows `[..., n]`.

    Plain torch on what it holds, so that on `torch.fx.Proxy` it records nodes.
    """

    @abstractmethod
    def base(self, stored: Tensor, bias: Tensor | None) -> Tensor:
        """Rows `x @ W.T + bias` for a weight as the site's own operation takes it."""

    @abstractmethod
    def product(self, matrix: Tensor) -> Tensor:
        """Rows `x @ matrix.T` for a dense matrix `[n, in]`."""

    @abstractmethod
    def ones(self) -> Tensor:
        """`[in]` ones of the rows' dtype."""

    @abstractmethod
    def dropout(self, share: float, training: Tensor | bool) -> Input:
        """The input with a share of it dropped and the rest scaled up."""

    @abstractmethod
    def detach(self) -> Input:
        """The input without gradient."""

    def dense(self) -> Tensor:
        """The rows themselves, `[..., in]`, for what is not a product with a matrix."""
        return self.product(torch.diag_embed(self.ones()))


@dataclass(frozen=True)
class Tokens(Input):
    """Ids `[...]` as one-hot rows `[..., vocabulary]`; dropping a row's one drops all that the token contributes."""

    ids: Tensor
    vocabulary: int
    dtype: torch.dtype
    kept: Tensor | None = None  # [..., 1]: by how much dropout scaled each row

    def base(self, stored: Tensor, bias: Tensor | None) -> Tensor:
        found = functional.embedding(self.ids, stored)
        return found if self.kept is None else found * self.kept

    def product(self, matrix: Tensor) -> Tensor:
        return self.base(matrix.transpose(-1, -2), None)

    def ones(self) -> Tensor:
        return self.ids.new_ones(self.vocabulary, dtype=self.dtype)

    def dropout(self, share: float, training: Tensor | bool) -> Tokens:
        ones = torch.ones_like(self.ids, dtype=self.dtype)
        kept = functional.dropout(ones, share, training).unsqueeze(-1)
        return replace(self, kept=kept if self.kept is None else self.kept * kept)

    def detach(self) -> Tokens:
        return self


@dataclass(frozen=True)
class Image(Input):
    """An image `[..., channels, height, width]`, whose rows are its patches `[..., height, width, in]`."""

    pixels: Tensor
    size: int  # channels * kernel height * kernel width
    kernel: tuple[int, int]
    stride: int | tuple[int, ...]
    padding: int | tuple[int, ...] | str
    dilation: int | tuple[int, ...]

    def base(self, stored: Tensor, bias: Tensor | None) -> Tensor:
        found = functional.conv2d(self.pixels, stored, bias, self.stride, self.padding, self.dilation)
        return found.movedim(-3, -1)

    def product(self, matrix: Tensor) -> Tensor:
        return self.base(matrix.unflatten(1, (-1, *self.kernel)), None)

    def ones(self) -> Tensor:
        return self.pixels.new_ones(self.size)

    def dropout(self, share: float, training: Tensor | bool) -> Image:
        return replace(self, pixels=functional.dropout(self.pixels, share, training))

    def detach(self) -> Image:
        return replace(self, pixels=self.pixels.detach())
