"""W with an update of low rank, entry by entry under W, and the norms of its rows: against the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels.factor_gradients import factor_gradients
from surgery.compiler.kernels.row_norms import updated_row_norms, updated_row_norms_reference
from surgery.compiler.kernels.updated_weight import updated_weight, updated_weight_reference

SHAPES = [(12, 10, 3), (1, 7, 1), (9, 1, 1), (33, 65, 20)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(outputs: int, inputs: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with zeros, and two factors that are trained."""
    weight = random(outputs, inputs, seed=1) * (random(outputs, inputs, seed=2) > 0)
    left, right = random(outputs, rank, seed=3), random(rank, inputs, seed=4)
    return weight.to(dtype), left.to(dtype).requires_grad_(), right.to(dtype).requires_grad_()


def by_entry(weight: Tensor, left: Tensor, right: Tensor, scale: float, times: str) -> Tensor:
    """The definition in float64, by a loop over the entries."""
    result = weight.double().clone()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            w = weight[i, j].double()
            under = {"one": 1.0, "mask": float(w != 0), "weight": float(w)}[times]
            result[i, j] = w + scale * under * (left[i].double() @ right[:, j].double())
    return result


@pytest.mark.parametrize("times", ["one", "mask", "weight"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_its_definition(shape: tuple[int, int, int], times: str) -> None:
    weight, left, right = operands(*shape)
    expected = by_entry(weight, left.detach(), right.detach(), -0.7, times)
    for found in (
        updated_weight(weight, left, right, -0.7, times),
        updated_weight_reference(weight, left, right, -0.7, times),
        updated_weight(weight.T.contiguous().T, left, right, -0.7, times),
    ):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: updated_weight(weight, a, b, -0.7, times), (left, right))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_rounded_once(dtype: torch.dtype) -> None:
    weight, left, right = (tensor.detach() for tensor in operands(33, 65, 20))
    weight = weight.to(dtype)
    found = updated_weight(weight, left.float(), right.float(), 0.01, "mask")
    product = (left.float() @ right.float()).double()
    exact = weight.double() + (weight != 0) * 0.01 * product
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-6)


def test_a_zero_stays_zero_whatever_the_factors_hold() -> None:
    weight, left, right = (tensor.detach() for tensor in operands(12, 10, 3))
    left[3, 1] = float("inf")
    assert not updated_weight(weight, left, right, 1.0, "mask")[weight == 0].any()


@pytest.mark.parametrize("scale", [0.7, -2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norms_are_those_of_the_matrix(shape: tuple[int, int, int], scale: float) -> None:
    weight, left, right = operands(*shape)
    weight = weight + 0.1
    expected = torch.linalg.vector_norm(weight + scale * (left @ right), dim=1)
    for found in (
        updated_row_norms(weight, left, right, scale),
        updated_row_norms_reference(weight, left, right, scale),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: updated_row_norms(weight, a, b, scale), (left, right))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-6), (torch.float16, 3e-6)])
def test_norms_of_a_rounded_weight_are_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    weight, left, right = (tensor.detach() for tensor in operands(33, 65, 20))
    weight, left, right = weight.to(dtype), left.float(), right.float()
    found = updated_row_norms(weight, left, right, 0.5)
    expected = updated_row_norms_reference(weight.double(), left.double(), right.double(), 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0, 1e7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_norms_of_a_half_precision_weight_are_of_any_size(dtype: torch.dtype, size: float) -> None:
    weight, left, right = operands(33, 65, 20)
    weight, factors = weight.to(dtype), tuple(factor.detach().float().requires_grad_() for factor in (left, right))
    dnorms = size * random(33, seed=8)
    found = torch.autograd.grad(updated_row_norms(weight, factors[0], factors[1], 0.5), factors, dnorms.float())
    exact = torch.autograd.grad(updated_row_norms_reference(weight.double(), left, right, 0.5), (left, right), dnorms)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() <= 2e-3 * theirs.norm()


def test_norms_that_cancel_are_not_below_zero() -> None:
    _, left, right = operands(12, 10, 3, torch.float32)
    norms = updated_row_norms(-(left @ right).detach(), left, right)
    assert bool(((norms >= 0) & (norms < 1e-2)).all())
    (gradient,) = torch.autograd.grad(updated_row_norms(torch.zeros(12, 10), 0 * left, right).sum(), left)
    assert not gradient.any(), "a row of zeros has none, as of torch's own norm"


def test_a_move_of_the_weight_before_the_backward_is_noticed() -> None:
    for function in (updated_weight, updated_row_norms):
        weight, left, right = operands(12, 10, 3)
        result: Any = function(weight, left, right)
        weight.add_(1)
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.backward(result.sum())


@pytest.mark.parametrize("function", [updated_weight, updated_row_norms])
def test_they_compile_without_a_graph_break(function: Any) -> None:
    weight, left, right = operands(12, 10, 3)

    def run(left: Tensor, right: Tensor) -> Tensor:
        return function(weight, torch.tanh(left), right, 0.5).square().sum()  # type: ignore[no-any-return]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(run(left, right), (left, right))
    for ours, theirs in zip(torch.autograd.grad(compiled(left, right), (left, right)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_the_gradients_of_two_factors_are_those_of_autograd(needed: tuple[bool, bool]) -> None:
    x, dy = random(31, 10, seed=5), random(31, 12, seed=6)
    _, left, right = operands(12, 10, 3)
    torch.autograd.backward(x @ (left @ right).T, dy)
    found = factor_gradients(dy, x, left.detach(), right.detach(), *needed)
    expected = [factor.grad for factor, need in zip((left, right), needed, strict=True) if need]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
