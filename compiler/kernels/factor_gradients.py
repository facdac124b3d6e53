"""The gradients of two factors whose product is a weight, from the rows on its sides: no `[out, in]` is formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from surgery.compiler.kernels import forms
from surgery.compiler.kernels.low_rank import choice, plain

_library = torch.library.Library("surgery", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "factor_gradients(Tensor dy, Tensor x, Tensor left, Tensor right, bool need_left, bool need_right) -> Tensor[]"
)


def factor_gradients(
    dy: Tensor, x: Tensor, left: Tensor, right: Tensor, need_left: bool = True, need_right: bool = True
) -> list[Tensor]:
    """`dy.T @ (x @ right.T)` like `left` `[out, rank]`, then `(dy @ left).T @ x` like `right` `[rank, in]`.

    dy is `[rows, out]` and x `[rows, in]`, of one dtype. It is one operation that torch.compile looks no further into;
    on a GPU it reads x, dy and x again. Only the gradients that are needed are there.
    """
    gradients: list[Tensor] = torch.ops.surgery.factor_gradients(dy, x, left, right, need_left, need_right)
    return gradients


def _forward(dy: Tensor, x: Tensor, left: Tensor, right: Tensor, need_left: bool, need_right: bool) -> list[Tensor]:
    rank, lefts = right.shape[0], []
    with forms.on_device_of(x):
        u = choice.narrow_product(x, rank).narrow_product(x, [right], [1.0]) if need_left else None
        if not need_right:
            return plain.left_gradients([dy], u, [left]) if u is not None else []
        if u is None:
            du = choice.narrow_product(dy, rank).narrow_product(dy, [left.T], [1.0])
        else:
            du, lefts = choice.narrow_gradients(dy, rank).narrow_gradients([dy], u, [left], [1.0])
        return [*lefts, *choice.right_gradients(x, rank).right_gradients(du, x, [right])]


def _fake(dy: Tensor, x: Tensor, left: Tensor, right: Tensor, need_left: bool, need_right: bool) -> list[Tensor]:
    return [factor.new_empty(factor.shape) for factor, need in ((left, need_left), (right, need_right)) if need]


_library.impl("factor_gradients", _forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("surgery::factor_gradients", _fake, lib=_library)


@register_flop_formula(torch.ops.surgery.factor_gradients)
def _operations(dy: Any, x: Any, left: Any, right: Any, need_left: bool, need_right: bool, **rest: Any) -> int:
    """A product with x and one with dy for each."""
    return int(2 * dy[0] * right[0] * (dy[1] + x[1]) * (need_left + need_right))
