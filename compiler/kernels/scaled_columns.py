"""Columns of an activation, each times a number: the product is rounded once, from the dtype of the numbers.

A magnitude near one that is itself rounded to bfloat16 moves in steps of 0.4 % below one and 0.8 % above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgery.compiler.kernels import forms


def scaled_columns(y: Tensor, scales: Tensor) -> Tensor:
    """`y * scales` in y's dtype, for `[..., n]` and `[n]` of any floating dtypes."""
    if torch.compiler.is_compiling():  # torch.compile makes it a part of what is around
        return scaled_columns_reference(y, scales)
    result: Tensor = _Scaled.apply(y, scales)  # type: ignore[no-untyped-call]
    return result


def scaled_columns_reference(y: Tensor, scales: Tensor) -> Tensor:
    """What `scaled_columns` is by definition, in plain torch."""
    return (y * scales).to(y.dtype)


def scaled(y: Tensor, scales: Tensor) -> Tensor:
    """`y * scales` like y, in one pass of torch's product."""
    return torch.mul(y, scales, out=torch.empty_like(y))


def scaled_and_sums(dy: Tensor, y: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`dy * scales` like dy, and the sums of `dy * y` over all rows like `scales`."""
    wide = forms.wide(y.dtype)
    return scaled(dy, scales), (dy * y).flatten(0, -2).sum(0, dtype=wide).to(scales.dtype)


class _Scaled(torch.autograd.Function):
    """By torch's operations, or the kernels of `scaled_columns_triton.py`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, scales)
        with forms.on_device_of(y):
            return _forms(y, scales)[0](y, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, scales = ctx.saved_tensors
        one, both = _forms(dy, scales)
        with forms.on_device_of(dy):
            return (one(dy, scales), None) if y is None else both(dy, y, scales)


def _forms(y: Tensor, scales: Tensor) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    if forms.in_triton(y, scales):
        from surgery.compiler.kernels import scaled_columns_triton as kernels

        return kernels.scaled, kernels.scaled_and_sums
    return scaled, scaled_and_sums
