"""TwoNN: how many dimensions a cloud of points has, from each point's two nearest neighbours. Facco et al. 2017.

Around a point, on a manifold of d dimensions, as many points lie within a distance as its d-th power is large. So the
ratio mu = r2 / r1 of the distances to the second and to the first neighbour has the distribution F(mu) = 1 - mu^-d,
however dense the points lie (doi:10.1038/s41598-017-11873-y). Drawing N points moves the estimate by about d / sqrt(N).
More points are nearer to each other, so where the data have another dimension at another scale, N is that choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.compiler.algebra.measured import Estimator

MOST_PAIRS = 1 << 23  # distances that are in memory at a time: 64 MiB of float64


def intrinsic_dimension(points: Tensor, estimator: Estimator = "regression") -> float:
    """The dimension of points `[N, d]` of any floating dtype, on any device; those that occur again count once.

    It is the same for points that are turned, moved or scaled. Raises ValueError as `dimension_of` does.
    """
    return dimension_of(neighbour_ratios(points), estimator)


def neighbour_ratios(points: Tensor) -> Tensor:
    """mu of every distinct point among `[N, d]`: float64, on the CPU; O(N^2 d) in chunks, by distances in float64."""
    points = torch.unique(points, dim=0).double()  # of two equal points r1 = 0, and mu has no value
    if len(points) < 3:
        return torch.empty(0, dtype=torch.float64)
    centred = points - points.mean(0)  # small norms, so that the expanded squares lose little
    norms = centred.square().sum(1)
    found = []
    for rows in torch.split(torch.arange(len(points), device=points.device), max(1, MOST_PAIRS // len(points))):
        squares = norms[rows, None] + norms - 2 * centred[rows] @ centred.T
        squares[torch.arange(len(rows), device=points.device), rows] = torch.inf  # a point is not its own neighbour
        nearest = squares.topk(2, largest=False).indices
        # the distances themselves by difference: expanded squares have no digits left for points that nearly meet
        distances = (points[rows, None] - points[nearest]).norm(dim=-1).sort(dim=-1).values
        found.append((distances[:, 1] / distances[:, 0])[distances[:, 0] > 0].cpu())
    return torch.cat(found)


def dimension_of(ratios: Tensor, estimator: Estimator = "regression") -> float:
    """The dimension d from the ratios mu `[N]`, of which a share F is not larger than mu.

        regression   the slope through 0 of -log(1 - F) against log(mu), without the tenth of the largest mu
        likelihood   N / sum(log(mu))

    Raises ValueError for fewer than 3 ratios, and where all of them are 1.
    """
    if len(ratios) < 3:
        raise ValueError(f"{len(ratios)} distinct points have no dimension, it takes 3")
    logs = ratios.double().log().sort().values
    if estimator == "likelihood":
        weight, total = torch.tensor(float(len(logs)), dtype=torch.float64), logs.sum()
    else:
        kept = 9 * len(logs) // 10
        shares = torch.arange(1, kept + 1, dtype=torch.float64) / len(logs)
        logs = logs[:kept]
        weight, total = (logs * -torch.log1p(-shares)).sum(), logs.square().sum()
    if total == 0:
        raise ValueError("every point has two neighbours equally far, as on a lattice")
    return float(weight / total)
