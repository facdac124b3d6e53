"""LoRA-RITE: adaptive steps that do not depend on how a product is factored.

For a factor Z, `[n, rank]` (B, or A.T), and the other one `Y = U @ R` with orthonormal columns of U: the gradient
times inverse(R) is as if the other factor were U, "unmagnified". Momentum and second moments, `[rank, rank]`, are those
of it, in coordinates of U, and are carried over from the last step's U:

    g = gZ @ inverse(R);  0 where rms(g) > skip;  and of all factors together no longer than clip
    P = U.T @ U_before
    V' = P @ V @ P.T;  V = (1 - b2) * g.T @ g / n + b2 * V'
    e = b2 * (e + min(largest eigenvalue that V' lost, trace that it lost))       (with `escape`, else 0)
    S = g @ Q @ diag(1 / (sqrt(w + e) + eps)) @ Q.T,  V = Q @ diag(w) @ Q.T
    M = (1 - b1) * S + b1 * M @ P.T
    Z = Z - lr * M @ inverse(R).T - lr * weight_decay * Z

with b = beta * (1 - beta^(t-1)) / (1 - beta^t) in step t, from 1: bias corrected. Inverses are pseudo-inverses: while
B = 0 the gradient of A is 0, and so is the move. Everything else is trained by AdamW at the same rates. Yen et al.
2024, arXiv:2410.20625; the clipping, skipping and bias correction are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.compiler.settings import at_least, pair, truth
from surgery.optimizers import optimizer
from surgery.optimizers.factors import Batch, Eigen, FactorOptimizer, Factors, Place, reciprocal, together


@dataclass
class _Side:
    """The factors at one place of a batch, as columns: `[sites, n, rank]`, with what the step needs of the others."""

    values: Tensor
    gradient: Tensor  # unmagnified
    basis: Tensor  # U of the other factors
    inverse: Tensor  # inverse(R), [sites, rank, rank]
    turn: Tensor  # P
    second: Eigen | None = None  # of V


@optimizer(
    "lora_rite", needs="pairs", defaults={"eps": 1e-6},
    lr=at_least(0, above=True), weight_decay=at_least(0), betas=pair, eps=at_least(0, above=True),
    clip=at_least(0), skip=at_least(0), escape=truth,
)  # fmt: skip
class LoraRITE(FactorOptimizer):
    """Moves the factors; clip and skip do nothing where they are 0."""

    def __init__(
        self, base: torch.optim.Optimizer, factors: Iterable[Factors], clip: float = 1.0, skip: float = 1.0,
        escape: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(base, factors)
        self.clip, self.skip, self.escape = clip, skip, escape
        self._sides: dict[Batch, tuple[_Side, _Side]] = {}

    def start(self, batch: Batch) -> dict[tuple[str, Place], Tensor]:
        """Of a factor: momentum `[sites, n, rank]`, the other's basis, second moments, escaped mass `[sites, 1, 1]`."""
        found: dict[tuple[str, Place], Tensor] = {}
        for place, other in ((0, 1), (1, 0)):
            mine, theirs = self._columns(batch, place), self._columns(batch, other)
            second = mine.new_zeros(*mine.shape[:-2], mine.shape[-1], mine.shape[-1])
            found |= {
                ("momentum", place): torch.zeros_like(mine), ("basis", place): torch.zeros_like(theirs),
                ("second", place): second, ("escaped", place): torch.zeros_like(second[..., :1, :1]),
            }  # fmt: skip
        return found

    @staticmethod
    def _columns(batch: Batch, place: int) -> Tensor:
        values = batch.values(place)
        return values.mT.contiguous() if place else values

    def before(self) -> None:
        """Unmagnified gradients of all factors, no longer than `clip` together."""
        grams = self.grams()
        self._sides = {batch: self._unmagnified(batch, grams) for batch in self.batches}
        sides = [(batch, place, side) for batch, both in self._sides.items() for place, side in enumerate(both)]
        gradients = [side.gradient for _, _, side in sides]
        if self.clip:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one).double() for one in gradients]))
            for gradient in gradients:
                gradient.mul_((self.clip / norm).clamp(max=1.0))
        seconds = together([self._second(batch, place, side) for batch, place, side in sides])
        for (_, _, side), second in zip(sides, seconds, strict=True):
            side.second = second

    def _second(self, batch: Batch, place: int, side: _Side) -> Tensor:
        """Carry second moments over to the new basis and add those of this step; in float64."""
        beta = _corrected(self.param_groups[batch.groups[place] or 0]["betas"][1], self.steps)
        second, escaped = batch.state["second", place], batch.state["escaped", place]
        moved = side.turn @ second @ side.turn.mT
        if self.escape:
            escaped.add_(_lost(second, moved)).mul_(beta)
        own = side.gradient.mT @ side.gradient / side.values.shape[-2]
        second.copy_(torch.lerp(own, moved, beta))
        return _symmetric(second)

    def _unmagnified(self, batch: Batch, grams: dict[tuple[Batch, int], Eigen]) -> tuple[_Side, _Side]:
        columns = self._columns(batch, 0), self._columns(batch, 1)
        gradients = batch.gradients(0), batch.gradients(1).mT
        sides = []
        for place, other in ((0, 1), (1, 0)):
            values, vectors = grams[batch, other]
            inverse = (vectors * reciprocal(values).sqrt().unsqueeze(-2)).to(batch.dtype)
            gradient = gradients[place] @ inverse
            if self.skip:
                size = gradient.square().mean((-2, -1), keepdim=True).sqrt()
                gradient = torch.where(size > self.skip, 0, gradient)
            basis = columns[other] @ inverse
            turn = (basis.double().mT @ batch.state["basis", place].double()).to(batch.dtype)
            sides.append(_Side(columns[place], gradient, basis, inverse, turn))
        return sides[0], sides[1]

    def update(self, batch: Batch) -> None:
        """The rest of the equations above, over `[sites]`."""
        for place, side in enumerate(self._sides.pop(batch)):
            group = self.param_groups[batch.groups[place] or 0]
            beta = _corrected(group["betas"][0], self.steps)
            momentum, basis, escaped = (batch.state[name, place] for name in ("momentum", "basis", "escaped"))
            assert side.second is not None
            values, vectors = side.second
            root = (values + escaped.double().squeeze(-1)).sqrt() + group["eps"]
            scaled = side.gradient @ ((vectors / root.unsqueeze(-2)) @ vectors.mT).to(batch.dtype)
            momentum.copy_(torch.lerp(scaled, momentum @ side.turn.mT, beta))
            basis.copy_(side.basis)
            lr, decay = group["lr"], group["weight_decay"]
            new = side.values * (1 - lr * decay) - lr * momentum @ side.inverse.mT
            batch.put(place, new.mT if place else new)


def _corrected(beta: float, step: int) -> float:
    """The decay with which no later correction of the bias is needed; `step` counts from 1."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part in float64; what is not finite counts as 0, as in `gram`."""
    wide = torch.nan_to_num(matrix.double(), nan=0.0, posinf=0.0, neginf=0.0)
    return (wide + wide.mT) / 2


def _lost(before: Tensor, after: Tensor) -> Tensor:
    """What second moments lose in the turn to another basis, `[sites, 1, 1]`."""
    old, new = (torch.linalg.eigvalsh(_symmetric(matrix)) for matrix in (before, after))
    most = (old - new).amax(-1).clamp(min=0)
    trace = (old.sum(-1) - new.sum(-1)).clamp(min=0)
    return torch.minimum(most, trace)[..., None, None].to(before.dtype)
