"""What is compared of two models, weight by weight and product by product, and what is left out and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from surgery.analysis.products import Factor, Product
from surgery.analysis.spectra import Change, dense
from surgery.compiler.diagnostics import Diagnostics, fail

SHOWN = 6  # names that a message lists


@dataclass(frozen=True)
class Weight:
    """A weight of both models: W `[..., out, in]` of the base, and what the target adds to it, in float64, when asked.

    `rounded` is the dtype that the target, or the base, was rounded to; None where the change is known exactly.
    `untied` says that the base has one weight for two of the target's.
    """

    name: str
    shape: tuple[int, ...]
    own: Callable[[], Tensor]
    change: Callable[[], Change]
    rounded: torch.dtype | None = None
    untied: bool = False

    def target(self) -> Tensor:
        """W of the target, float64."""
        found: Tensor = self.own() + dense(self.change())
        return found


@dataclass(frozen=True)
class Matrix:
    """A factor of a product, `[out, in]` in float64 when asked; `rounded` is its dtype, None where it is exact."""

    factor: Factor
    read: Callable[[], Tensor]
    rounded: torch.dtype | None


@dataclass(frozen=True)
class LeftOut:
    """A weight that is not compared; `changed` is None where that is not known."""

    name: str
    reason: str
    changed: bool | None = None


@dataclass(frozen=True)
class Group:
    """A product of weights in both models, by its text; `base` and `target` are in the order of application."""

    product: Product
    base: Sequence[Matrix]
    target: Sequence[Matrix]

    @property
    def name(self) -> str:
        """As it is written."""
        return str(self.product)


@dataclass
class Pairs:
    """All there is to compare, and the warnings."""

    weights: list[Weight] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    found: Diagnostics = field(default_factory=Diagnostics)


class Sides(Protocol):
    """A base and a target, of whatever kind."""

    @property
    def base_names(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def target_names(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def names(self) -> Iterable[str]: ...  # noqa: D102

    def fill(self, pairs: Pairs, names: Iterable[str]) -> None: ...  # noqa: D102

    def of_base(self, factor: Factor) -> Matrix: ...  # noqa: D102

    def of_target(self, factor: Factor) -> Matrix: ...  # noqa: D102


def turned(read: Callable[[], Tensor], factor: Factor) -> Callable[[], Tensor]:
    """What a factor of a product reads."""
    return (lambda: read().mT) if factor.transposed else read


def check_factor(factor: Factor, reason: str | None, dimensions: int) -> None:
    """Raise SURG074 where a factor of a product is no matrix."""
    if reason is not None or dimensions != 2:
        reason = reason or "it is a stack of matrices"
        raise fail("SURG074", f"`{factor.name}` cannot be multiplied: {reason}", help="name matrices in --group")


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
