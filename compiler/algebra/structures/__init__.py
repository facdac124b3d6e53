"""Structured matrices and functions, one file each; being in this folder is the registration.

A structure states its shape and its value; where it has them also a fast product, and what it does to zeros and rank.
Everything else (facts, strategies, lowering) is derived. Values are plain torch functions of tensors, so the same code
runs on tensors and records fx nodes on proxies.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity

Tensor = Any  # a torch.Tensor, or a torch.fx.Proxy while lowering


class ShapeProblem(ValueError):
    """Arguments whose shapes a structure does not take; the message is for people."""


class Structure(ABC):
    """Base of all structures; `arity` is how many arguments it takes."""

    name: str
    arity: int = 1
    has_product = False
    rowwise = False  # whether it treats every row of an activation by itself
    constant = False  # made of numbers alone, so that it must be told dtype and device

    @abstractmethod
    def shape(self, *arguments: Expression) -> Shape:
        """Shape of the value; raises `ShapeProblem`. A number among the arguments has it as `value`."""

    @abstractmethod
    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        """The value, dense, in the dtype of its arguments; numbers come as numbers.

        A structure that is `constant` gets a tensor first, whose dtype and device its own are to be.
        """

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        """`x @ M.T` (`x @ M` if transposed) without forming M; only where `has_product`."""
        raise AssertionError(f"{self.name} has no fast product")

    def product_cost(self, node: Expression, rows: int) -> int:
        """Floating-point operations of `product` on `rows` rows."""
        raise AssertionError(f"{self.name} has no fast product")

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        """Whether the value is zero, given which arguments are."""
        return False

    def keeps_zeros(self, kept: Sequence[bool]) -> bool:
        """Whether the value is zero wherever W is, given which arguments are."""
        return False

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        """A bound on the rank below the full one, given those of the arguments (None: full)."""
        return None


STRUCTURES: dict[str, Structure] = {}
Kind = TypeVar("Kind", bound=type[Structure])


def structure(*names: str) -> Any:
    """Register a structure under its name in the language."""

    def register(kind: Kind) -> Kind:
        for name in names:
            if name in STRUCTURES:
                raise ValueError(f"two structures are called {name}")
            STRUCTURES[name] = kind()
            STRUCTURES[name].name = name
        return kind

    return register


def is_structure(expression: Expression) -> bool:
    """Whether a node is a structure or function rather than an operator or a leaf."""
    return expression.operation in STRUCTURES


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
