"""Which form of an operation runs; what each one over a frozen weight does under autocast, and if it is not frozen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels import forms
from surgery.compiler.kernels.added_linear import added_linear, added_linear_reference
from surgery.compiler.kernels.row_norms import updated_row_norms, updated_row_norms_reference
from surgery.compiler.kernels.updated_weight import updated_weight, updated_weight_reference

Operation = Callable[..., Tensor]
OF_FACTORS = [(updated_weight, updated_weight_reference), (updated_row_norms, updated_row_norms_reference)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands() -> list[Tensor]:
    """A weight and two factors."""
    return [random(*shape, seed=seed) for seed, shape in enumerate([(33, 65), (33, 4), (4, 65)])]


@pytest.mark.parametrize(("operation", "reference"), OF_FACTORS)
def test_weights_keep_their_dtype_under_autocast(operation: Operation, reference: Operation) -> None:
    exact = reference(*(tensor.double() for tensor in operands()))
    with torch.autocast("cpu", torch.bfloat16):
        for function in (operation, reference):
            torch.testing.assert_close(function(*operands()).double(), exact, rtol=1e-5, atol=1e-5)


def test_autocast_reaches_a_product_of_its_own_operands_alone() -> None:
    x, weight, change = random(5, 65, seed=3), *operands()[:1], random(33, 65, seed=4)
    assert forms.autocast_dtype(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert forms.autocast_dtype(x) == torch.bfloat16 and forms.autocast_dtype(x.double()) is None
        assert added_linear(x, weight, None, change).dtype == torch.bfloat16
        assert added_linear(x.to("meta"), weight.to("meta"), None, change.to("meta")).dtype == torch.float32


@pytest.mark.parametrize(("operation", "reference"), OF_FACTORS)
def test_a_weight_that_is_thawed_gets_its_gradient(operation: Operation, reference: Operation) -> None:
    leaves = [tensor.double().requires_grad_() for tensor in operands()]
    found, expected = (
        torch.autograd.grad(function(*leaves, 0.5).square().sum(), leaves) for function in (operation, reference)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_weight_of_a_sum_that_is_thawed_gets_its_gradient() -> None:
    x, weight, change = (random(*shape, seed=9).double().requires_grad_() for shape in ((5, 8), (7, 8), (7, 8)))
    found = torch.autograd.grad(added_linear(x, weight, None, change, scale=0.5).square().sum(), [x, weight, change])
    definition = added_linear_reference(x, weight, None, change, scale=0.5).square().sum()
    for ours, theirs in zip(found, torch.autograd.grad(definition, [x, weight, change]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("operation", "reference"), OF_FACTORS)
def test_transforms_see_the_definition(operation: Operation, reference: Operation) -> None:
    weight, left, right = operands()

    def total(function: Operation) -> Callable[[Tensor], Tensor]:
        return lambda one: function(weight, one, right).sum()

    ours, theirs = (torch.func.grad(total(function))(left) for function in (operation, reference))
    torch.testing.assert_close(ours, theirs)
