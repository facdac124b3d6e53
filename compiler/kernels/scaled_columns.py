"""Columns of an activation, each times a number: the product is rounded once, from the dtype of the numbers.

A magnitude near one that is itself rounded to half precision would move in steps of 0.4 %. Backwards, dy and y are read
once for both gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgery.compiler.kernels.updated_weight import has_kernel


def scaled_columns(y: Tensor, scales: Tensor) -> Tensor:
    """`y * scales` in y's dtype, for `[..., n]` and `[n]` of any floating dtypes."""
    if torch.compiler.is_compiling() or not has_kernel(y, scales):  # torch.compile makes it a part of what is around
        return scaled_columns_reference(y, scales)
    result: Tensor = _Scaled.apply(y, scales)  # type: ignore[no-untyped-call]
    return result


def scaled_columns_reference(y: Tensor, scales: Tensor) -> Tensor:
    """What `scaled_columns` is by definition, in plain torch."""
    return (y * scales).to(y.dtype)


class _Scaled(torch.autograd.Function):
    """By the kernels of `scaled_columns_triton.py`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scales: Tensor) -> Tensor:
        from surgery.compiler.kernels.scaled_columns_triton import scaled

        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, scales)
        with torch.cuda.device_of(y):
            return scaled(y, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        from surgery.compiler.kernels.scaled_columns_triton import scaled, scaled_and_sums

        y, scales = ctx.saved_tensors
        with torch.cuda.device_of(dy):
            return (scaled(dy, scales), None) if y is None else scaled_and_sums(dy, y, scales)
