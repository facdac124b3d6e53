"""What a run changed of a model's weights, as small matrices in float64: what formats for adapters can hold.

A site multiplies with `scale * (W + left @ right)`, W the model's own weight, as it was before anything moved it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from surgery.compiler.algebra.base import logical
from surgery.compiler.algebra.change import NotNarrow, change
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.formula import AT_START, MethodFormula
from surgery.compiler.algebra.instance import evaluator_of, instance
from surgery.compiler.algebra.narrow import Narrow, narrow
from surgery.compiler.plan import Site
from surgery.runtime.adapted import Adapted

MORE = 8  # random vectors beyond the rank that is tried: all of a matrix of that rank is then found
UNITS = 64  # in the last place of W's largest entry: how far a sum in closed form may be from the W that a run holds

Pair = tuple[Tensor, Tensor]


class Exportable(Adapted, Protocol):
    """What exporting needs of a training step."""

    @property
    def step(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Factors:
    """`scale * (W + left @ right)`, all float64; a stack of experts is a leading axis.

    left `[..., out, rank]`, right `[..., rank, in]`, scale `[..., out]` or None for one. `rounding` is how far the W of
    the run is from what moved it, as a share of its largest entry: what storing it in its dtype took away.
    """

    left: Tensor
    right: Tensor
    scale: Tensor | None = None
    rounding: float = 0.0

    @property
    def rank(self) -> int:
        """The number of columns of left and of rows of right."""
        return self.left.shape[-1]


@torch.no_grad()
def factors_of(step: Exportable, site: Site) -> Factors:
    """How a site's weight differs from the model's own. Raises NotNarrow, whose text says why it has no such form."""
    if not site.parameter:
        raise NotNarrow("it has no weight")
    formula = instance(step.plan, site.formula)
    found = change(formula, site.bias)
    evaluator = evaluator_of(site, step.weights, torch.float64)
    left, right = _values(found.narrow, evaluator, site)
    scale = None
    if found.scale is not None:
        value = torch.as_tensor(evaluator.lifted(found.scale, 2), dtype=torch.float64)
        scale = value.expand(*_experts(site), site.shape[0], 1).squeeze(-1)
    moved = _moved(step, site, formula)
    if moved is None:
        return Factors(left, right, scale)
    own, now = moved
    (left, right), rounding = _with_movement(step, site, formula, own, now, (left, right))
    return Factors(left, right, scale, rounding)


def _experts(site: Site) -> tuple[int, ...]:
    return () if site.experts is None else (site.experts,)


def _values(found: Narrow | None, evaluator: Evaluator, site: Site) -> Pair:
    """The factors as numbers `[..., out, rank]` and `[..., rank, in]`, with what scales them in the left one."""
    rows, columns = site.shape
    if found is None:
        zeros = evaluator.like().new_zeros
        return zeros(*_experts(site), rows, 0), zeros(*_experts(site), 0, columns)
    left, right = evaluator(found.left) * found.scale, evaluator(found.right)
    return left.expand(*_experts(site), *left.shape[-2:]), right.expand(*_experts(site), *right.shape[-2:])


# --- weights that events moved ----------------------------------------------------------------------------------------


def _moved(step: Exportable, site: Site, formula: MethodFormula) -> Pair | None:
    """The model's own W and the run's `[..., out, in]`, float64; None where they are one."""
    if not (formula.moves_base or formula.corrections):
        return None
    stored = step.weights[site.parameter].detach()
    own = logical(step.model.get_parameter(site.parameter).detach().to(stored.device), site).double()
    now = logical(stored, site).double()
    return None if torch.equal(now, own) else (own, now)


def _with_movement(
    step: Exportable, site: Site, formula: MethodFormula, own: Tensor, now: Tensor, change: Pair
) -> tuple[Pair, float]:
    """Factors of all that differs from the model's own W, and the share of W that its dtype rounded away."""
    dtype = step.weights[site.parameter].dtype
    largest, unit = float(now.abs().max()), torch.finfo(dtype).eps

    def distance(pair: Pair, whole: Tensor) -> float:
        return float((whole - pair[0] @ pair[1]).abs().max()) / largest

    moved = now - own
    closed = min(_closed_forms(step, site, formula, own), key=lambda pair: distance(pair, moved), default=None)
    if closed is not None and distance(closed, moved) <= unit / 2 + UNITS * torch.finfo(wider(dtype)).eps:
        return _compressed(*_joined([change, closed])), distance(closed, moved)
    whole = moved + change[0] @ change[1]
    # every step that wrote W rounded it by up to half a unit, up or down
    noise = unit * _size(now) * math.sqrt(step.step + 1)
    found = _small_factors(whole, noise, 2 * change[0].shape[-1])  # a sum that telescopes has at most that rank
    return found, distance(found, whole)


