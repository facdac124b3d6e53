"""Conditions of `requires`, `when` and `where`: comparisons of numbers joined by and, or, not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.compiler.algebra.quantity import Quantity

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Condition:
    """`left operator right` of two quantities or two texts, or `and`, `or`, `not` of conditions."""

    operator: str
    parts: tuple[Condition | Quantity | str | bool, ...]

    @property
    def value(self) -> bool | None:
        """True or False, or None while a number in it is unknown."""
        if self.operator == "constant":
            return bool(self.parts[0])
        if self.operator in ("and", "or"):
            values = [part.value for part in self.parts if isinstance(part, Condition)]
            decided = self.operator == "or"
            if decided in values:
                return decided
            return None if None in values else not decided
        if self.operator == "not":
            (inner,) = self.parts
            assert isinstance(inner, Condition)
            return None if inner.value is None else not inner.value
        left, right = self.parts
        if isinstance(left, Quantity) and isinstance(right, Quantity):
            if left.constant is None or right.constant is None:
                return {"==": True, "<=": True, ">=": True, "!=": False}.get(self.operator) if left == right else None
            return COMPARE[self.operator](left.constant, right.constant)
        return COMPARE[self.operator](left, right)

    @property
    def symbols(self) -> frozenset[str]:
        """Names that the condition depends on."""
        found = frozenset[str]()
        for part in self.parts:
            if isinstance(part, Condition | Quantity):
                found |= part.symbols
        return found

    @property
    def source(self) -> str:
        """The condition as Python over the names that are unknown: `step > 50`."""
        if self.value is not None and not self.symbols:
            return str(self.value)
        if self.operator == "not":
            return f"not ({self._part(0)})"
        return f" {self.operator} ".join(
            f"({text})" if isinstance(part, Condition) and part.operator in ("and", "or") else text
            for part, text in ((part, self._part(index)) for index, part in enumerate(self.parts))
        )

    def _part(self, index: int) -> str:
        part = self.parts[index]
        return part.source if isinstance(part, Condition) else str(part) if isinstance(part, Quantity) else repr(part)

    @property
    def stays_true(self) -> bool:
        """Whether, once true, it is true at every later `step`: `step > c`, `step >= c`, and their and, or."""
        if "step" not in self.symbols:
            return True
        if self.operator in ("and", "or"):
            return all(isinstance(part, Condition) and part.stays_true for part in self.parts)
        if self.operator == "not" or self.operator not in ("<", "<=", ">", ">="):
            return False
        left, right = self.parts
        assert isinstance(left, Quantity) and isinstance(right, Quantity)
        low, high = (left, right) if self.operator in ("<", "<=") else (right, left)
        step = Quantity.symbol("step")
        # Only the plain form `c < step + d` is recognised, which is how a start is written.
        return "step" not in low.symbols and "step" not in (high - step).symbols


ALWAYS = Condition("constant", (True,))
