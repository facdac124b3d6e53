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

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity

Tensor = Any  # a torch.Tensor, or a torch.fx.Proxy while lowering


class ShapeProblem(ValueError):
    """Arguments whose shapes a structure does not take; message and help are for people."""

    def __init__(self, message: str, help: str | None = None) -> None:
        super().__init__(message)
        self.help = help


class Structure(ABC):
    """Base of all structures; `arity` is how many arguments it takes."""

    name: str
    arity: int = 1
    optional: tuple[str, ...] = ()  # names of the arguments that may follow
    sizes: tuple[int, ...] = ()  # positions of the arguments that are sizes: whole numbers of at least 1
    has_product = False
    wide = False  # whether the product runs in the dtype of weight algebra, float32 at least
    entrywise = False  # whether the product multiplies entry by entry, so that every row may have values of its own
    rowwise = False  # whether it treats every row of an activation by itself
    constant = False  # its dtype follows from no argument, so that it must be told dtype and device
    as_stored = False  # whether it takes what is stored without a cast, and computes in the dtype of weight algebra
    internal = False  # made by the compiler alone, no function of the language

    @abstractmethod
    def shape(self, *arguments: Expression) -> Shape:
        """Shape of the value; raises `ShapeProblem`. A number among the arguments has it as `value`."""

    @abstractmethod
    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        """The value of `node`, dense, in the dtype of its arguments; numbers come as numbers.

        Values may have more leading axes than the shapes of `node` say: axes are counted from the last.

        A structure that is `constant` gets a tensor first, whose dtype and device its own are to be.
        """

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        """`x @ M.T` if transposed, else `x @ M`, without forming M; only where `has_product`."""
        raise AssertionError(f"{self.name} has no fast product")

    def product_cost(self, node: Expression, rows: int) -> int:
        """Floating-point operations of `product` on `rows` rows, either way."""
        raise AssertionError(f"{self.name} has no fast product")

    def forms(self, node: Expression, dtype: torch.dtype) -> bool:
        """Whether products with the matrix itself, formed each time, are quicker for activations of that dtype."""
        return False

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        """Whether the value is zero, given which arguments are."""
        return False

    def is_identity(self, *arguments: Expression) -> bool:
        """Whether the value is the identity matrix, given its arguments at the start (see `is_filled`)."""
        return False

    def learning(self, arguments: Sequence[Expression]) -> Sequence[Expression]:
        """Those of the arguments that a gradient of the value reaches."""
        return arguments

    def keeps_zeros(self, kept: Sequence[bool]) -> bool:
        """Whether the value is zero wherever W is, given which arguments are."""
        return False

    def rank_bound(self, node: Expression, bounds: Sequence[Quantity | None]) -> Quantity | None:
        """A bound on the rank below the full one, given those of the arguments (None: full)."""
        return None


def is_filled(expression: Expression, value: int) -> bool:
    """Whether every entry of an expression, simplified at the start, is that number."""
    return expression.operation in ("filled", "number") and expression.value == Quantity.of(value)


def axis_of(name: str, *arguments: Expression) -> int:
    """The axis that the second argument names, counted from the last (-1 is the last); raises `ShapeProblem`."""
    axes, axis = len(arguments[0].shape), arguments[1].value
    whole = axis.whole if axis is not None else None
    if whole is None:
        raise ShapeProblem(f"the axis of {name} is a whole number that is known")
    if not -axes <= whole < axes:
        raise ShapeProblem(f"{name} has no axis {whole} here, the axes are 0..{axes - 1}")
    return whole if whole < 0 else whole - axes


def counting(like: Tensor, length: int) -> Tensor:
    """The numbers 0, 1 ... length - 1 as int64 on the device of a tensor."""
    return like.new_ones(length, dtype=torch.int64).cumsum(-1) - 1


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