def _closed_forms(step: Exportable, site: Site, formula: MethodFormula, own: Tensor) -> list[Pair]:
    """The sums of all that moved W where the equations say it: before telescoped ones have begun, and with them."""
    evaluator = evaluator_of(site, step.weights, torch.float64, own)
    pairs: list[Pair] = []
    begun: list[Pair] = []
    for event in formula.events:
        for moving in event.changes:
            if moving.target != "W":
                continue
            term = narrow(moving.value) if moving.operator in ("+=", "-=") and moving.value.shape else None
            if term is None or term.rest or not (event.from_start or event.phase == AT_START):
                return []
            left, right = _values(term, evaluator, site)
            pair = (left if moving.operator == "+=" else -left, right)
            (begun if event.from_start else pairs).append(pair)
    return [_joined(chosen) for chosen in (pairs, [*pairs, *begun]) if chosen]


def _joined(pairs: list[Pair]) -> Pair:
    """The sum of products as one product."""
    return torch.cat([left for left, _ in pairs], -1), torch.cat([right for _, right in pairs], -2)


def _small_factors(matrix: Tensor, noise: float, likely: int) -> Pair:
    """Factors of a matrix `[..., m, n]`, of the `likely` rank or of fewer numbers than it has, that leave but noise."""
    if matrix.dim() == 3:
        pairs = [_small_factors(one, noise, likely) for one in matrix]
        rank = max(left.shape[-1] for left, _ in pairs)
        lefts, rights = zip(*(padded(left, right, rank) for left, right in pairs), strict=True)
        return torch.stack(lefts), torch.stack(rights)
    noise = max(noise, 8 * torch.finfo(matrix.dtype).eps * _size(matrix))
    generator = torch.Generator().manual_seed(0)
    smaller, rank = min(matrix.shape), max(likely, MORE)
    most = max(likely, matrix.numel() // sum(matrix.shape))
    while True:
        whole = rank + MORE >= smaller
        if whole:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        else:
            basis = matrix @ torch.randn(matrix.shape[1], rank + MORE, generator=generator).to(matrix)
            basis = torch.linalg.qr(matrix @ (matrix.T @ torch.linalg.qr(basis).Q)).Q
            inner, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
            left = basis @ inner
        missed = values.new_zeros(()) if whole else (matrix - (left * values) @ right).square().sum()
        tails = (
            torch.cat([values.square(), missed[None]]).flip(0).cumsum(0).flip(0)
        )  # what is left after 0, 1 ... triples
        enough = int((tails > noise**2 * matrix.numel()).sum())
        if enough <= min(most, len(values)):
            return left[:, :enough] * values[:enough], right[:enough]
        if whole:
            raise NotNarrow("its steps moved W, and what they added has no small factors")
        rank *= 2


def _size(matrix: Tensor) -> float:
    """The root of the mean square of its entries."""
    return float(matrix.square().mean().sqrt())


def _compressed(left: Tensor, right: Tensor) -> Pair:
    """Factors of the same product, of its rank."""
    first, second = torch.linalg.qr(left), torch.linalg.qr(right.transpose(-1, -2))
    inner, values, outer = torch.linalg.svd(first.R @ second.R.transpose(-1, -2), full_matrices=False)
    least = values.max() * left.shape[-1] * torch.finfo(values.dtype).eps if values.numel() else 0.0
    rank = int((values > least).sum(-1).max())
    root = values[..., :rank].sqrt()
    right = outer[..., :rank, :] @ second.Q.transpose(-1, -2)
    return first.Q @ (inner[..., :rank] * root.unsqueeze(-2)), root.unsqueeze(-1) * right


def padded(left: Tensor, right: Tensor, rank: int) -> Pair:
    """The factors with columns and rows of zeros, up to a rank."""
    more = rank - left.shape[-1]
    return nn.functional.pad(left, (0, more)), nn.functional.pad(right, (0, 0, 0, more))
