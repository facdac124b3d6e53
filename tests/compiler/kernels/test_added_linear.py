"""A frozen linear with a second product, and matrices from their diagonals: against the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels.added_linear import added_linear, added_linear_reference
from surgery.compiler.kernels.diagonals import from_diagonals, from_diagonals_reference

OUT, IN = 6, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("leading", [(7,), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_it_equals_its_definition(leading: tuple[int, ...], biased: bool, apart: bool) -> None:
    weight, results = random(OUT, IN), []
    for run in (added_linear, added_linear_reference):
        x, change = random(*leading, IN, seed=1).requires_grad_(), random(OUT, IN, seed=2).requires_grad_()
        bias = random(OUT, seed=3).requires_grad_() if biased else None
        inside = random(*leading, IN, seed=4).requires_grad_() if apart else None
        y = run(torch.tanh(x), weight, bias, change, inside, -0.3)
        torch.autograd.backward(y, random(*leading, OUT, seed=5))
        results.append([y, x.grad, change.grad, *(given.grad for given in (bias, inside) if given is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_sum_is_rounded_less_than_its_terms() -> None:
    x, weight, change = (random(*shape, seed=seed).to(torch.bfloat16)
                         for seed, shape in enumerate([(64, 256), (64, 256), (64, 256)]))  # fmt: skip
    exact = x.double() @ (weight.double() + change.double()).T
    found, plain = (run(x, weight, None, change) for run in (added_linear, added_linear_reference))
    assert float((found.double() - exact).norm()) <= float((plain.double() - exact).norm())


def test_it_compiles_without_a_graph_break() -> None:
    weight, change = random(OUT, IN), random(OUT, IN, seed=2).requires_grad_()
    x = random(7, IN, seed=1).requires_grad_()

    def run(x: Tensor, change: Tensor) -> Tensor:
        return added_linear(torch.tanh(x), weight, None, change).square().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(run(x, change), (x, change))
    for ours, theirs in zip(torch.autograd.grad(compiled(x, change), (x, change)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_runs_both_products_in_its_dtype() -> None:
    x, weight, change = (random(8, 8, seed=seed).float().requires_grad_(seed != 1) for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        y = added_linear(x, weight, None, change)
    torch.autograd.backward(y.float().sum())
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), x @ (weight + change).T, rtol=3e-2, atol=1e-1)


@pytest.mark.parametrize("sides", [(5, 5), (4, 7), (7, 4), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_a_matrix_has_its_diagonals(sides: tuple[int, int], leading: tuple[int, ...]) -> None:
    entries = random(*leading, sum(sides) - 1).requires_grad_()
    found, expected = from_diagonals(entries, *sides), from_diagonals_reference(entries, *sides)
    assert found.shape == (*leading, *sides) and torch.equal(found, expected)
    gradient = random(*leading, *sides, seed=1)
    ours, theirs = (torch.autograd.grad(value, entries, gradient)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_sums_along_the_diagonals_are_made_in_float32() -> None:
    entries = torch.zeros(2 * 600 - 1, dtype=torch.bfloat16, requires_grad=True)
    (found,) = torch.autograd.grad(from_diagonals(entries, 600, 600).float().sum(), entries)
    assert float(found[599]) == 600, "600 ones in bfloat16 would stop at 256"


@pytest.mark.parametrize("run", [from_diagonals, from_diagonals_reference])
def test_from_diagonals_compiles(run: Any) -> None:
    entries = random(9).requires_grad_()
    compiled = torch.compile(lambda entries: run(torch.sin(entries), 4, 6), fullgraph=True, backend="aot_eager")
    expected, gradient = run(torch.sin(entries), 4, 6), random(4, 6, seed=1)
    found = compiled(entries)
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(value, entries, gradient)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs)
