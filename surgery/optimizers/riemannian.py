"""Riemannian preconditioning: the gradient of each factor, measured by the other factor.

With A and B as they are before the step (the order of Jacobi: neither sees the other's new value),

    hA = inverse(B.T @ B + damping * I) @ gA,    hB = gB @ inverse(A @ A.T + damping * I)

go to the optimizer around in place of the gradients gA and gB. Around SGD with no damping, what the product does is
the same for all factors of the same product. Both inverses are pseudo-inverses, so that B = 0 gives hA = 0; `relative`
damping counts in means of the eigenvalues. Zhang and Pilanci 2024, arXiv:2402.02347.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from surgery.compiler.settings import at_least, truth
from surgery.optimizers import BASES, optimizer
from surgery.optimizers.factors import Batch, Eigen, FactorOptimizer, Factors, inverse


@optimizer("riemannian", around=BASES, needs="pairs", damping=at_least(0), relative=truth)
class Riemannian(FactorOptimizer):
    """Gives preconditioned gradients to the optimizer around."""

    def __init__(
        self, base: torch.optim.Optimizer, factors: Iterable[Factors], damping: float = 1e-6, relative: bool = False
    ) -> None:
        super().__init__(base, factors)
        self.damping, self.relative = damping, relative
        self._grams: dict[tuple[Batch, int], Eigen] = {}

    def before(self) -> None:
        """Decompose all factors at once."""
        self._grams = self.grams()

    def update(self, batch: Batch) -> None:
        """The equations above, over `[sites]`."""
        of_left, of_right = (
            inverse(self._grams.pop((batch, place)), self.damping, self.relative).to(batch.dtype) for place in (0, 1)
        )
        batch.put_gradients(0, batch.gradients(0) @ of_right)
        batch.put_gradients(1, of_left @ batch.gradients(1))
