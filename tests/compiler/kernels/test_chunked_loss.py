"""The loss in chunks is the loss on whole logits, and so are its gradients; whole logits never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.compiler.kernels.chunked_loss import (
    chunked_loss,
    chunked_loss_reference,
    loss_and_gradient,
    loss_and_gradient_reference,
)
from surgery.compiler.storages import Storages

WIDTH, VOCABULARY = 12, 57


def linear(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    return functional.linear(hidden, weights["head"])


def capped(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    return torch.tanh(functional.linear(hidden, weights["head"], weights["bias"]) / 3.0) * 3.0


def adapted(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    narrow = functional.linear(hidden, weights["A"])
    return functional.linear(hidden, weights["head"]) + functional.linear(narrow, weights["B"]) * 2


HEADS: list[Callable[[dict[str, Tensor], Tensor], Tensor]] = [linear, capped, adapted]


def case(head: Any, dtype: torch.dtype = torch.float64, trained: bool = True, rows: int = 3) -> tuple[Any, ...]:
    """Weights, hidden [rows, 7, width], targets and their count."""
    torch.manual_seed(0)
    shapes: dict[Any, dict[str, tuple[int, ...]]] = {
        linear: {"head": (VOCABULARY, WIDTH)},
        capped: {"head": (VOCABULARY, WIDTH), "bias": (VOCABULARY,)},
    }
    default: dict[str, tuple[int, ...]] = {"head": (VOCABULARY, WIDTH), "A": (4, WIDTH), "B": (VOCABULARY, 4)}
    weights = {name: torch.randn(shape).to(dtype) for name, shape in shapes.get(head, default).items()}
    for name, weight in weights.items():
        weight.requires_grad_(trained and not (head is adapted and name == "head"))
    hidden = torch.randn(rows, 7, WIDTH).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (rows, 7))
    targets[0, :3] = targets[-1, -1] = -100
    return weights, hidden, targets, (targets != -100).sum()


def gradients(loss: Tensor, weights: dict[str, Tensor], hidden: Tensor, scale: float = 3.0) -> list[Tensor]:
    wanted = [tensor for tensor in (hidden, *weights.values()) if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * scale, wanted)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 5, 7, 20, 21, 1000])
def test_equal_to_the_whole(head: Any, trained: bool, rows: int) -> None:
    weights, hidden, targets, count = case(head, trained=trained)
    expected = gradients(chunked_loss_reference(head, weights, hidden, targets, count), weights, hidden)
    found = gradients(chunked_loss(head, weights, hidden, targets, count, rows), weights, hidden)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_by_differences() -> None:
    weights, hidden, targets, count = case(adapted, rows=1)

    def loss(hidden: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return chunked_loss(adapted, {**weights, "A": left, "B": right}, hidden, targets, count, 3)

    assert torch.autograd.gradcheck(loss, (hidden, weights["A"], weights["B"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_half_precision_is_no_worse_than_the_whole(head: Any, dtype: torch.dtype) -> None:
    weights, hidden, targets, count = case(head, dtype, rows=40)
    wide = {name: weight.detach().double().requires_grad_(weight.requires_grad) for name, weight in weights.items()}
    wide_hidden = hidden.detach().double().requires_grad_()
    scale = 4.0  # loss scales are powers of two
    exact = gradients(chunked_loss_reference(head, wide, wide_hidden, targets, count), wide, wide_hidden, scale)
    whole = gradients(chunked_loss_reference(head, weights, hidden, targets, count), weights, hidden, scale)
    ours = gradients(chunked_loss(head, weights, hidden, targets, count, 64), weights, hidden, scale)
    for number, (truth, theirs, found) in enumerate(zip(exact, whole, ours, strict=True)):
        # A gradient of what is trained in the head is rounded once per chunk, before it is summed.
        allowed = (1.3 if number > 1 else 1.01) * (theirs.double() - truth).norm() + 1e-6 * truth.norm()
        assert (found.double() - truth).norm() <= allowed


def test_a_small_loss_scale_does_not_underflow() -> None:
    weights, hidden, targets, _ = case(linear, torch.float16)
    count = torch.tensor(3_000_000)  # a share of 3e-7 of every gradient: less than float16 holds
    loss = chunked_loss(linear, weights, hidden, targets, count, 8)
    (found,) = torch.autograd.grad(loss * 2.0**21, hidden)
    wide = {name: weight.detach().double() for name, weight in weights.items()}
    truth = hidden.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(chunked_loss_reference(linear, wide, truth, targets, count) * 2.0**21, truth)
    torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=5e-3)


def test_rows_without_a_target_count_for_nothing() -> None:
    weights, hidden, targets, count = case(linear)
    with torch.no_grad():
        hidden[0, 0] = float("inf")  # a place whose target is -100
    loss = chunked_loss(linear, weights, hidden, targets, count, 4)
    weights["head"].requires_grad_(False)
    assert torch.isfinite(loss)
    none = torch.full_like(targets, -100)
    assert torch.isnan(chunked_loss(linear, weights, hidden, none, (none != -100).sum(), 4))  # as the mean of nothing


def test_under_autocast() -> None:
    weights, hidden, targets, count = case(linear, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_loss(linear, weights, hidden, targets, count, 5)
        whole = chunked_loss_reference(linear, weights, hidden, targets, count)
    assert ours.dtype == torch.float32
    for theirs, found in zip(gradients(whole, weights, hidden), gradients(ours, weights, hidden), strict=True):
        assert found.dtype == theirs.dtype == torch.float32
        assert (found - theirs).norm() <= 5e-3 * theirs.norm()


def test_without_gradients_none_are_made() -> None:
    weights, hidden, targets, count = case(linear)
    with torch.no_grad():
        loss = chunked_loss(linear, weights, hidden, targets, count, 5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, chunked_loss_reference(linear, weights, hidden, targets, count).detach())


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most numbers that any tensor had that an operation made."""

    numbers = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        self.numbers = max([self.numbers, *(tensor.numel() for tensor in made if isinstance(tensor, Tensor))])
        return result


