"""A matrix from what stands on its diagonals; the gradient is the sums along them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def from_diagonals(entries: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix `[..., rows, columns]` whose entry [i, j] is `entries[..., columns - 1 + i - j]`.

    `entries` `[..., rows + columns - 1]` begin in the upper right corner. Forward is one copy and backward three, where
    torch's own gradient of overlapping views adds entry by entry.
    """
    result: Tensor = _FromDiagonals.apply(entries, rows, columns)  # type: ignore[no-untyped-call]
    return result


def from_diagonals_reference(entries: Tensor, rows: int, columns: int) -> Tensor:
    """What `from_diagonals` is by definition, by indices."""
    row, column = torch.arange(rows, device=entries.device), torch.arange(columns, device=entries.device)
    return entries[..., columns - 1 + row[:, None] - column[None, :]]


class _FromDiagonals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: Tensor, rows: int, columns: int) -> Tensor:
        ctx.sides = rows, columns
        return entries.unfold(-1, columns, 1).flip(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.sides
        # behind rows of zeros, cut one shorter than it is, row i moves by i: the diagonals then stand in columns
        longer = functional.pad(gradient.flip(-1), (0, rows)).flatten(-2)
        apart = longer.narrow(-1, 0, rows * (rows + columns - 1)).view(*longer.shape[:-1], rows, rows + columns - 1)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return apart.sum(-2, dtype=wide).to(gradient.dtype), None, None
