"""TwoNN against a second computation of it, on clouds whose dimension is known."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from surgery.analysis import intrinsic_dimension as module
from surgery.analysis.intrinsic_dimension import dimension_of, intrinsic_dimension, neighbour_ratios
from surgery.compiler.algebra.measured import Estimator, gain

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


def gaussian(dimension: int, rows: int = 1500, width: int = 64, seed: int = 0) -> Tensor:
    """Points of a linear subspace of R^64, `[rows, width]`."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(rows, dimension, generator=generator, dtype=torch.float64)
    return points @ torch.randn(dimension, width, generator=generator, dtype=torch.float64)


def reference(points: Tensor, estimator: Estimator) -> float:
    """The formulas as the paper has them, one point at a time, with all distances sorted."""
    cloud = points.double().numpy()
    ratios = []
    for point in cloud:
        distances = np.sort(np.sqrt(np.sum((cloud - point) ** 2, axis=1)))
        ratios.append(distances[2] / distances[1])  # the nearest is the point itself
    ratios.sort()
    if estimator == "likelihood":
        return len(ratios) / sum(map(math.log, ratios))
    pairs = [(math.log(ratio), -math.log(1 - (j + 1) / len(ratios)))
             for j, ratio in enumerate(ratios) if j + 1 <= 0.9 * len(ratios)]  # fmt: skip
    (slope,), *_ = np.linalg.lstsq(np.array([[x] for x, _ in pairs]), np.array([y for _, y in pairs]))
    return float(slope)


@pytest.mark.parametrize(("dimension", "published"), [(1, 1.07), (2, 1.96), (5, 5.14), (10, 9.54)])
def test_a_gaussian_of_known_dimension(dimension: int, published: float) -> None:
    """Ten draws of 1500 points: their mean, which ten dimensions push below 10, since no cloud fills them evenly."""
    found = [intrinsic_dimension(gaussian(dimension, seed=seed)) for seed in range(10)]
    error = dimension / math.sqrt(1500)
    assert np.mean(found) == pytest.approx(published, abs=2.5 * error)
    assert np.std(found) < 2 * error
    assert np.mean(found) == pytest.approx(dimension, rel=0.09)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("dimension", "rows", "width"), [(1, 250, 3), (3, 333, 7), (12, 301, 40)])
def test_the_estimate_equals_a_second_computation(estimator: Estimator, dimension: int, rows: int, width: int) -> None:
    points = gaussian(dimension, rows, width)
    assert intrinsic_dimension(points, estimator) == pytest.approx(reference(points, estimator), rel=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_turned_moved_and_scaled_points_have_the_same_dimension(estimator: Estimator) -> None:
    points = gaussian(4, 400, 12)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    moved = 1e-3 * (points @ turn) + 5.0
    assert intrinsic_dimension(moved, estimator) == pytest.approx(intrinsic_dimension(points, estimator), rel=1e-8)
    stretched = points * torch.linspace(1, 9, 12)  # what is no isometry changes it
    assert intrinsic_dimension(stretched, estimator) != pytest.approx(intrinsic_dimension(points, estimator), rel=1e-4)


def test_points_that_occur_again_count_once() -> None:
    points = gaussian(3, 300, 8)
    again = torch.cat([points, points[:200], points[:50]])
    assert intrinsic_dimension(again) == pytest.approx(intrinsic_dimension(points), rel=1e-12)
    assert len(neighbour_ratios(again)) == 300


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points = gaussian(3, 211, 8)
    whole = neighbour_ratios(points)
    monkeypatch.setattr(module, "MOST_PAIRS", 211 * 7)  # seven rows at a time
    torch.testing.assert_close(neighbour_ratios(points), whole, rtol=1e-14, atol=0)


def test_points_that_nearly_meet_keep_their_distance() -> None:
    """Pairs 1e-7 apart in a cloud of size 1, far from 0: expanded squares would have no digit of it."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    step = 1e-7 * torch.randn(60, 5, generator=generator, dtype=torch.float64)
    cloud = torch.cat([points, points + step, points + 3 * step]) + 100.0
    found = neighbour_ratios(cloud).sort().values
    differences = (cloud[:, None] - cloud).norm(dim=-1).sort(dim=1).values
    torch.testing.assert_close(found, (differences[:, 2] / differences[:, 1]).sort().values, rtol=1e-9, atol=0)
    assert 1.4 < float(found.median()) < 3.1


def test_lower_precision_is_read_as_it_is() -> None:
    points = gaussian(3, 300, 8)
    assert intrinsic_dimension(points.float()) == pytest.approx(intrinsic_dimension(points), rel=1e-3)
    half = points.bfloat16()
    assert intrinsic_dimension(half) == intrinsic_dimension(half.double())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_has_no_dimension_is_refused(estimator: Estimator) -> None:
    with pytest.raises(ValueError, match="2 distinct points"):
        dimension_of(torch.tensor([1.2, 1.3]), estimator)
    with pytest.raises(ValueError, match="0 distinct points"):
        intrinsic_dimension(torch.ones(50, 4), estimator)
    sides: Any = torch.arange(12.0)
    with pytest.raises(ValueError, match="lattice"):
        intrinsic_dimension(torch.cartesian_prod(sides, sides), estimator)


def test_the_gain_of_a_block() -> None:
    pairs = {(5.0, 5.0): 1, (8.0, 3.0): 1, (3.2, 5.4): 3, (3.2, 3.69): 1, (3.2, 3.71): 2, (0.0, 7.0): 8}
    assert {pair: gain(*pair) for pair in pairs} == pairs