def test_whole_logits_never_exist() -> None:
    weights, hidden, targets, count = case(linear, trained=False, rows=60)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        gradients(chunked_loss_reference(linear, weights, hidden, targets, count), weights, hidden)
    assert largest.numbers == hidden.shape[0] * 7 * VOCABULARY
    with Largest() as largest:  # type: ignore[no-untyped-call]
        gradients(chunked_loss(linear, weights, hidden, targets, count, 16), weights, hidden)
    assert largest.numbers == hidden.numel() > 16 * VOCABULARY


def rows_of_logits(dtype: torch.dtype, transposed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = (4 * torch.randn(VOCABULARY, 9).T if transposed else 4 * torch.randn(9, VOCABULARY)).to(dtype)
    targets = torch.randint(0, VOCABULARY, (9,))
    targets[::4] = -100
    return logits, targets, torch.tensor(1.7, dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_against_autograd(transposed: bool) -> None:
    logits, targets, factor = rows_of_logits(torch.float64, transposed)
    loss, gradient = loss_and_gradient(logits, targets, factor)
    copy = logits.clone().requires_grad_()
    expected = functional.cross_entropy(copy, targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected * 1.7, copy)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operation(dtype: torch.dtype) -> None:
    arguments = rows_of_logits(dtype)
    torch.library.opcheck(torch.ops.surgery.loss_and_gradient, arguments, test_utils=["test_schema", "test_faketensor"])
    for found, expected in zip(loss_and_gradient(*arguments), loss_and_gradient_reference(*arguments), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_two_chunks_of_logits_at_most_are_alive() -> None:
    """A chunk's logits and their gradient, beside the gradient of the head's input and what one chunk needs of it."""
    weights, hidden, targets, count = case(linear, trained=False, rows=60)
    with FakeTensorMode() as fake:  # the operation, not what it is made of on a CPU
        head, hidden, targets, count = map(fake.from_tensor, (weights["head"], hidden, targets, count))
        with Storages() as storages:
            torch.autograd.grad(chunked_loss(linear, {"head": head}, hidden, targets, count, 40), hidden)
    logits, inputs = 40 * VOCABULARY * 8, hidden.numel() * 8
    assert 2 * logits < storages.most < 2.5 * logits + 3 * inputs
