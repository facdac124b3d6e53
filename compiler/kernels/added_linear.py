"""A frozen linear and a second product added to it: both are summed into one result, forwards and backwards."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from surgery.compiler.kernels import forms

_library = torch.library.Library("surgery", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "added_linear(Tensor x, Tensor weight, Tensor? bias, Tensor change, Tensor? inside, float scale) -> Tensor"
)
_library.define("summed_products(Tensor rows, Tensor first, Tensor second, float scale) -> Tensor")  # type: ignore[no-untyped-call]


def added_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor, inside: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """`x @ weight.T + bias + scale * inside @ change.T` for x and inside `[..., in]`, weight and change `[out, in]`.

    inside is x where it is None; all are of one dtype. The weight is frozen, and has a
    gradient only where it requires one all the same. The sum is accumulated by the second product itself: it is not
    rounded in between, and no pass over `[..., out]` does nothing but add. The same holds for the gradient to x.
    """
    if forms.needs_definition(weight):
        return added_linear_reference(x, weight, bias, change, inside, scale)
    if dtype := forms.autocast_dtype(x):
        x, weight, change = x.to(dtype), weight.to(dtype), change.to(dtype)
        bias, inside = (None if given is None else given.to(dtype) for given in (bias, inside))
    result: Tensor = torch.ops.surgery.added_linear(x, weight, bias, change, inside, scale)
    return result


def added_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor, inside: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """What `added_linear` is by definition, in plain torch."""
    return functional.linear(x, weight, bias) + scale * functional.linear(x if inside is None else inside, change)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor, inside: Tensor | None, scale: float
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    y.addmm_(rows if inside is None else inside.reshape(rows.shape), change.T, alpha=scale)
    return y.view(*x.shape[:-1], y.shape[1])


def _summed(rows: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """`rows @ first + scale * rows @ second`."""
    return (rows @ first).addmm_(rows, second, alpha=scale)


class _AddedLinear(torch.autograd.Function):
    """`dx = dy @ weight + scale * dy @ change`, of which the second goes to inside where that is not x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor, inside: Tensor | None, scale: float
    ) -> Tensor:
        ctx.apart, ctx.scale = inside is not None, scale
        ctx.save_for_backward(weight, change, x if inside is None else inside)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = torch.ops.surgery.added_linear(x, weight, bias, change, inside, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, change, inside = ctx.saved_tensors
        need_x, _, need_bias, need_change, need_inside, _ = ctx.needs_input_grad
        rows, dx, dinside, dchange = dy.reshape(-1, dy.shape[-1]), None, None, None
        if need_x:
            dx = rows @ weight if ctx.apart else torch.ops.surgery.summed_products(rows, weight, change, ctx.scale)
            dx = dx.view(inside.shape)
        if need_inside:
            dinside = torch.addmm(rows.new_zeros(()), rows, change, beta=0, alpha=ctx.scale).view(inside.shape)
        if need_change:
            inputs = inside.reshape(-1, inside.shape[-1])
            dchange = torch.addmm(rows.new_zeros(()), rows.T, inputs, beta=0, alpha=ctx.scale)
        return dx, None, rows.sum(0) if need_bias else None, dchange, dinside, None


def _differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor, inside: Tensor | None, scale: float
) -> Tensor:
    result: Tensor = _AddedLinear.apply(x, weight, bias, change, inside, scale)  # type: ignore[no-untyped-call]
    return result


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _summed_fake(rows: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    return rows.new_empty(rows.shape[0], first.shape[1])


_library.impl("added_linear", _differentiable, "Autograd")  # type: ignore[no-untyped-call]
_library.impl("added_linear", _forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("summed_products", _summed, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("surgery::added_linear", _fake, lib=_library)
torch.library.register_fake("surgery::summed_products", _summed_fake, lib=_library)


@register_flop_formula(torch.ops.surgery.added_linear)
def _forward_operations(x: Any, weight: Any, *rest: Any, **more: Any) -> int:
    """Two products of one size."""
    return int(4 * prod(x[:-1]) * prod(weight))


@register_flop_formula(torch.ops.surgery.summed_products)
def _backward_operations(rows: Any, first: Any, *rest: Any, **more: Any) -> int:
    """Two products of one size."""
    return int(4 * rows[0] * prod(first))
