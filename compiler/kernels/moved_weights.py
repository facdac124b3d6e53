"""Weights that move by narrow products, all of them at once: what an event does to W at every site.

On a GPU it is one launch over the tiles of all sites (`moved_weights_triton.py`), which reads and writes each weight
once; elsewhere, and for what the kernel does not take, the same sums in plain torch, one weight after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.compiler.kernels import forms
from surgery.compiler.kernels.over_processes import is_spread, local, of_own_rows

Products = tuple[Sequence[Tensor], Sequence[Tensor]]  # left and right factors of all sites


@torch.no_grad()
def add_products(
    targets: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float = 1.0,
    *,
    before: Products | None = None,
    sources: Sequence[Tensor] | None = None,
    transposed: bool = False,
) -> None:
    """`targets[i] = sources[i] + scale * (lefts[i] @ rights[i] - before[0][i] @ before[1][i])` for all i, in place.

    A target is `[..., out, in]`, its factors `[..., out, rank]` and `[..., rank, in]`; `transposed` says that targets
    and sources are stored as `[..., in, out]`. Without `sources` a target is its own, without `before` nothing is
    subtracted. Computed in float32, or in the widest dtype given, and rounded once to the target's dtype. The
    difference is taken of the factors, not of the products: what changed little keeps its digits.

    Targets that are spread over processes by their rows move by the rows that are here; the factors are whole on each
    process, so nothing is sent.
    """
    sources = targets if sources is None else sources
    if any(map(is_spread, targets)):
        if before is not None:
            before = of_own_rows(targets, *before, transposed)
        lefts, rights = of_own_rows(targets, lefts, rights, transposed)
        here = [local(one) for one in targets]
        targets, sources = here, here if sources is targets else [local(one) for one in sources]
    done: Sequence[int] = ()
    if targets and targets[0].is_cuda and forms.HAS_TRITON:
        from surgery.compiler.kernels import moved_weights_triton

        with forms.on_device_of(targets[0]):
            done = moved_weights_triton.add_products(targets, lefts, rights, scale, before, sources, transposed)
    left_out = range(len(targets)) if not done else sorted(set(range(len(targets))) - set(done))
    for i in left_out:
        old = None if before is None else (before[0][i], before[1][i])
        add_product(targets[i], lefts[i], rights[i], scale, old, sources[i], transposed)


def add_product(
    target: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float,
    before: tuple[Tensor, Tensor] | None,
    source: Tensor,
    transposed: bool,
) -> None:
    """One weight of `add_products` in plain torch, on any device, of any dtype and strides."""
    dtype = torch.promote_types(torch.promote_types(target.dtype, left.dtype), torch.float32)
    left, right = left.to(dtype), right.to(dtype)
    if before is not None:
        old_left, old_right = before[0].to(dtype), before[1].to(dtype)
        left = torch.cat([left - old_left, old_left], -1)
        right = torch.cat([right, right - old_right], -2)
    in_place = source is target and target.dtype == dtype and target.dim() <= 3
    if transposed:
        target, source = target.transpose(-1, -2), source.transpose(-1, -2)
    if in_place:  # no second matrix; as a stack, since cuBLASLt refuses a single transposed row
        stack = target if target.dim() == 3 else target.unsqueeze(0)
        stack.baddbmm_(left.expand(len(stack), -1, -1), right.expand(len(stack), -1, -1), alpha=scale)
        return
    target.copy_(torch.add(source.to(dtype), left @ right, alpha=scale))
