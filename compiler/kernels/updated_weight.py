"""A weight with an update of low rank, taken entry by entry under the weight itself: one read of W, one write.

`W + scale * times(W) * (left @ right)`, where times(W) is 1, the mask of W's entries that are not zero (LoRS,
arXiv:2501.08582) or W itself (HiRA, openreview:TwJrTz9cRS). Of torch's operations it takes some six passes over
`[out, in]`, and a matrix for the product of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from surgery.compiler.kernels import forms

_library = torch.library.Library("surgery", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("updated_weight(Tensor weight, Tensor left, Tensor right, float scale, str times) -> Tensor")  # type: ignore[no-untyped-call]


def updated_weight(weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, times: str = "one") -> Tensor:
    """`weight + scale * times(weight) * (left @ right)` for `[out, in]`, `[out, rank]` and `[rank, in]`.

    `times` is "one", "mask" or "weight". The result has the weight's dtype, rounded once from float32 or what is
    wider, under autocast too. `left` and `right`, of any floating dtype, have gradients; the weight is frozen, and has
    one only where it requires it all the same.
    """
    # in torch.compile, where there is no kernel, what stands behind the product becomes one pass
    fuses = torch.compiler.is_compiling() and not forms.in_triton(weight, left, right)
    if fuses or forms.needs_definition(weight):
        return updated_weight_reference(weight, left, right, scale, times)
    result: Tensor = torch.ops.surgery.updated_weight(weight, left, right, scale, times)
    return result


def updated_weight_reference(
    weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, times: str = "one"
) -> Tensor:
    """What `updated_weight` is by definition, in plain torch."""
    wide = forms.wide(weight.dtype)
    with forms.without_autocast(weight):
        update = scale * (left.to(wide) @ right.to(wide))
    return (weight.to(wide) + _under(weight.to(wide), times, update)).to(weight.dtype)


def _under(weight: Tensor, times: str, update: Tensor) -> Tensor:
    """`times(weight) * update`; under a mask a zero of W stays one even where the update is not finite."""
    match times:
        case "mask":
            return torch.where(weight != 0, update, 0)
        case "weight":
            return weight * update
    return update


def _forward(weight: Tensor, left: Tensor, right: Tensor, scale: float, times: str) -> Tensor:
    if forms.in_triton(weight, left, right):
        from surgery.compiler.kernels.updated_weight_triton import updated_weight as fused

        with forms.on_device_of(weight):
            return fused(weight, left, right, scale, times)
    with forms.without_autocast(weight):
        return in_place(weight, left, right, scale, times)


def in_place(weight: Tensor, left: Tensor, right: Tensor, scale: float, times: str) -> Tensor:
    """The numbers of the reference with one matrix beside the result, in the fewest passes of torch's operations."""
    wide = forms.wide(weight.dtype)
    update = (left.to(wide) * scale) @ right.to(wide)
    if times == "weight":
        update.mul_(weight)
    result = torch.add(weight, update, out=torch.empty_like(weight))
    return result.masked_fill_(weight == 0, 0) if times == "mask" else result


class _UpdatedWeight(torch.autograd.Function):
    """Of `left` the gradient is `H @ right.T` and of `right` `left.T @ H`, for H = scale * times(W) * dW'."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, right: Tensor, scale: float, times: str) -> Tensor:
        ctx.scale, ctx.times = scale, times
        ctx.save_for_backward(weight, left, right)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = torch.ops.surgery.updated_weight(weight, left, right, scale, times)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, left, right = ctx.saved_tensors
        _, need_left, need_right, _, _ = ctx.needs_input_grad
        under, dleft, dright = _under(weight, ctx.times, gradient), None, None
        if need_left:
            dleft = (under @ right.to(under.dtype).T * ctx.scale).to(left.dtype)
        if need_right:
            dright = (left.to(under.dtype).T @ under * ctx.scale).to(right.dtype)
        return None, dleft, dright, None, None


def _differentiable(weight: Tensor, left: Tensor, right: Tensor, scale: float, times: str) -> Tensor:
    result: Tensor = _UpdatedWeight.apply(weight, left, right, scale, times)  # type: ignore[no-untyped-call]
    return result


_library.impl("updated_weight", _differentiable, "Autograd")  # type: ignore[no-untyped-call]
_library.impl("updated_weight", _forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("surgery::updated_weight", lambda weight, *rest: torch.empty_like(weight), lib=_library)


@register_flop_formula(torch.ops.surgery.updated_weight)
def _operations(weight: Sequence[int], left: Sequence[int], *rest: Any, **more: Any) -> int:
    """The product of the factors."""
    return 2 * weight[0] * weight[1] * left[1]
