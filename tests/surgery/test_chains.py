"""The algebra of `surgery rank` in float64: Eckart and Young for one weight, Zeng and Lee for products of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from surgery.analysis.chains import adapted, construct, cut, difference, distance, product
from surgery.analysis.norms import Norm
from surgery.analysis.spectra import (
    arithmetic,
    decomposed,
    numerical_rank,
    rank_within,
    rounding,
    singular_values,
    tails,
    truncated,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(widths: list[int]) -> list[Tensor]:
    """Weights `[out, in]` in the order of application, of these widths from the input on."""
    return [random(out, into, seed=number) for number, (into, out) in enumerate(zip(widths, widths[1:], strict=False))]


def released(weights: list[Tensor], target: Tensor, rank: int) -> list[Any]:
    """The changes of square weights as the authors' code makes them (`our_construction`), with plain inverses."""
    frozen, wished = [weight.numpy() for weight in weights], target.numpy()
    size = len(wished)

    def times(matrices: list[Any]) -> Any:
        found = np.eye(size)
        for matrix in matrices:
            found = matrix @ found
        return found

    error = wished - times(frozen)
    right = np.linalg.svd(error)[2].T
    adapted, changes = np.eye(size), []
    for number, weight in enumerate(frozen):
        columns = slice(rank * number, rank * (number + 1))
        first = np.linalg.inv(times(frozen[number + 1 :])) @ error @ right[:, columns]
        second = (right.T @ np.linalg.inv(adapted))[columns]
        changes.append(first @ second)
        adapted = (weight + first @ second) @ adapted
    return changes


# --- products of weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("norm", list(Norm))
def test_the_constructed_error_is_the_next_singular_value(layers: int, rank: int, norm: Norm) -> None:
    weights, target = chain([9] * (layers + 1)), random(9, 9, seed=99)
    adapters = construct(weights, target, rank)
    values = np.linalg.svd((target - product(weights)).numpy(), compute_uv=False)
    kept = min(rank * layers, 9)
    expected = math.sqrt(sum(values[kept:] ** 2)) if norm is Norm.frobenius else (*values, 0.0)[kept]
    assert distance(adapted(weights, adapters), [target], norm) == pytest.approx(expected, rel=1e-8, abs=1e-9)
    assert all(torch.linalg.matrix_rank(left @ right, tol=1e-9) <= rank for left, right in adapters)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_changes_are_those_of_the_released_code(layers: int) -> None:
    weights, target = chain([8] * (layers + 1)), random(8, 8, seed=50)
    for (left, right), expected in zip(construct(weights, target, 2), released(weights, target, 2), strict=True):
        np.testing.assert_allclose((left @ right).numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("rank", "layers"), [(5, 2), (4, 3), (7, 4)])
