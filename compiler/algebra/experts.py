"""Stacks of experts `[experts, out, in]`: rows sorted by expert, products in groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.expression import Shape
from surgery.compiler.algebra.inputs import Input
from surgery.compiler.algebra.structures import Tensor


@dataclass(frozen=True)
class Experts(Base):
    """A stack of matrices, each for its own rows of x `[rows, in]`; `transposed`: stored as `[experts, in, out]`.

    `ends` `[experts]` says where each expert's rows end, `grouped(x, matrices, ends)` is the model's own product.
    """

    ends: Tensor
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor]
    is_matrix = False

    def base_linear(self, x: Tensor | Input, bias: Tensor | None = None) -> Tensor:
        y = self.grouped(x, self.stored if self.transposed else self.stored.transpose(-1, -2), self.ends)
        return y if bias is None else y + bias

    def base_linear_transposed(self, x: Tensor | Input) -> Tensor:
        return self.grouped(x, self.stored.transpose(-1, -2) if self.transposed else self.stored, self.ends)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self.grouped(x, weight.transpose(-1, -2), self.ends)
        return y if bias is None else y + bias

    def product(
        self, x: Tensor | Input, matrix: Tensor, *, transposed: bool, stack: tuple[int, int] | None = None
    ) -> Tensor:
        if stack is None:
            return super().product(x, matrix, transposed=transposed)
        assert not isinstance(x, Input)
        turned = matrix.transpose(-1, -2) if transposed else matrix
        if self.grouped is not torch.ops.aten._grouped_mm.default:
            return self.grouped(x, turned, self.ends)
        # torch's kernel takes rows of whole 16 bytes only: narrow sides are filled up with zeros
        step = 16 // self.dtype.itemsize
        inner, outer = (-size % step for size in stack)
        if inner:
            x = functional.pad(x, (0, inner))
        if inner or outer:
            turned = functional.pad(turned, (0, outer, 0, inner))
        y = self.grouped(x, turned, self.ends)
        return y[:, : stack[1]] if outer else y

    def per_row(self, x: Tensor, value: Tensor, shape: Shape) -> Tensor:
        numbers = torch.ones_like(x[:, 0], dtype=torch.int32).cumsum(0, dtype=torch.int32)  # row i is number i + 1
        entries = value.flatten(1) if shape else value.unsqueeze(-1)  # [experts, n]
        return entries[torch.searchsorted(self.ends, numbers)]
