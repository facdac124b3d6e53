"""LoRA-FA's gradient: of all that one factor can do while the other is frozen, what is closest to the full gradient.

With `M = scale * B @ A`, A frozen and g = dL/dM, the change of B whose effect on M is closest to g is

    hB = gB @ inverse(A @ A.T + damping * I) / scale^2,    so that scale * hB @ A = g @ (projection on the rows of A)

and goes to the optimizer around in place of gB; with B frozen alike. Zhang et al. 2023, arXiv:2308.03303, as the
optimizer of that name in peft corrects it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from surgery.compiler.settings import at_least
from surgery.optimizers import BASES, optimizer
from surgery.optimizers.factors import Batch, Eigen, FactorOptimizer, Factors, gram, inverse, together


@optimizer("lora_fa", around=BASES, needs="half_pairs", damping=at_least(0))
class LoraFA(FactorOptimizer):
    """Gives corrected gradients to the optimizer around."""

    def __init__(self, base: torch.optim.Optimizer, factors: Iterable[Factors], damping: float = 1e-8) -> None:
        super().__init__(base, factors)
        self.damping = damping
        self._frozen: dict[Batch, Eigen] = {}

    def before(self) -> None:
        """Decompose all frozen factors at once."""
        values = [batch.values(1).mT if batch.groups[1] is None else batch.values(0) for batch in self.batches]
        self._frozen = dict(zip(self.batches, together([gram(one) for one in values]), strict=True))

    def update(self, batch: Batch) -> None:
        """The equation above, over `[sites]`."""
        by = (inverse(self._frozen.pop(batch), self.damping) / batch.scale**2).to(batch.dtype)
        if batch.groups[1] is None:  # the right factor is frozen
            batch.put_gradients(0, batch.gradients(0) @ by)
        else:
            batch.put_gradients(1, by @ batch.gradients(1))
