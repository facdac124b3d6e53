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

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it; the reference is what runs there
    triton = None

_library = torch.library.Library("surgery", "FRAGMENT")
_library.define("updated_weight(Tensor weight, Tensor left, Tensor right, float scale, str times) -> Tensor")


def updated_weight(weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, times: str = "one") -> Tensor:
    """`weight + scale * times(weight) * (left @ right)` for `[out, in]`, `[out, rank]` and `[rank, in]`.

    `times` is "one", "mask" or "weight". The result has the weight's dtype, rounded once from float32 or what is
    wider. `left` and `right`, of any floating dtype, have gradients; the weight is frozen and has none.
    """
    result: Tensor = torch.ops.surgery.updated_weight(weight, left, right, scale, times)
    return result


def updated_weight_reference(
    weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, times: str = "one"
) -> Tensor:
    """What `updated_weight` is by definition, in plain torch."""
    wide = torch.promote_types(weight.dtype, torch.float32)
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
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if triton and all(tensor.is_cuda and tensor.dtype in floats for tensor in (weight, left, right)):
        return _fused(weight, left, right, scale, times)
    return updated_weight_reference(weight, left, right, scale, times)


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
    """The product of the factors, and one multiplication and addition for each entry."""
    return 2 * weight[0] * weight[1] * (left[1] + 1)


# --- the kernel -------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _update(
        weight, left, right, result, outputs, inputs, rank, scale,
        weight_row, weight_column, left_row, left_column, right_row, right_column, result_row, result_column,
        TIMES: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        """One tile of the result: its piece of the product, and W once."""
        rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        inside = (rows < outputs) & (columns < inputs)
        wide = tl.load(weight + rows * weight_row + columns * weight_column, inside, 0.0).to(tl.float32)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, rank, RANK):
            index = start + tl.arange(0, RANK)
            mask = (rows < outputs) & (index[None, :] < rank)
            a = tl.load(left + rows * left_row + index[None, :] * left_column, mask, 0.0)
            mask = (index[:, None] < rank) & (columns < inputs)
            b = tl.load(right + index[:, None] * right_row + columns * right_column, mask, 0.0)
            if HALF:
                product = tl.dot(a, b, product)
            else:  # tf32 alone rounds the factors to 10 bits; three products of it have what float32 has
                product = tl.dot(a.to(tl.float32), b.to(tl.float32), product, input_precision="tf32x3")
        product *= scale
        if TIMES == "mask":
            product = tl.where(wide != 0, product, 0.0)
        if TIMES == "weight":
            product *= wide
        value = (wide + product).to(result.dtype.element_ty)
        tl.store(result + rows * result_row + columns * result_column, value, inside)


def _fused(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, times: str, rows: int = 64, columns: int = 128,
    warps: int = 4,
) -> Tensor:  # fmt: skip
    """`updated_weight` by the kernel, in tiles of `rows` and `columns`."""
    if weight.stride(0) == 1 and weight.stride(1) != 1:  # neighbours in a tile are to be neighbours in memory
        return _fused(weight.T, right.T, left.T, scale, times, rows, columns, warps).T
    result = torch.empty_like(weight)
    (outputs, inputs), rank = weight.shape, left.shape[1]
    if not weight.numel():
        return result
    strides = (*weight.stride(), *left.stride(), *right.stride(), *result.stride())
    _update[triton.cdiv(inputs, columns), triton.cdiv(outputs, rows)](
        weight, left, right, result, outputs, inputs, rank, scale, *strides,
        TIMES=times, HALF=left.dtype == right.dtype != torch.float32, ROWS=rows, COLUMNS=columns,
        RANK=min(64, max(16, triton.next_power_of_2(rank))), num_warps=warps,
    )  # fmt: skip
    return result
