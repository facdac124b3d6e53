"""`loss_and_gradient` of `chunked_loss.py` in Triton: a program takes a row, and each row is its own sum."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # columns that a program reads at once


@triton.jit
def _rows(logits, targets, losses, gradient, factor, vocabulary, BLOCK: tl.constexpr):
    """One row: its log-sum-exp as it goes along, then the gradient in a second read, out of the cache."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    gradient += row * vocabulary
    target = tl.load(targets + row)
    counted = target != -100
    highest = -3.4e38  # finite: minus infinity less itself is no number
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    whole = highest + tl.log(total)
    known = (target >= 0) & (target < vocabulary)  # a target that is no column makes the loss NaN, which is seen
    own = tl.load(logits + tl.where(known, target, 0), mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(counted, whole - own, 0.0))
    times = tl.where(counted, tl.load(factor), 0.0)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        share = tl.exp(x - whole) - tl.where(columns == target, 1.0, 0.0)
        tl.store(gradient + columns, (share * times).to(gradient.dtype.element_ty), mask=columns < vocabulary)


def loss_and_gradient(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`chunked_loss.loss_and_gradient` for contiguous logits `[rows, vocabulary]` and targets `[rows]`."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits)
    block = min(triton.next_power_of_2(vocabulary), BLOCK)
    _rows[(rows,)](logits, targets, losses, gradient, factor.float(), vocabulary, BLOCK=block, num_warps=8)
    return losses.sum(), gradient
