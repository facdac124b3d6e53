"""GeoLoRA: steps on the matrices of a rank that the optimizer finds, from one gradient.

With `M = scale * U @ S @ V`, columns of U and rows of V orthonormal, and g the gradient of `X = U @ S @ V`, the first
of every `period` steps moves X along what of g is tangent to the matrices of its rank,

    K = gU @ inverse(S).T = g @ V.T,    L = inverse(S).T @ gV = U.T @ g
    U1 = an orthonormal basis of (I - U @ U.T) @ K,    V1 = one of the rows of L @ (I - V.T @ V)
    S' = [[S - lr * gS, -lr * L @ V1.T], [-lr * U1.T @ K, 0]]
    X' = [U, U1] @ S' @ [V; V1] = X - lr * (U U.T g + g V.T V - U U.T g V.T V)

and keeps the best approximation of X' that the tensors have room for. The other steps of a period leave U and V alone,
and the optimizer around moves S, starting anew. The last step of a period cuts the smallest singular values d of S, as
long as their norm is below `tolerance * norm(d)`: what is cut are zeros in the tensors, which keep their shape, and the
scale stays. Inverses are pseudo-inverses, so that S = 0 at the start moves S alone; U and V are made orthonormal again
at each move, so that roundings do not add up. The rate is that of the core. Schotthoefer et al. 2024, arXiv:2410.18720.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from surgery.compiler.settings import share, whole
from surgery.optimizers import BASES, optimizer
from surgery.optimizers.factors import Batch, FactorOptimizer, Factors, eigen, gram, reciprocal

LEFT, CORE, RIGHT = range(3)


@optimizer("geolora", around=BASES, needs="triples", tolerance=share, period=whole(1))
class GeoLora(FactorOptimizer):
    """Moves triples of factors; between its moves the cores are left to the optimizer around."""

    def __init__(
        self, base: torch.optim.Optimizer, factors: Iterable[Factors], tolerance: float = 0.1, period: int = 1
    ) -> None:
        super().__init__(base, factors)
        self.tolerance, self.period = tolerance, period

    def update(self, batch: Batch) -> None:
        """One step over `[sites]`."""
        first, last = (self.steps - 1) % self.period == 0, self.steps % self.period == 0
        if first:
            self._move(batch, self.tolerance if last else 0.0)
        else:
            for one in batch.factors:
                one.tensors[LEFT].grad = one.tensors[RIGHT].grad = None

    def after(self, batch: Batch) -> None:
        """What the last step of a period cuts, once the optimizer around has moved the cores."""
        if self.period > 1 and self.steps % self.period == 0:
            left, core, right = (batch.values(place).double() for place in (LEFT, CORE, RIGHT))
            (left, by_left, _), (right, by_right, _) = _orthonormal(left), _orthonormal(right.mT)
            self._cut(batch, left, by_left @ core @ by_right, right.mT, self.tolerance)

    def _move(self, batch: Batch, tolerance: float) -> None:
        left, core, right = (torch.nan_to_num(batch.values(place).double()) for place in (LEFT, CORE, RIGHT))
        of_left, of_core, of_right = (batch.gradients(place).double() for place in (LEFT, CORE, RIGHT))
        lr, decay = self.rate(batch, CORE)
        turned = _inverse(core, torch.finfo(batch.dtype).eps).mT
        (left, by_left, to_left), (columns, by_right, to_right) = _orthonormal(left), _orthonormal(right.mT)
        right, core = columns.mT, by_left @ core @ by_right
        # gradients for the orthonormal factors: U = `left @ by_left` as it was, and V likewise
        to_k, to_l = of_left @ turned @ to_right, to_left @ turned @ of_right
        more_left, more_right = _basis(to_k, left), _basis(to_l.mT, columns)
        corner = torch.zeros_like(core)
        top = torch.cat([core * (1 - lr * decay) - lr * to_left @ of_core @ to_right, -lr * to_l @ more_right], -1)
        bottom = torch.cat([-lr * more_left.mT @ to_k, corner], -1)
        left, right = torch.cat([left, more_left], -1), torch.cat([right, more_right.mT], -2)
        self._cut(batch, left, torch.cat([top, bottom], -2), right, tolerance)

    def _cut(self, batch: Batch, left: Tensor, core: Tensor, right: Tensor, tolerance: float) -> None:
        """Store `left @ core @ right` with the rank that there is room for and the tolerance asks for."""
        u, d, v = torch.linalg.svd(torch.nan_to_num(core))
        room = batch.shape(CORE)[-1]
        # norms of the tails d[j:]; what is kept are the values whose own tail is not small enough
        tails = d.square().flip(-1).cumsum(-1).flip(-1).sqrt()
        kept = ((tails >= tolerance * tails[..., :1]) & (d > d[..., :1] * torch.finfo(batch.dtype).eps))[..., :room]
        zero = (d[..., :1] == 0).unsqueeze(
            -1
        )  # nothing has moved yet, a warmup begins at 0: the bases are still wanted
        new_left, new_right = left @ u[..., :room] * kept.unsqueeze(-2), v[..., :room, :] @ right * kept.unsqueeze(-1)
        batch.put(LEFT, torch.where(zero, left[..., :room], new_left).to(batch.dtype))
        batch.put(CORE, torch.diag_embed(d[..., :room] * kept).to(batch.dtype))
        batch.put(RIGHT, torch.where(zero, right[..., :room, :], new_right).to(batch.dtype))
        self.forget(one.tensors[CORE] for one in batch.factors)


def _orthonormal(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, root and its inverse: `matrix = q @ root`, orthonormal columns of q, zeros where `matrix` has them."""
    values, vectors = eigen(gram(matrix))
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    back = (vectors * reciprocal(values).sqrt().unsqueeze(-2)) @ vectors.mT
    return matrix @ back, root, back


def _inverse(matrix: Tensor, least: float) -> Tensor:
    """The pseudo-inverse of a square matrix in float64; singular values below a share of the largest are zeros."""
    found: Tensor = torch.linalg.pinv(torch.nan_to_num(matrix), rtol=least)
    return found


def _basis(matrix: Tensor, other: Tensor) -> Tensor:
    """An orthonormal basis of the columns of a matrix outside of those of `other`; zeros where there are fewer."""
    outside = matrix - other @ (other.mT @ matrix)
    outside = outside - other @ (other.mT @ outside)  # once leaves what rounding left
    # relative to the matrix: what is left of columns inside of `other` is rounding, and no direction
    least = matrix.square().sum((-2, -1)).unsqueeze(-1) * 1e-26
    values, vectors = eigen(gram(outside))
    inverse = torch.where(values > least, reciprocal(values).sqrt(), 0)
    found = outside @ (vectors * inverse.unsqueeze(-2))
    values, vectors = eigen(gram(found))  # again: the first basis is only as good as the squares of singular values
    return found @ (vectors * reciprocal(values).sqrt().unsqueeze(-2))
