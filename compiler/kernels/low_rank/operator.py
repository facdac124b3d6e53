"""`low_rank_linear` as operations of torch: one for the forward, one for the backward, opaque to torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from surgery.compiler.kernels import forms
from surgery.compiler.kernels.low_rank import choice, plain, product
from surgery.compiler.kernels.low_rank.reference import low_rank_linear_reference

_library = torch.library.Library("surgery", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "low_rank_linear(Tensor x, Tensor? narrow, Tensor[] weights, Tensor?[] biases, Tensor[] lefts, Tensor[] rights, "
    "float[] scales) -> Tensor[]"
)
_library.define(  # type: ignore[no-untyped-call]
    "low_rank_linear_backward(Tensor[] dys, Tensor? source, Tensor? u, Tensor[] weights, Tensor[] lefts, "
    "Tensor[] rights, float[] scales, bool apart, bool[] needed) -> Tensor[]"
)


def low_rank_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lefts: Sequence[Tensor],
    rights: Sequence[Tensor], scales: Sequence[float], narrow: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """`x @ weight.T + bias + scale * (narrow @ right.T) @ left.T` of each of several sites that read one x.

    x and narrow (the dropped-out x; x itself where it is None) are `[..., in]`; the weights `[out, in]` have their
    dtype and are frozen; a left is `[out, rank]`, a right `[rank, in]`, of any floating dtype. The outputs
    `[..., out]` have x's dtype, under autocast its own. What is kept for the backward is narrow, the factors as they
    are and `[rows, sum of ranks]` numbers. A weight that requires a gradient all the same gets it by the definition,
    which is also what transforms of torch.func see.
    """
    if dtype := forms.autocast_dtype(x):
        x, narrow = x.to(dtype), None if narrow is None else narrow.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    if forms.needs_definition(*weights):
        return low_rank_linear_reference(x, weights, biases, lefts, rights, scales, narrow)
    run = torch.ops.surgery.low_rank_linear if _is_watched() else _differentiable
    results: list[Tensor] = run(x, narrow, weights, biases, lefts, rights, scales)
    return results[:-1]


def _is_watched() -> bool:
    """Whether something traces or counts operations, for which this has to be one; else the dispatcher costs time."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _forward(
    x: Tensor, narrow: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """The outputs, and `scale * narrow @ right.T` of all sites, `[rows, sum of ranks]`."""
    rows = x.reshape(-1, x.shape[-1])
    source = rows if narrow is None else narrow.reshape(rows.shape)
    with forms.on_device_of(x):
        form = choice.narrow_product(source, sum(right.shape[0] for right in rights))
        u = form.narrow_product(source, rights, scales)
        tiling = choice.tiling_of_outputs(rows, weights, [left.shape[1] for left in lefts])
        if tiling is None:
            ys = plain.outputs(rows, u, weights, biases, lefts)
        else:
            ys = product.outputs(rows, u, weights, biases, lefts, tiling)
    return [*(y.view(*x.shape[:-1], y.shape[1]) for y in ys), u]


