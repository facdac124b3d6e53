"""The norms of the rows of a weight with an update of low rank, from one read of W: the weight itself is not formed.

For V = W + s L R the square of row i's norm is `|W_i|^2 + 2 s L_i . (W R^T)_i + s^2 L_i (R R^T) L_i^T`: what is of V's
size is read where it is W alone. The three terms are summed in float32 or what is wider; where they cancel, the square
is not below zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from surgery.compiler.kernels import forms

WIDEST = 64  # ranks of the kernel, which holds a [rank, rank] matrix in registers
LONGEST = (
    4096  # a program of the kernel walks along whole rows: at 8192 it took 127 us, torch's terms 78; at 2048 33, 54
)

_library = torch.library.Library("surgery", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("updated_row_norms(Tensor weight, Tensor left, Tensor right, float scale) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]


def updated_row_norms(weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """The norms `[out]` of the rows of `weight + scale * left @ right`, of `[out, in]`, `[out, rank]`, `[rank, in]`.

    In float32, or the weight's dtype if that is wider, under autocast too. `left` and `right` have gradients; the
    weight is frozen, and has one only where it requires it all the same.
    """
    if forms.needs_definition(weight):
        return updated_row_norms_reference(weight, left, right, scale)
    norms: Tensor = torch.ops.surgery.updated_row_norms(weight, left, right, scale)[0]
    return norms


def updated_row_norms_reference(weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """What `updated_row_norms` is by definition, in plain torch."""
    wide = forms.wide(weight.dtype)
    with forms.without_autocast(weight):
        update = left.to(wide) @ right.to(wide)
    norms: Tensor = torch.linalg.vector_norm(weight.to(wide) + scale * update, dim=-1)
    return norms


def _forward(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The norms, and `W @ right.T` for the backward."""
    with forms.without_autocast(weight):
        if right.shape[0] > WIDEST or weight.shape[1] > LONGEST or not forms.in_triton(weight, left, right):
            return norms_and_product(weight, left, right, scale)
        from surgery.compiler.kernels.row_norms_triton import norms_and_product as fused

        with forms.on_device_of(weight):
            return fused(weight, left, right, scale)


def norms_and_product(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The norms by their three terms, and `weight @ right.T`, from torch's own operations."""
    wide = forms.wide(weight.dtype)
    left, right = left.to(wide), right.to(wide)
    product = _product(weight, right)
    squares = torch.linalg.vector_norm(weight, dim=-1, dtype=wide).square()
    squares += (left * (2 * scale * product + scale * scale * (left @ (right @ right.T)))).sum(-1)
    return squares.clamp(min=0).sqrt(), product


def _product(weight: Tensor, right: Tensor) -> Tensor:
    """`weight @ right.T` in right's dtype; bfloat16 on a GPU is read as it is, with right in parts of 8 bits."""
    if not (weight.is_cuda and weight.dtype == torch.bfloat16):
        return weight.to(right.dtype) @ right.T
    high = right.to(torch.bfloat16)
    middle = (right - high).to(torch.bfloat16)
    low = (right - high - middle).to(torch.bfloat16)
    products = torch.mm(weight, torch.cat((low, middle, high)).T, out_dtype=torch.float32)
    return products.view(weight.shape[0], 3, -1).sum(1)


class _RowNorms(torch.autograd.Function):
    """`d norm_i = V_i . dV_i / norm_i`; of a row of zeros it is zero."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            norms, product = torch.ops.surgery.updated_row_norms(weight, left, right, scale)
        ctx.scale = scale
        ctx.save_for_backward(weight, left, right, norms, product)
        ctx.mark_non_differentiable(product)
        return norms, product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        weight, left, right, norms, product = ctx.saved_tensors
        _, need_left, need_right, _ = ctx.needs_input_grad
        share = torch.where(norms > 0, ctx.scale * gradient / norms, 0).unsqueeze(-1)
        wide_left, wide_right, dleft, dright = left.to(norms.dtype), right.to(norms.dtype), None, None
        if need_left:
            dleft = share * (product + ctx.scale * (wide_left @ (wide_right @ wide_right.T)))
        if need_right:
            shared = share * wide_left
            dright = _transposed_product(shared, weight) + ctx.scale * ((shared.T @ wide_left) @ wide_right)
        pairs = ((dleft, left), (dright, right))
        return None, *(None if new is None else new.to(factor.dtype) for new, factor in pairs), None


def _transposed_product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows.T @ weight` like rows, for `[out, rank]` and `[out, in]`, multiplied in the dtype of the weight."""
    if weight.dtype != torch.float16 or not rows.numel():
        return (rows.to(weight.dtype).T @ weight).to(rows.dtype)
    largest = rows.abs().amax()  # becomes one: float16 holds no gradient of 1e-8, and none under a scaled loss
    unit = torch.where(largest > 0, largest, 1)
    return ((rows / unit).to(weight.dtype).T @ weight).to(rows.dtype) * unit


def _differentiable(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _RowNorms.apply(weight, left, right, scale)  # type: ignore[no-untyped-call]
    return result


def _fake(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    norms = weight.new_empty(weight.shape[0], dtype=forms.wide(weight.dtype))
    return norms, norms.new_empty(weight.shape[0], right.shape[0])


_library.impl("updated_row_norms", _differentiable, "Autograd")  # type: ignore[no-untyped-call]
_library.impl("updated_row_norms", _forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("surgery::updated_row_norms", _fake, lib=_library)


@register_flop_formula(torch.ops.surgery.updated_row_norms)
def _operations(weight: Sequence[int], left: Any, right: Sequence[int], *rest: Any, **more: Any) -> int:
    """The product with W; what is of the factors alone is small."""
    return 2 * weight[0] * weight[1] * right[0]
