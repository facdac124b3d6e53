"""The loss in chunks on a CUDA device: its kernel in float64's eyes, its memory, and no wait for the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from surgery.compiler.kernels.chunked_loss import chunked_loss, chunked_loss_reference, loss_and_gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)  # fmt: skip
@pytest.mark.parametrize("columns", [1, 57, 8192, 8193, 32003, 128256])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_against_float64(dtype: torch.dtype, bound: float, columns: int, transposed: bool) -> None:
    torch.manual_seed(0)
    torch.full((40, columns), float("nan"), device="cuda", dtype=dtype)  # what an unwritten entry would hold
    logits = (torch.randn(37, columns, device="cuda") * 4).to(dtype)
    logits = logits.T.contiguous().T if transposed else logits
    targets = torch.randint(0, columns, (37,), device="cuda")
    targets[::5] = -100
    factor = torch.tensor(1.7, device="cuda", dtype=torch.float64)
    loss, gradient = loss_and_gradient(logits, targets, factor)
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, targets, ignore_index=-100, reduction="sum")
    (exact_gradient,) = torch.autograd.grad(expected * 1.7, exact)
    assert (loss - expected).abs() <= 1e-5 * expected + 1e-5
    assert (gradient.double() - exact_gradient).norm() <= bound * exact_gradient.norm()
    for _ in range(3):  # races would show
        again = loss_and_gradient(logits, targets, factor)
        assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)


@pytest.mark.parametrize("target", [57, -1, 1 << 40])
def test_a_target_that_is_no_column_is_no_number(target: int) -> None:
    """A GPU raises nothing by itself, and what lies beside the logits must not pass for one."""
    logits, targets = torch.randn(3, 57, device="cuda"), torch.tensor([1, target, 2], device="cuda")
    loss, _ = loss_and_gradient(logits, targets, torch.ones((), device="cuda"))
    assert loss.isnan()


def linear(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    return functional.linear(hidden, weights["head"])


def case(trained: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    weights = {"head": (torch.randn(32000, 512, device="cuda") * 0.05).bfloat16().requires_grad_(trained)}
    hidden = torch.randn(2, 1500, 512, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(0, 32000, (2, 1500), device="cuda")
    targets[1, 900:] = -100
    return weights, hidden, targets, (targets != -100).sum()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [700, 1024, 5000])
def test_no_worse_than_whole_logits(trained: bool, rows: int) -> None:
    weights, hidden, targets, count = case(trained)
    wide = {name: weight.detach().double().requires_grad_(trained) for name, weight in weights.items()}
    exact_hidden = hidden.detach().double().requires_grad_()

    def gradients(loss: Tensor, given: dict[str, Tensor], hidden: Tensor) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss, [hidden, *(weight for weight in given.values() if trained)])]

    exact = gradients(chunked_loss_reference(linear, wide, exact_hidden, targets, count), wide, exact_hidden)
    whole = gradients(chunked_loss_reference(linear, weights, hidden, targets, count), weights, hidden)
    ours = gradients(chunked_loss(linear, weights, hidden, targets, count, rows), weights, hidden)
    for truth, theirs, found in zip(exact, whole, ours, strict=True):
        allowed = 1.5 * (theirs.double() - truth).norm() + 1e-5 * truth.norm()
        assert (found.double() - truth).norm() <= allowed


def test_memory_and_no_wait() -> None:
    weights, hidden, targets, count = case(trained=False)
    torch.autograd.grad(chunked_loss(linear, weights, hidden, targets, count, 512), hidden)  # compiles the kernel
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(chunked_loss(linear, weights, hidden, targets, count, 512), hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    whole = 3000 * 32000 * 2
    assert torch.cuda.max_memory_allocated() - before < whole / 2  # two chunks of 512 rows, out of 3000
