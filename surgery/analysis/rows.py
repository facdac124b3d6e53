"""What is asked of a comparison, and what is found of one weight or one group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from surgery.analysis.norms import Norm
from surgery.analysis.spectra import numerical_rank, rank_within, tails

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


def row_of(
    name: str, shape: tuple[int, ...], values: Tensor, base: float, noise: float, wanted: Wanted, layers: int = 1
) -> Row:
    """What singular values `[..., k]` of a change tell; `base` is the norm of what it changes, Frobenius."""
    left = tails(values, wanted.norm)
    size = float(left[0])
    limit = wanted.tolerance * (1.0 if wanted.absolute else size)
    rank = numerical_rank(values, noise)
    exact, suffices = (-(-found // layers) for found in (rank, rank_within(left, limit)))
    chosen = min(suffices, exact) if wanted.rank is None else min(wanted.rank, min(shape[-2:]))
    error = float(left[min(chosen * layers, len(left) - 1)])
    share = float(values.norm()) / base if base else 0.0
    return Row(name, shape, values.cpu(), size, share, rank, exact, suffices, chosen, error, noise, layers)
