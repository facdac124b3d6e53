"""A product with a weight that is built where it is needed and never kept, and whose gradient is never formed.

For a weight `W'` whose gradient reaches the method through a product `left @ right` alone (LoRS, arXiv:2501.08582:
"weight recompute" and "computational-graph rearrangement").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from surgery.compiler.kernels import forms
from surgery.compiler.kernels.factor_gradients import factor_gradients

Build = Callable[..., Tensor]


def rebuilt_linear(
    build: Build, x: Tensor, bias: Tensor | None, left: Tensor | None, right: Tensor | None, *operands: Tensor
) -> Tensor:
    """`x @ build(*operands).T + bias` for x `[..., in]`; the backward builds the weight `[out, in]` a second time.

    No gradient goes through `build`. `left` `[out, rank]` and `right` `[rank, in]` get that of a weight `left @ right`,
    as `(dy.T @ (x @ right.T))` and `((dy @ left).T @ x)`: no `[out, in]` gradient is formed. They are None where
    nothing is trained. What is kept is x, `left`, `right` and the operands, which are the caller's own.
    """
    # detached: an operand may be `left` itself, and torch.compile takes no tensor twice
    inputs = (x, bias, left, right, *(operand.detach() for operand in operands))
    result: Tensor = _Rebuilt.apply(build, *inputs)  # type: ignore[no-untyped-call]
    return result


def rebuilt_linear_reference(
    build: Build, x: Tensor, bias: Tensor | None, left: Tensor | None, right: Tensor | None, *operands: Tensor
) -> Tensor:
    """What `rebuilt_linear` is by definition, in plain torch: it forms and keeps everything."""
    weight = build(*(operand.detach() for operand in operands))
    if left is not None and right is not None:
        product = left @ right
        weight = weight + (product - product.detach())
    return functional.linear(x, weight, bias)


class _Rebuilt(torch.autograd.Function):
    """Forward and backward of `rebuilt_linear`."""

    @staticmethod
    def forward(
        ctx: Any, build: Build, x: Tensor, bias: Tensor | None, left: Tensor | None, right: Tensor | None,
        *operands: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.build = build
        ctx.save_for_backward(x, left, right, *operands)
        return functional.linear(x, _built(build, operands, x), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, left, right, *operands = ctx.saved_tensors
        need_x, need_bias, need_left, need_right = ctx.needs_input_grad[1:5]
        dx = dbias = dleft = dright = None
        if need_x:
            dx = (dy @ _built(ctx.build, operands, x).to(dy.dtype)).to(x.dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        if need_bias:
            dbias = rows.sum(0)
        if need_left or need_right:
            inputs = x.reshape(-1, x.shape[-1]).to(dy.dtype)  # autocast runs the product below x's dtype
            factors = iter(factor_gradients(rows, inputs, left, right, need_left, need_right))
            dleft, dright = (next(factors) if need else None for need in (need_left, need_right))
        return None, dx, dbias, dleft, dright, *([None] * len(operands))


def _built(build: Build, operands: Any, x: Tensor) -> Tensor:
    """The weight; its algebra keeps its own dtypes under autocast, and so is the same in both directions."""
    with forms.without_autocast(x):
        return build(*operands)
