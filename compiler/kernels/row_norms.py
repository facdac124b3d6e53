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

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it; the plain form is what runs there
    triton = None

WIDEST = 64  # ranks of the kernel, which holds a [rank, rank] matrix in registers

_library = torch.library.Library("surgery", "FRAGMENT")
_library.define("updated_row_norms(Tensor weight, Tensor left, Tensor right, float scale) -> (Tensor, Tensor)")


def updated_row_norms(weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """The norms `[out]` of the rows of `weight + scale * left @ right`, of `[out, in]`, `[out, rank]`, `[rank, in]`.

    In float32, or the weight's dtype if that is wider. `left` and `right` have gradients; the weight is frozen and has
    none.
    """
    norms: Tensor = torch.ops.surgery.updated_row_norms(weight, left, right, scale)[0]
    return norms


def updated_row_norms_reference(weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """What `updated_row_norms` is by definition, in plain torch."""
    wide = _wide(weight)
    return torch.linalg.vector_norm(weight.to(wide) + scale * (left.to(wide) @ right.to(wide)), dim=-1)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _forward(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The norms, and `W @ right.T` for the backward."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    fits = right.shape[0] <= WIDEST and all(one.is_cuda and one.dtype in floats for one in (weight, left, right))
    return (_fused if triton and fits else _plain)(weight, left, right, scale)


def _plain(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = _wide(weight)
    left, right = left.to(wide), right.to(wide)
    product = weight.to(wide) @ right.T
    squares = torch.linalg.vector_norm(weight, dim=-1, dtype=wide).square()
    squares += (left * (2 * scale * product + scale * scale * (left @ (right @ right.T)))).sum(-1)
    return squares.clamp(min=0).sqrt(), product


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
            through_weight = (shared.to(weight.dtype).T @ weight).to(norms.dtype)
            dright = through_weight + ctx.scale * ((shared.T @ wide_left) @ wide_right)
        return None, *(None if new is None else new.to(left.dtype) for new in (dleft, dright)), None


def _differentiable(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _RowNorms.apply(weight, left, right, scale)  # type: ignore[no-untyped-call]
    return result


def _fake(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    norms = weight.new_empty(weight.shape[0], dtype=_wide(weight))
    return norms, norms.new_empty(weight.shape[0], right.shape[0])


_library.impl("updated_row_norms", _differentiable, "Autograd")  # type: ignore[no-untyped-call]
_library.impl("updated_row_norms", _forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("surgery::updated_row_norms", _fake, lib=_library)


@register_flop_formula(torch.ops.surgery.updated_row_norms)
def _operations(weight: Sequence[int], left: Any, right: Sequence[int], *rest: Any, **more: Any) -> int:
    """The product with W and its squares; what is of the factors alone is small."""
    return 2 * weight[0] * weight[1] * (right[0] + 1)


# --- the kernel -------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _norms(
        weight, left, right, norms, products, outputs, inputs, rank, scale,
        weight_row, weight_column, left_row, left_column, right_row, right_column,
        HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        """A block of rows: `W @ right.T`, the squares of W and `right @ right.T` along one walk over the columns."""
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        index = tl.arange(0, RANK)
        product = tl.zeros((ROWS, RANK), tl.float32)
        inner = tl.zeros((RANK, RANK), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, inputs, COLUMNS):
            columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
            mask = (rows < outputs)[:, None] & (columns < inputs)[None, :]
            w = tl.load(weight + rows[:, None] * weight_row + columns[None, :] * weight_column, mask, 0.0)
            mask = (index < rank)[:, None] & (columns < inputs)[None, :]
            r = tl.load(right + index[:, None] * right_row + columns[None, :] * right_column, mask, 0.0)
            wide = w.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            if HALF:
                product = tl.dot(w, tl.trans(r), product)
                inner = tl.dot(r, tl.trans(r), inner)
            else:  # three products in tf32 have what one in float32 has
                r = r.to(tl.float32)
                product = tl.dot(wide, tl.trans(r), product, input_precision="tf32x3")
                inner = tl.dot(r, tl.trans(r), inner, input_precision="tf32x3")
        mask = (rows < outputs)[:, None] & (index < rank)[None, :]
        tl.store(products + rows[:, None] * rank + index[None, :], product, mask)
        factor = tl.load(left + rows[:, None] * left_row + index[None, :] * left_column, mask, 0.0).to(tl.float32)
        turned = tl.dot(factor, inner, input_precision="tf32x3")
        squares += tl.sum(factor * (2 * scale * product + scale * scale * turned), 1)
        tl.store(norms + rows, tl.sqrt(tl.maximum(squares, 0.0)), rows < outputs)


def _fused(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, rows: int = 16, columns: int = 256, warps: int = 4,
    stages: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `_plain` gives, by the kernel."""
    (outputs, inputs), rank = weight.shape, right.shape[0]
    norms = weight.new_empty(outputs, dtype=torch.float32)
    products = norms.new_empty(outputs, rank)
    if outputs:
        _norms[triton.cdiv(outputs, rows),](
            weight, left, right, norms, products, outputs, inputs, rank, scale,
            *weight.stride(), *left.stride(), *right.stride(),
            HALF=weight.dtype == right.dtype != torch.float32, ROWS=rows, COLUMNS=columns,
            RANK=max(16, triton.next_power_of_2(rank)), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return norms, products