def test_the_target_is_reached_from_the_rank_of_the_difference_on(rank: int, layers: int) -> None:
    weights = chain([10] * (layers + 1))
    target = product(weights) + random(10, rank, seed=5) @ random(rank, 10, seed=6)
    enough = -(-rank // layers)
    size = float(torch.linalg.matrix_norm(target - product(weights), 2))
    assert distance(adapted(weights, construct(weights, target, enough)), [target], Norm.spectral) < 1e-9 * size
    assert distance(adapted(weights, construct(weights, target, enough - 1)), [target], Norm.spectral) > 1e-3 * size


def test_no_other_adapters_of_the_rank_are_nearer() -> None:
    """Gradient descent from the construction and from many starts stays above the bound, and comes close to it."""
    torch.manual_seed(0)
    weights, target = chain([6, 6, 6]), random(6, 6, seed=9)
    values = torch.linalg.svdvals(target - product(weights))
    bound = float(values[2:].norm())  # rank 1 on two weights
    best = math.inf
    for _ in range(4):
        factors = [(0.5 * torch.randn(6, 1)).double().requires_grad_() for _ in range(4)]
        optimizer = torch.optim.LBFGS(factors, max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def loss(factors: list[Tensor] = factors, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            moved = [weight + factors[2 * at] @ factors[2 * at + 1].mT for at, weight in enumerate(weights)]
            found: Tensor = (target - product(moved)).square().sum()
            found.backward()  # type: ignore[no-untyped-call]
            return found

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        best = min(best, math.sqrt(float(loss().detach())))
    assert best >= bound * (1 - 1e-9)
    assert best <= bound * 1.05


def test_wider_inside_is_attained_and_narrower_is_not() -> None:
    wide, target = chain([5, 9, 7, 5]), random(5, 5, seed=7)
    bound = float(torch.linalg.svdvals(target - product(wide))[3])
    assert distance(adapted(wide, construct(wide, target, 1)), [target], Norm.spectral) == pytest.approx(
        bound, rel=1e-8
    )
    narrow, target = chain([9, 2, 9]), random(9, 9, seed=7)
    bound = float(torch.linalg.svdvals(target - product(narrow))[4])
    assert distance(adapted(narrow, construct(narrow, target, 2)), [target], Norm.spectral) > 1.05 * bound


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 2), (4, 1), (1, 4)])
def test_heads_multiply_their_own_parts(queries: int, keys: int) -> None:
    """The scores of an attention are those of the products, head by head; fewer keys serve several heads each."""
    width, inputs = 3, 10
    query, key = random(queries * width, inputs), random(keys * width, inputs, seed=1)
    heads = max(queries, keys)
    parts = cut(query, key.mT, heads)
    assert parts is not None
    first, second = random(inputs, seed=2), random(inputs, seed=3)
    asked = (query @ first).view(queries, width).repeat_interleave(heads // queries, 0)
    held = (key @ second).view(keys, width).repeat_interleave(heads // keys, 0)
    scores = (parts[1] @ parts[0] @ first) @ second
    torch.testing.assert_close(scores, (asked * held).sum(-1), rtol=1e-12, atol=1e-12)
    moved = difference(parts, (2 * parts[0], parts[1]))
    assert isinstance(moved, tuple)
    torch.testing.assert_close(moved[0] @ moved[1], parts[1] @ parts[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("first", "second", "heads"), [(10, 10, 4), (12, 9, 4), (12, 8, 3)])
def test_what_cannot_be_cut_into_heads(first: int, second: int, heads: int) -> None:
    assert cut(random(first, 5), random(5, second), heads) is None


# --- one weight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (3, 12, 7)])
@pytest.mark.parametrize("norm", list(Norm))
def test_what_is_left_is_what_the_nearest_matrix_leaves(shape: tuple[int, ...], norm: Norm) -> None:
    change = random(*shape)
    left = tails(singular_values(change), norm)
    assert len(left) == 8
    for rank in range(8):
        first, second = truncated(decomposed(change), rank)
        distances = torch.linalg.matrix_norm(change - first @ second, 2 if norm is Norm.spectral else "fro")
        assert float(left[rank]) == pytest.approx(float(distances.max()), abs=1e-12)
    limits = [float(left[rank]) for rank in range(8)]
    assert [rank_within(left, limit) for limit in limits] == list(range(8))
    assert rank_within(left, 0.0) == 7


def test_factors_and_their_product_are_measured_alike() -> None:
    pair = random(20, 3), random(3, 15, seed=1)
    assert singular_values(pair).shape == (3,)
    torch.testing.assert_close(singular_values(pair), singular_values(pair[0] @ pair[1])[:3], rtol=1e-12, atol=1e-12)
    left, values, right = decomposed(pair)
    torch.testing.assert_close((left * values) @ right, pair[0] @ pair[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 24), (64, 64), (200, 900), (4000, 32)])
def test_rounding_is_estimated_tightly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = 0.02 * random(*shape)
    weight[0] *= 20  # rows of embeddings differ that much
    added = float(torch.linalg.matrix_norm(weight.to(dtype).double() - weight, 2))
    assert 0.3 < added / rounding(weight, dtype) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_is_what_stands_out_of_rounding(dtype: torch.dtype) -> None:
    weight = 0.02 * random(96, 64)
    for rank in (0, 1, 5, 30):
        moved = (weight + 0.05 * random(96, rank, seed=2) @ random(rank, 64, seed=3)).to(dtype).double()
        assert numerical_rank(singular_values(moved - weight), rounding(moved, dtype)) == rank
    values = singular_values(random(96, 4) @ random(4, 64))
    assert numerical_rank(values, arithmetic(values, (96, 64))) == 4
