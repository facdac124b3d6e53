"""What an event adds to W, where that is a narrow product or the difference of two."""

from __future__ import annotations

from dataclasses import dataclass, replace

from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.low_rank import Factors, factor
from surgery.compiler.algebra.narrow import without_numbers
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.schedule import reads_clock


@dataclass(frozen=True)
class Moved:
    """`scale * times * (now[0] @ now[1] - before[0] @ before[1])`, factors `[out, rank]` and `[rank, in]`.

    `times` is a number that the clock tells, None for one.
    """

    scale: float
    now: Factors
    before: Factors | None = None
    times: Quantity | None = None

    @property
    def factors(self) -> tuple[Expression, ...]:
        """All of them."""
        return (*self.now, *(self.before or ()))


def moved(change: Expression) -> Moved | None:
    """A change of W `[out, in]` in this form, or None for one that is not; all numbers are in front."""
    if change.operation == "multiply":
        for number, rest in (change.arguments, change.arguments[::-1]):
            if number.value is not None and reads_clock(number.value) and rest.shape == change.shape:
                found = moved(rest)
                return None if found is None else replace(found, times=number.value)
    scale, rest = without_numbers(change)
    if rest.operation == "subtract":
        now, before = map(_product, rest.arguments)
        if now is not None and before is not None and _alike(now, before):
            return Moved(scale * now.scale, now.now, before.now)
    return _product(change)


def _product(node: Expression) -> Moved | None:
    factors = factor(node)
    if factors is None:
        return None
    (left_scale, left), (right_scale, right) = map(without_numbers, factors)
    return Moved(left_scale * right_scale, (left, right))


def _alike(one: Moved, other: Moved) -> bool:
    return one.scale == other.scale and all(a.shape == b.shape for a, b in zip(one.now, other.now, strict=True))
