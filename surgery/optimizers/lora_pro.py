"""LoRA-Pro: the moves of both factors whose effect on their product is closest to the full gradient.

Moves hA, hB of the factors of `M = scale * B @ A` move M along `scale * (B @ hA + hB @ A)`. Closest to g = dL/dM are

    hA = inverse(B.T @ B) @ gA / scale^2 + X @ A
    hB = (I - PB) @ gB @ inverse(A @ A.T) / scale^2 - B @ X,    PB = B @ inverse(B.T @ B) @ B.T

for any X, `[rank, rank]`: they give `PB @ g + (I - PB) @ g @ PA`, what g is on the tangent space of the matrices of
that rank. The X with the least change of the gradients gA, gB solves

    B.T @ B @ X + X @ A @ A.T = -inverse(B.T @ B) @ gA @ A.T / scale^2

Around SGD these moves take the place of the gradients. Around AdamW the moments are those of the product's move, of the
full size `[out, in]`: from that of the gradients they make the step G, and the moves are those above for G in place
of g, of which only `gA = scale * B.T @ G` and `gB = scale * G @ A.T` are needed. Inverses are pseudo-inverses of the
matrix and `damping * I`. Wang et al. 2024, arXiv:2407.18242.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from surgery.compiler.settings import at_least
from surgery.optimizers import BASES, optimizer
from surgery.optimizers.adamw import RoundingAdamW
from surgery.optimizers.factors import Batch, Eigen, FactorOptimizer, Factors, Place, inverse, reciprocal
from surgery.optimizers.rounding import SLICE


@optimizer("lora_pro", around=BASES, needs="pairs", moments={"adamw": 2}, damping=at_least(0))
class LoraPro(FactorOptimizer):
    """Around SGD it gives moves in place of gradients, around AdamW it moves the factors itself."""

    def __init__(self, base: torch.optim.Optimizer, factors: Iterable[Factors], damping: float = 1e-8) -> None:
        super().__init__(base, factors)
        self.damping = damping
        self.adaptive = isinstance(base, (torch.optim.AdamW, RoundingAdamW))
        self._grams: dict[tuple[Batch, int], Eigen] = {}

    def before(self) -> None:
        """Decompose all factors at once."""
        self._grams = self.grams()

    def start(self, batch: Batch) -> dict[tuple[str, Place], Tensor]:
        """The moments of the product, `[sites, out, in]`."""
        if not self.adaptive:
            return {}
        size = (len(batch.factors), *batch.shape(0)[:-1], batch.shape(1)[-1])
        return {
            (name, None): torch.zeros(size, dtype=batch.dtype, device=batch.device)
            for name in ("exp_avg", "exp_avg_sq")
        }

    def update(self, batch: Batch) -> None:
        """The equations above, over `[sites]`."""
        left, right = batch.values(0), batch.values(1)
        grams = self._grams.pop((batch, 0)), self._grams.pop((batch, 1))
        moves = Moves(left, right, grams, batch.scale, self.damping)
        gradients = batch.gradients(0), batch.gradients(1)
        if not self.adaptive:
            for place, move in enumerate(moves.closest(*gradients)):
                batch.put_gradients(place, move)
            return
        moved = moves.closest(*self._adapted(batch, left, right, *moves.plain(*gradients)))
        for place, (value, move) in enumerate(zip((left, right), moved, strict=True)):
            lr, decay = self.rate(batch, place)
            batch.put(place, value.mul_(1 - lr * decay).sub_(move, alpha=lr))

    def _adapted(
        self, batch: Batch, left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor
    ) -> tuple[Tensor, Tensor]:
        """AdamW's step of the product, as the gradients of the factors that it would come from."""
        (beta1, beta2), eps = self.param_groups[batch.groups[0] or 0]["betas"], self.param_groups[0]["eps"]
        mean, square = batch.state["exp_avg", None], batch.state["exp_avg_sq", None]
        some = max(1, SLICE // mean[0].numel())  # sites whose full-size matrices exist at a time
        for first in range(0, len(left), some):
            part = slice(first, first + some)
            move = batch.scale * (left[part] @ of_right[part] + of_left[part] @ right[part])
            mean[part].lerp_(move, 1 - beta1)
            square[part].mul_(beta2).addcmul_(move, move, value=1 - beta2)
            root = torch.sqrt(square[part], out=move).div_((1 - beta2**self.steps) ** 0.5).add_(eps)
            step = torch.div(mean[part], root, out=root).mul_(batch.scale / (1 - beta1**self.steps))
            of_left[part], of_right[part] = step @ right[part].mT, left[part].mT @ step
        return of_left, of_right


class Moves:
    """The moves of the factors `left` and `right`, `[sites, ...]`, for given gradients of them."""

    def __init__(
        self, left: Tensor, right: Tensor, grams: tuple[Eigen, Eigen], scale: float, damping: float
    ) -> None:  # fmt: skip
        self.left, self.right, self.grams = left, right, grams
        self.of_left, self.of_right = (inverse(one, damping).to(left.dtype) for one in grams)
        self.share = 1 / scale**2

    def plain(self, of_left: Tensor, of_right: Tensor) -> tuple[Tensor, Tensor]:
        """Those with X = 0."""
        outside = of_left - self.left @ (self.of_left @ (self.left.mT @ of_left))
        return self.share * (outside @ self.of_right), self.share * (self.of_left @ of_right)

    def closest(self, of_left: Tensor, of_right: Tensor) -> tuple[Tensor, Tensor]:
        """Those with the X that changes the gradients least."""
        left, right = self.plain(of_left, of_right)
        x = sylvester(*self.grams, -(right @ self.right.mT).double()).to(left.dtype)
        return left - self.left @ x, right + x @ self.right


def sylvester(first: Eigen, second: Eigen, of: Tensor) -> Tensor:
    """The X of `first @ X + X @ second = of` for positive semidefinite matrices by their `eigen`, `[..., rank, rank]`.

    Where both have a zero eigenvalue X is 0.
    """
    (a, u), (b, v) = first, second
    return u @ ((u.mT @ of @ v) * reciprocal(a.unsqueeze(-1) + b.unsqueeze(-2))) @ v.mT
