"""The cross entropy of a language model without its logits: they are made and used up by chunks of rows.

The logits of a step, [rows, vocabulary], are often its largest tensors: in the head's dtype, in float32 and as a
gradient at once. Here a chunk's gradient follows its loss right away, so that what is kept is the gradient of the
head's input, which is as large as that input, and of what is trained in the head itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from surgery.compiler.kernels import forms

Head = Callable[[dict[str, Tensor], Tensor], Tensor]
IGNORED = -100  # the target of a row that has none


def chunked_loss(
    head: Head, weights: Mapping[str, Tensor], hidden: Tensor, targets: Tensor, count: Tensor, rows: int
) -> Tensor:
    """The summed cross entropy of `head(weights, hidden)` divided by `count`, 0-d in float32 or wider.

    `hidden` [..., width] are the head's inputs, `targets` [...] whole numbers, -100 where there is none. The head maps
    each row on its own, and no more than `rows` of them at a time; of `weights` those that require a gradient get it,
    summed over the chunks in float32 or wider.
    """
    result: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        head, tuple(weights), rows, torch.is_grad_enabled(), targets, count, hidden, *weights.values()
    )
    return result


def chunked_loss_reference(
    head: Head, weights: Mapping[str, Tensor], hidden: Tensor, targets: Tensor, count: Tensor
) -> Tensor:
    """What `chunked_loss` is by definition, on whole logits."""
    logits = head(dict(weights), hidden.flatten(0, -2))
    logits = logits.to(forms.wide(logits.dtype))
    return functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum") / count


class _Chunked(torch.autograd.Function):
    """Forward and backward of `chunked_loss`; the forward has done the work of both."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, names: tuple[str, ...], most: int, graded: bool, targets: Tensor, count: Tensor,
        hidden: Tensor, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        needs = [graded and tensor.requires_grad for tensor in (hidden, *weights)]
        own = [weight.detach().requires_grad_(need) for weight, need in zip(weights, needs[1:], strict=True)]
        inputs, wanted = hidden.detach().flatten(0, -2), targets.flatten()
        # Gradients are those of the sum over the fraction of `count`; its power of two is left to the backward, which
        # is exact there: each number is rounded as often as in the plain form, and none underflows before it is scaled.
        fraction, exponent = torch.frexp(count.double())
        sums = [torch.zeros_like(tensor, dtype=forms.wide(tensor.dtype)) for tensor in own if tensor.requires_grad]
        kept = [torch.zeros_like(inputs)] if needs[0] else []
        total = torch.zeros((), dtype=forms.wide(hidden.dtype), device=hidden.device)
        length = inputs.shape[0]
        chunks = max(1, forms.ceil_div(length, most))
        step = max(1, forms.ceil_div(length, chunks))  # chunks of one size, but for the last
        for start in range(0, length, step):
            chunk = slice(start, start + step)
            part = inputs[chunk].requires_grad_(needs[0])
            into = [*(whole[chunk] for whole in kept), *sums]
            total += _chunk(head, dict(zip(names, own, strict=True)), part, wanted[chunk], fraction.reciprocal(), into)
        ctx.shape = hidden.shape
        ctx.needed = [(need, tensor.dtype) for need, tensor in zip(needs, (hidden, *weights), strict=True)]
        ctx.save_for_backward(exponent, *kept, *sums)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, share: Tensor) -> tuple[Any, ...]:
        exponent, *found = ctx.saved_tensors
        factor = torch.ldexp(share.double(), -exponent)
        kept = iter(found)
        gradients = [_scaled(next(kept), factor, dtype) if need else None for need, dtype in ctx.needed]
        if gradients[0] is not None:
            gradients[0] = gradients[0].view(ctx.shape)
        return *[None] * 6, *gradients


def _chunk(
    head: Head, weights: dict[str, Tensor], rows: Tensor, targets: Tensor, factor: Tensor, into: list[Tensor]
) -> Tensor:
    """The loss of rows; adds the gradients to those, and to the weights, that require one. No logits outlive it."""
    of = [tensor for tensor in (rows, *weights.values()) if tensor.requires_grad]
    with torch.set_grad_enabled(bool(of)):
        logits = head(weights, rows)
    loss, gradient = loss_and_gradient(logits.detach(), targets, factor)
    if of:
        for whole, share in zip(into, torch.autograd.grad(logits, of, gradient), strict=True):
            whole += share
    return loss


def _scaled(kept: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (kept.to(forms.wide(kept.dtype)) * factor).to(dtype)


def loss_and_gradient(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross entropy of rows and, in the logits' dtype, its gradient times `factor`, computed in float32.

    `logits` [rows, vocabulary], `targets` [rows] with -100 where there is none, `factor` 0-d.
    """
    loss, gradient = torch.ops.surgery.loss_and_gradient(logits, targets, factor)
    return loss, gradient


def loss_and_gradient_reference(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """What `loss_and_gradient` is by definition, in plain torch."""
    counted = targets != IGNORED
    index = targets.where(counted, 0).unsqueeze(1)
    wide = torch.log_softmax(logits, -1, dtype=forms.wide(logits.dtype))
    loss = -wide.gather(1, index).squeeze(1).where(counted, 0).sum()
    wide = wide.exp_().scatter_add_(1, index, wide.new_full((), -1).expand_as(index))
    return loss, wide.mul_(factor).where(counted.unsqueeze(1), 0).to(logits.dtype)


def _run(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    if forms.in_triton(logits):
        from surgery.compiler.kernels import chunked_loss_triton

        with forms.on_device_of(logits):
            return chunked_loss_triton.loss_and_gradient(logits.contiguous(), targets.contiguous(), factor)
    return loss_and_gradient_reference(logits, targets, factor)


def _fake(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=forms.wide(logits.dtype)), torch.empty_like(
        logits, memory_format=torch.contiguous_format
    )


# An operation, so that what counts a step's memory on tensors without storage sees what the kernel takes.
_library = torch.library.Library("surgery", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "loss_and_gradient(Tensor logits, Tensor targets, Tensor factor) -> (Tensor, Tensor)"
)
_library.impl("loss_and_gradient", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("surgery::loss_and_gradient", _fake, lib=_library)