def _backward(
    dys: Sequence[Tensor], source: Tensor | None, u: Tensor | None, weights: Sequence[Tensor],
    lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: Sequence[float], apart: bool, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed ones of the gradients to x, narrow, each bias, each left and each right, in this order.

    `source` is what the rights were multiplied with, and `apart` says that it was not x. It is None where no right
    needs its gradient, as u is where no left does.
    """
    rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    shape = (*dys[0].shape[:-1], weights[0].shape[1])
    need_x, need_narrow, need_biases, need_lefts, need_rights = _unpacked(needed)
    need_du = need_narrow or (need_x and not apart) or any(need_rights)
    gradients: list[Tensor] = []
    du: Tensor | None = None
    dlefts: list[Tensor] = []
    with forms.on_device_of(dys[0]):
        if need_du and u is not None:
            form = choice.narrow_gradients(rows[0], max(left.shape[1] for left in lefts))
            du, dlefts = form.narrow_gradients(rows, u, lefts, scales)
        else:
            du = plain.narrow_gradient(rows, lefts, scales) if need_du else None
            dlefts = plain.left_gradients(rows, u, lefts) if u is not None else []
        if need_x:
            gradients.append(_input_gradient(rows, weights, None if apart else du, rights).view(shape))
        if need_narrow and du is not None:
            gradients.append((du @ plain.joined(rights, rows[0].dtype)).view(shape))
        gradients += [dy.sum(0) for dy, need in zip(rows, need_biases, strict=True) if need]
        gradients += [dleft for dleft, need in zip(dlefts, need_lefts, strict=u is not None) if need]
        if source is not None and du is not None:
            inputs = source.reshape(-1, source.shape[-1])
            drights = choice.right_gradients(inputs, du.shape[1]).right_gradients(du, inputs, rights)
            gradients += [dright for dright, need in zip(drights, need_rights, strict=True) if need]
    return gradients


def _input_gradient(
    dys: Sequence[Tensor], weights: Sequence[Tensor], du: Tensor | None, rights: Sequence[Tensor]
) -> Tensor:
    tiling = choice.tiling_of_input_gradient(dys, weights, 0 if du is None else du.shape[1])
    if tiling is None:
        return plain.input_gradient(dys, weights, du, rights)
    return product.input_gradient(dys, weights, du, rights, tiling)


def _unpacked(needed: Sequence[bool]) -> tuple[bool, bool, Sequence[bool], Sequence[bool], Sequence[bool]]:
    """Which gradients are needed: to x, to narrow, to each bias, each left, each right."""
    count = (len(needed) - 2) // 3
    biases, lefts, rights = (needed[2 + part * count : 2 + (part + 1) * count] for part in range(3))
    return needed[0], needed[1], biases, lefts, rights


def _forward_fake(
    x: Tensor, narrow: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    rows, ranks = prod(x.shape[:-1]), sum(right.shape[0] for right in rights)
    return [*(x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights), x.new_empty(rows, ranks)]


def _backward_fake(
    dys: Sequence[Tensor], source: Tensor | None, u: Tensor | None, weights: Sequence[Tensor],
    lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: Sequence[float], apart: bool, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    need_x, need_narrow, *need = _unpacked(needed)
    inputs = [dys[0].new_empty(*dys[0].shape[:-1], weights[0].shape[1]) for wanted in (need_x, need_narrow) if wanted]
    biases = [dy.new_empty(dy.shape[-1]) for dy in dys]
    parts = (
        like.new_empty(like.shape)
        for group, wanted in zip((biases, lefts, rights), need, strict=True)
        for like, want in zip(group, wanted, strict=True)
        if want
    )
    return [*inputs, *parts]


class _LowRankLinear(torch.autograd.Function):
    """The gradients of `low_rank_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Sequence[Tensor],
        scales: Sequence[float],
        x: Tensor,
        narrow: Tensor | None,
        *parts: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(weights)
        biases = parts[:count]
        lefts, rights = cast(tuple[Tensor, ...], parts[count : 2 * count]), cast(tuple[Tensor, ...], parts[2 * count :])
        with torch._C._AutoDispatchBelowAutograd():
            run = torch.ops.surgery.low_rank_linear if _is_watched() else _forward
            *ys, u = run(x, narrow, weights, biases, lefts, rights, scales)
        ctx.needed = ctx.needs_input_grad[2:]
        ctx.scales, ctx.apart, ctx.count = scales, narrow is not None, count
        _, _, _, need_lefts, need_rights = _unpacked(ctx.needed)
        source = (x if narrow is None else narrow) if any(need_rights) else None
        ctx.save_for_backward(source, u if any(need_lefts) else None, *weights, *lefts, *rights)
        ctx.mark_non_differentiable(u)
        return *ys, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        source, u, *saved = ctx.saved_tensors
        weights, lefts, rights = (saved[start : start + ctx.count] for start in range(0, 3 * ctx.count, ctx.count))
        run = torch.ops.surgery.low_rank_linear_backward if _is_watched() else _backward
        gradients = iter(run(dys[:-1], source, u, weights, lefts, rights, ctx.scales, ctx.apart, ctx.needed))
        return None, None, *(next(gradients) if need else None for need in ctx.needed)


def _differentiable(
    x: Tensor, narrow: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    return [*_LowRankLinear.apply(weights, scales, x, narrow, *biases, *lefts, *rights)]  # type: ignore[no-untyped-call]


_library.impl("low_rank_linear", _differentiable, "Autograd")  # type: ignore[no-untyped-call]
_library.impl("low_rank_linear", _forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("low_rank_linear_backward", _backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("surgery::low_rank_linear", _forward_fake, lib=_library)
torch.library.register_fake("surgery::low_rank_linear_backward", _backward_fake, lib=_library)


@register_flop_formula(torch.ops.surgery.low_rank_linear)
def _forward_flops(
    x: Sequence[int], narrow: Any, weights: Any, biases: Any, lefts: Any, rights: Any, scales: Any, **rest: Any
) -> int:
    return int(2 * prod(x[:-1]) * sum(prod(shape) for shape in (*weights, *lefts, *rights)))


@register_flop_formula(torch.ops.surgery.low_rank_linear_backward)
def _backward_flops(
    dys: Any, source: Any, u: Any, weights: Any, lefts: Any, rights: Any, scales: Any, apart: bool,
    needed: Sequence[bool], **rest: Any,
) -> int:  # fmt: skip
    need_x, need_narrow, _, need_lefts, need_rights = _unpacked(needed)
    through_rights = need_narrow or (need_x and not apart)
    passes = need_x * sum(map(prod, weights)) + through_rights * sum(map(prod, rights))
    passes += (through_rights or any(need_rights)) * sum(map(prod, lefts))
    passes += sum(prod(left) for left, need in zip(lefts, need_lefts, strict=True) if need)
    passes += any(need_rights) * sum(map(prod, rights))
    return int(2 * prod(dys[0][:-1]) * passes)
