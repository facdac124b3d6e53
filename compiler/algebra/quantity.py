"""Numbers and sizes: exact where they are known, symbolic (`rank`, `in / groups`, `step`) where they are not yet.

A quantity is a sum of monomials in canonical form, so two equal sizes compare equal: `groups * (in / groups)` is `in`.
What has no such form (`round(sqrt(rank))`, `in // 2`) becomes one atom by its text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

Constant = int | Fraction | float
LARGEST = 1 << 62
MOST_TERMS = 64
LONGEST_ATOM = 1000  # characters; without a limit, names defined by names double it line by line
CLOCK = frozenset({"step", "steps"})


class ArithmeticProblem(ValueError):
    """An operation on numbers that has no answer; the message is for people."""


@dataclass(frozen=True)
class Atom:
    """A symbol, or an expression without a canonical form, by its text."""

    text: str
    symbols: frozenset[str]
    opaque: bool


Monomial = tuple[tuple[Atom, int], ...]


def _tidy(value: Constant) -> Constant:
    if isinstance(value, Fraction) and value.denominator == 1:
        value = value.numerator
    if isinstance(value, float) and not math.isfinite(value):
        raise ArithmeticProblem("the number is not finite")
    if isinstance(value, Fraction) and value.denominator > LARGEST:
        value = float(value)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ArithmeticProblem("the number is too large")
    return value


@dataclass(frozen=True)
class Quantity:
    """A number, known or symbolic; immutable, compared by value."""

    terms: tuple[tuple[Monomial, Constant], ...]

    FUNCTIONS: ClassVar[dict[str, Callable[..., Constant]]] = {
        "sqrt": math.sqrt,
        "exp": math.exp,
        "abs": abs,
        "sign": lambda value: (value > 0) - (value < 0),
        "round": round,
        "ceil": math.ceil,
        "min": lambda *values: min(values),
        "max": lambda *values: max(values),
        "tanh": math.tanh,
        "relu": lambda value: max(0, value),
        "sigmoid": lambda value: 0.5 + 0.5 * math.tanh(value / 2),
        "gelu": lambda value: 0.5 * value * (1 + math.erf(value / math.sqrt(2))),
    }

    @staticmethod
    def of(value: Constant) -> Quantity:
        """A known number."""
        value = _tidy(value)
        return Quantity((((), value),) if value != 0 else ())

    @staticmethod
    def symbol(name: str) -> Quantity:
        """An unknown of that name."""
        return Quantity(((((Atom(name, frozenset([name]), False), 1),), 1),))

    @staticmethod
    def unknown(text: str, *parts: Quantity) -> Quantity:
        """A number that is computed from others in a way that has no canonical form; `text` tells two of them apart."""
        if len(text) > LONGEST_ATOM:
            raise ArithmeticProblem("the expression has too many parts")
        symbols = frozenset[str]().union(*(part.symbols for part in parts))
        return Quantity(((((Atom(text, symbols, True), 1),), 1),))

    def _operation(self, sign: str, other: Quantity) -> Quantity:
        left, right = (f"({part})" if len(part.terms) > 1 else str(part) for part in (self, other))
        return self.unknown(f"({left} {sign} {right})", self, other)

    @staticmethod
    def _sum(terms: dict[Monomial, Constant]) -> Quantity:
        kept = [(monomial, _tidy(factor)) for monomial, factor in terms.items() if factor != 0]
        if len(kept) > MOST_TERMS:
            raise ArithmeticProblem("the expression has too many terms")
        kept.sort(key=lambda term: (not term[0], [(atom.text, exponent) for atom, exponent in term[0]]))
        return Quantity(tuple(kept))

    @property
    def constant(self) -> Constant | None:
        """The number, if it is known."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and not self.terms[0][0]:
            return self.terms[0][1]
        return None

    @property
    def whole(self) -> int | None:
        """The number, if it is known and whole (2.0 is)."""
        value = self.constant
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value if isinstance(value, int) else None

    @property
    def symbols(self) -> frozenset[str]:
        """Names that the number depends on."""
        return frozenset[str]().union(*(atom.symbols for monomial, _ in self.terms for atom, _ in monomial))

    @property
    def opaque(self) -> bool:
        """Whether some part of it has no canonical form, so that inequality of forms proves nothing."""
        return any(atom.opaque for monomial, _ in self.terms for atom, _ in monomial)

    def differs_from(self, other: Quantity) -> bool:
        """Whether the two are certainly not the same size.

        Unknown symbols count as different; opaque parts do not, and neither do heads: heads * head_dim may be `out`.
        """
        if (self.symbols | other.symbols) & {"heads", "head_dim"}:
            return False
        return self != other and not self.opaque and not other.opaque

    def __add__(self, other: Quantity) -> Quantity:
        terms = dict(self.terms)
        for monomial, factor in other.terms:
            terms[monomial] = terms.get(monomial, 0) + factor
        return self._sum(terms)

    def __neg__(self) -> Quantity:
        return Quantity(tuple((monomial, -factor) for monomial, factor in self.terms))

    def __sub__(self, other: Quantity) -> Quantity:
        return self + -other

    def __mul__(self, other: Quantity) -> Quantity:
        terms: dict[Monomial, Constant] = {}
        for left, a in self.terms:
            for right, b in other.terms:
                exponents = dict(left)
                for atom, exponent in right:
                    exponents[atom] = exponents.get(atom, 0) + exponent
                monomial = tuple(sorted(((a, e) for a, e in exponents.items() if e), key=lambda pair: pair[0].text))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return self._sum(terms)

    def __truediv__(self, other: Quantity) -> Quantity:
        divisor = other.constant
        if divisor is not None:
            if divisor == 0:
                raise ArithmeticProblem("division by zero")
            inverse: Constant = 1 / divisor if isinstance(divisor, float) else Fraction(1) / Fraction(divisor)
            if isinstance(divisor, float) and isinstance(self.constant, int | Fraction | float):
                return self.of(self.constant / divisor)  # one rounding, as Python divides
            return Quantity(tuple((monomial, _tidy(factor * inverse)) for monomial, factor in self.terms))
        if len(other.terms) == 1:
            self._check_divisor(other)
            monomial, factor = other.terms[0]
            return self * Quantity(((tuple((atom, -exponent) for atom, exponent in monomial), 1),)) / self.of(factor)
        self._check_divisor(other)
        return self._operation("/", other)

    def _check_divisor(self, other: Quantity) -> None:
        """What depends on the clock is computed at every step, so it must have a value at every step."""
        one_term = len(other.terms) == 1 and other.symbols == {"steps"} and not other.opaque
        if other.symbols & CLOCK and not one_term:
            raise ArithmeticProblem("a divisor cannot depend on the step, it would be zero at some step")

    def _whole_division(self, other: Quantity, sign: str) -> Quantity:
        left, right = self.constant, other.constant
        if left is None or right is None:
            self._check_divisor(other)
            return self._operation(sign, other)
        if right == 0:
            raise ArithmeticProblem("division by zero")
        return self.of(left // right if sign == "//" else left % right)

    def __floordiv__(self, other: Quantity) -> Quantity:
        return self._whole_division(other, "//")

    def __mod__(self, other: Quantity) -> Quantity:
        return self._whole_division(other, "%")

    def __pow__(self, other: Quantity) -> Quantity:
        base, exponent = self.constant, other.constant
        if base is None or exponent is None:
            if (self.symbols | other.symbols) & CLOCK:
                raise ArithmeticProblem("a power of the step is too large a number")
            return self._operation("**", other)
        if base == 0 and float(exponent) < 0:
            raise ArithmeticProblem("division by zero")
        if abs(float(exponent)) > 1024 or (base != 0 and abs(float(exponent)) * abs(math.log2(abs(float(base)))) > 512):
            raise ArithmeticProblem("the number is too large")
        if float(base) < 0 and not float(exponent).is_integer():
            raise ArithmeticProblem("a root of a negative number")
        if isinstance(base, int) and float(exponent).is_integer():
            return self.of(Fraction(base) ** int(exponent) if base else int(exponent == 0))
        return self.of(float(base) ** float(exponent))

    @classmethod
    def function(cls, name: str, *arguments: Quantity) -> Quantity:
        """A function of numbers by its name in the language; symbolic where an argument is."""
        values = [argument.constant for argument in arguments]
        if any(value is None for value in values):
            symbols = frozenset[str]().union(*(argument.symbols for argument in arguments))
            if symbols & CLOCK and name not in ("abs", "min", "max", "round"):  # what Python itself has, in the run
                raise ArithmeticProblem(f"{name} of the step is not built yet; abs, min, max and round are")
            return cls.unknown(f"{name}({', '.join(map(str, arguments))})", *arguments)
        try:
            return cls.of(cls.FUNCTIONS[name](*values))
        except (ValueError, OverflowError) as problem:
            raise ArithmeticProblem(f"{name} of {', '.join(map(str, arguments))} is not a number") from problem

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        text = " + ".join(self._term(monomial, factor) for monomial, factor in self.terms)
        return text.replace("+ -", "- ")

    @staticmethod
    def _term(monomial: Monomial, factor: Constant) -> str:
        def power(atom: Atom, exponent: int) -> str:
            return atom.text if exponent == 1 else f"{atom.text}**{exponent}"

        top = [power(atom, exponent) for atom, exponent in monomial if exponent > 0]
        bottom = [power(atom, -exponent) for atom, exponent in monomial if exponent < 0]
        numerator, denominator = (factor.numerator, factor.denominator) if isinstance(factor, Fraction) else (factor, 1)
        if denominator != 1:
            bottom.insert(0, str(denominator))
        sign = "-" if numerator == -1 and top else ""
        if abs(numerator) != 1 or not top or isinstance(numerator, float):
            top.insert(0, repr(numerator))
        return sign + " * ".join(top) + "".join(f" / {part}" for part in bottom)


def size(value: int) -> Quantity:
    """A known whole size."""
    return Quantity.of(value)


def value_of(quantity: Quantity) -> float | int:
    """A known number as Python has it; whole numbers stay whole."""
    constant = quantity.constant
    assert constant is not None, f"{quantity} is not known"
    return constant if isinstance(constant, int) else float(constant)


def whole_of(quantity: Quantity) -> int:
    """A known size."""
    whole = quantity.whole
    assert whole is not None, f"{quantity} is not a known size"
    return whole
