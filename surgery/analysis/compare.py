"""Which rank each change of a weight needs, and each group of weights, and what a lower rank leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgery.analysis.chains import construct, distance, product, spectral_norm
from surgery.analysis.norms import Norm
from surgery.analysis.spectra import (
    Pair,
    arithmetic,
    decomposed,
    dense,
    numerical_rank,
    rank_within,
    rounding,
    singular_values,
    tails,
    truncated,
)
from surgery.analysis.weights import Group, LeftOut, Pairs, Weight
from surgery.compiler.algebra.affine import NotAffine
from surgery.compiler.diagnostics import Diagnostic, fail

REACHED = 1e-6  # share of the change by which a constructed product may miss its bound: what inverses lose in float64


@dataclass(frozen=True)
class Wanted:
    """What is asked of a comparison: a tolerance, as a share of the change unless it is `absolute`, and the norm.

    `rank` is that of errors and adapters; None for those that suffice, as far as the change stands out of rounding.
    """

    tolerance: float = 0.05
    norm: Norm = Norm.spectral
    absolute: bool = False
    rank: int | None = None


@dataclass(frozen=True)
class Row:
    """What is found of a weight, or of a group of `layers` weights of which each gets an adapter of a rank.

    All distances are in the norm that was asked for. `rank` is that of the change, as far as it stands out of `noise`
    (the spectral norm of what rounding adds); `exact` is the rank of adapters that reach all of it, `suffices` the one
    that reaches the tolerance, `chosen` the one of which `error` tells what it leaves. `values` are singular values of
    the change, `[k]`, of a stack of experts `[experts, k]`. For a group `reached` is the distance of the constructed
    product, and `error` the bound below which no adapters of that rank come.
    """

    name: str
    shape: tuple[int, ...]
    values: Tensor = field(repr=False)
    size: float  # of the change
    share: float  # of the change in the base's weight, by Frobenius' norm
    rank: int
    exact: int
    suffices: int
    chosen: int
    error: float
    noise: float
    layers: int = 1
    reached: float | None = None

    @property
    def attained(self) -> bool:
        """Whether adapters of the chosen rank exist with that error: always for one weight."""
        return self.reached is None or self.reached <= self.error + REACHED * self.size

    @property
    def limited(self) -> bool:
        """Whether more is asked than stands out of the rounding: ranks above `exact` would fit noise."""
        return self.suffices > self.exact

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        said = {
            "name": self.name, "shape": list(self.shape), "size": self.size, "share": self.share, "rank": self.rank,
            "exact": self.exact, "suffices": self.suffices, "chosen": self.chosen, "error": self.error,
            "relative_error": self.error / self.size if self.size else 0.0, "noise": self.noise,
        }  # fmt: skip
        if self.reached is not None:
            said |= {"layers": self.layers, "reached": self.reached, "attained": self.attained}
        return said | {"singular_values": self.values.tolist()}


@dataclass(frozen=True)
class Comparison:
    """All that is found of two models."""

    base: str
    target: str
    wanted: Wanted
    weights: list[Row]
    groups: list[Row]
    left_out: list[LeftOut]
    warnings: list[Diagnostic]

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        wanted = self.wanted
        return {
            "base": self.base, "target": self.target, "tolerance": wanted.tolerance, "absolute": wanted.absolute,
            "norm": str(wanted.norm), "rank": wanted.rank,
            "weights": [row.as_dict() for row in self.weights], "groups": [row.as_dict() for row in self.groups],
            "left_out": [{"name": left.name, "reason": left.reason, "changed": left.changed} for left in self.left_out],
        }  # fmt: skip


@torch.no_grad()
def compare(
    base: str, target: str, pairs: Pairs, wanted: Wanted, device: torch.device, *, keep: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[Comparison, dict[str, Pair]]:  # fmt: skip
    """Measure every weight and group, one after the other on the device; with `keep` the adapters come back too.

    The adapters have the chosen ranks and are on the CPU; a weight that did not change has none. Raises SURG074 where
    those of a group are asked for and do not exist.
    """
    weights: list[Row] = []
    groups: list[Row] = []
    left_out = list(pairs.left_out)
    adapters: dict[str, Pair] = {}
    for weight in pairs.weights:
        progress(weight.name)
        try:
            row, pair = _weight(weight, wanted, device, keep)
        except NotAffine as reason:
            left_out.append(LeftOut(weight.name, f"it has no effective weight: {reason}"))
            continue
        weights.append(row)
        adapters |= {} if pair is None else {weight.name: pair}
    for group in pairs.groups:
        progress(group.name)
        row, found = _group(group, wanted, device)
        if keep and not row.attained:
            message = f"no adapters of rank {row.chosen} are constructed for `{row.name}`: the product would miss by "
            help = "the construction needs weights that are no narrower inside than outside, and that can be inverted"
            raise fail("SURG074", f"{message}{row.reached:.3g}, not {row.error:.3g}", group.product.span, help=help)
        groups.append(row)
        adapters |= found
    return Comparison(base, target, wanted, weights, groups, left_out, pairs.found.warnings), adapters


def _weight(weight: Weight, wanted: Wanted, device: torch.device, keep: bool) -> tuple[Row, Pair | None]:
    own, change = weight.own().to(device), weight.change()
    change = (change[0].to(device), change[1].to(device)) if isinstance(change, tuple) else change.to(device)
    triples = decomposed(change) if keep else None
    values = triples[1] if triples else singular_values(change)
    # factors are known by themselves, a matrix as a difference to W
    noise = arithmetic(values, weight.shape, 0.0 if isinstance(change, tuple) else float(own.norm()))
    if weight.rounded is not None:
        noise += rounding(own + dense(change), weight.rounded)
    row = _row(weight.name, weight.shape, values, float(own.norm()), noise, wanted)
    if triples is None or row.chosen == 0 or row.size == 0:
        return row, None
    left, right = truncated(triples, row.chosen)
    return row, (left.cpu(), right.cpu())


def _row(
    name: str, shape: tuple[int, ...], values: Tensor, base: float, noise: float, wanted: Wanted, layers: int = 1
) -> Row:
    left = tails(values, wanted.norm)
    size = float(left[0])
    limit = wanted.tolerance * (1.0 if wanted.absolute else size)
    rank = numerical_rank(values, noise)
    exact, suffices = (-(-found // layers) for found in (rank, rank_within(left, limit)))
    chosen = min(suffices, exact) if wanted.rank is None else min(wanted.rank, min(shape[-2:]))
    error = float(left[min(chosen * layers, len(left) - 1)])
    share = float(values.norm()) / base if base else 0.0
    return Row(name, shape, values.cpu(), size, share, rank, exact, suffices, chosen, error, noise, layers)


def _group(group: Group, wanted: Wanted, device: torch.device) -> tuple[Row, dict[str, Pair]]:
    weights = [matrix.read().to(device) for matrix in group.base]
    targets = [matrix.read().to(device) for matrix in group.target]
    for matrices in (weights, targets):
        _check_chain(group, matrices)
    now, wished = product(weights), product(targets)
    if now.shape != wished.shape:
        message = f"the product in the base is {list(now.shape)}, that in the target {list(wished.shape)}"
        raise fail("SURG005", message, group.product.span)
    values = singular_values(wished - now)
    noise = _noise(group, targets) + arithmetic(values, tuple(now.shape), float(now.norm()))
    row = _row(group.name, tuple(now.shape), values, float(now.norm()), noise, wanted, len(weights))
    adapters = construct(weights, wished, row.chosen)
    reached = distance(weights, adapters, wished, wanted.norm)
    found: dict[str, Pair] = {}
    for matrix, (first, second) in zip(group.base, adapters, strict=True):
        pair = (second.mT, first.mT) if matrix.factor.transposed else (first, second)
        if pair[0].shape[1]:  # the last of a group may have nothing to do
            found[matrix.factor.name] = (pair[0].cpu(), pair[1].cpu())
    return replace(row, reached=reached), found


def _check_chain(group: Group, matrices: list[Tensor]) -> None:
    """SURG005 where weights in the order of application do not follow one another."""
    for first, second in zip(matrices, matrices[1:], strict=False):
        if second.shape[1] != first.shape[0]:
            message = f"{list(second.shape)} @ {list(first.shape)} do not fit in `{group.name}`"
            help = "the last weight to be applied comes first, as in `B @ A`; `.T` transposes one"
            raise fail("SURG005", message, group.product.span, help=help)


def _noise(group: Group, targets: list[Tensor]) -> float:
    """What rounding each weight of the target adds to their product, to first order."""
    sizes = [spectral_norm(target) for target in targets]
    found = 0.0
    for number, (matrix, target) in enumerate(zip(group.target, targets, strict=True)):
        if matrix.rounded is not None:
            others = [size for place, size in enumerate(sizes) if place != number]
            found += rounding(target, matrix.rounded) * math.prod(others)
    return found
