"""Weights, norms and products of methods that read W entry by entry, on a CUDA device against float64; `make gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels import row_norms, scaled_columns, updated_weight
from surgery.compiler.kernels.added_linear import added_linear
from surgery.compiler.kernels.diagonals import from_diagonals, from_diagonals_reference
from surgery.compiler.kernels.factor_gradients import factor_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(1024, 2048, 16), (37, 53, 5), (1, 300, 1), (130, 17, 3), (1000, 777, 64), (264, 513, 256)]
PAIRS = [  # of the weight and of the factors
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32), (torch.float32, torch.bfloat16),
]  # fmt: skip
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Half of the last bit of what is rounded once, relative to the largest entry; float32 with room for its sums."""


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def operands(
    shape: tuple[int, int, int], pair: tuple[torch.dtype, torch.dtype], turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with half of its entries zero, as rows or as columns lie in memory, and two factors."""
    torch.manual_seed(sum(shape))
    outputs, inputs, rank = shape
    weight = random(outputs, inputs, dtype=pair[0]) * (random(outputs, inputs) > 0)
    weight = weight.T.contiguous().T if turned else weight
    return weight, random(outputs, rank, dtype=pair[1]), random(rank, inputs, dtype=pair[1])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("form", ["kernel", "torch"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_updated_weights(
    shape: tuple[int, int, int], pair: tuple[torch.dtype, torch.dtype], turned: bool, form: str
) -> None:
    from surgery.compiler.kernels import updated_weight_triton

    run = updated_weight_triton.updated_weight if form == "kernel" else updated_weight.in_place
    weight, left, right = operands(shape, pair, turned)
    for times in ("one", "mask", "weight"):
        expected = updated_weight.updated_weight_reference(weight.double(), left.double(), right.double(), 0.3, times)
        found = run(weight, left, right, 0.3, times)
        assert found.dtype == weight.dtype and error(found, expected) < ROUNDED[pair[0]]
        assert torch.equal(found, run(weight, left, right, 0.3, times))
        assert times == "one" or not found[weight == 0].any()


@pytest.mark.parametrize("form", ["kernel", "torch"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] <= row_norms.WIDEST])
def test_norms_of_rows(
    shape: tuple[int, int, int], pair: tuple[torch.dtype, torch.dtype], turned: bool, form: str
) -> None:
    from surgery.compiler.kernels import row_norms_triton

    run = row_norms_triton.norms_and_product if form == "kernel" else row_norms.norms_and_product
    weight, left, right = operands(shape, pair, turned)
    norms, product = run(weight, left, right, 0.3)
    expected = row_norms.updated_row_norms_reference(weight.double(), left.double(), right.double(), 0.3)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=1e-5)
    assert error(product, weight.double() @ right.double().T) < 1e-5
    again = run(weight, left, right, 0.3)
    assert torch.equal(norms, again[0]) and torch.equal(product, again[1])


@pytest.mark.parametrize("form", ["kernel", "torch"])
def test_norms_that_cancel_are_not_below_zero(form: str) -> None:
    from surgery.compiler.kernels import row_norms_triton

    run = row_norms_triton.norms_and_product if form == "kernel" else row_norms.norms_and_product
    left, right = random(64, 16), random(16, 512)
    norms, _ = run(-(left @ right), left, right, 1.0)
    assert bool(((norms >= 0) & (norms < 0.3)).all()), "of norms of some 90"


@pytest.mark.parametrize("form", ["kernel", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(512, 2048), (7, 5), (1, 1), (300, 513)])
def test_scaled_columns(shape: tuple[int, int], dtype: torch.dtype, form: str) -> None:
    from surgery.compiler.kernels import scaled_columns_triton

    forms = scaled_columns_triton if form == "kernel" else scaled_columns
    y, dy, scales = random(*shape, dtype=dtype), random(*shape, dtype=dtype), 1 + 0.1 * random(shape[1])
    assert error(forms.scaled(y, scales), y.double() * scales.double()) < ROUNDED[dtype]
    dscaled, sums = forms.scaled_and_sums(dy, y, scales)
    assert error(dscaled, dy.double() * scales.double()) < ROUNDED[dtype]
    expected = (dy.double() * y.double()).sum(0)
    assert float((sums.double() - expected).norm() / expected.norm()) < (1e-5 if form == "kernel" else ROUNDED[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("apart", [False, True])
def test_a_product_is_summed_into_the_frozen_one(dtype: torch.dtype, apart: bool) -> None:
    x, inside, weight, change = (
        random(*shape, dtype=dtype) for shape in ((2, 96, 80), (2, 96, 80), (64, 80), (64, 80))
    )
    bias, dy = random(64, dtype=dtype), random(2, 96, 64, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in ((x, change, inside) if apart else (x, change))]
    y = added_linear(x, weight, bias, change, inside if apart else None, 0.5)
    gradients = torch.autograd.grad(y, leaves, dy)
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    taken = wide[2] if apart else wide[0]
    expected = wide[0] @ weight.double().T + bias.double() + 0.5 * (taken @ wide[1].T)
    assert error(y.detach(), expected.detach()) < 2 * ROUNDED[dtype] + 1e-6
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        assert error(ours, theirs) < 2 * ROUNDED[dtype] + 1e-6


@pytest.mark.parametrize("sides", [(512, 512), (5, 9), (9, 5), (1, 1)])
def test_diagonals(sides: tuple[int, int]) -> None:
    entries = random(2, sum(sides) - 1, dtype=torch.bfloat16).requires_grad_()
    found = from_diagonals(entries, *sides)
    assert torch.equal(found, from_diagonals_reference(entries, *sides))
    gradient = random(2, *sides, dtype=torch.bfloat16)
    wide = entries.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(from_diagonals_reference(wide, *sides), wide, gradient.double())
    (ours,) = torch.autograd.grad(found, entries, gradient)
    assert error(ours, expected) < ROUNDED[torch.bfloat16]


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_gradients_of_two_factors(pair: tuple[torch.dtype, torch.dtype]) -> None:
    x, dy = random(777, 520, dtype=pair[0]), random(777, 264, dtype=pair[0])
    left, right = random(264, 16, dtype=pair[1]), random(16, 520, dtype=pair[1])
    found = factor_gradients(dy, x, left, right)
    expected = (
        dy.double().T @ (x.double() @ right.double().T), (dy.double() @ left.double()).T @ x.double()
    )  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 8e-3
