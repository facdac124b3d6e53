"""Sizes and numbers: exact, canonical where they are symbolic, bounded in what they may grow to."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.compiler.algebra.condition import Condition
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.quantity import LARGEST, ArithmeticProblem, Quantity
from surgery.compiler.algebra.structures import STRUCTURES

INSIDE, OUT, RANK = (Quantity.symbol(name) for name in ("in", "out", "rank"))
STEP, STEPS = Quantity.symbol("step"), Quantity.symbol("steps")
ONE, TWO = Quantity.of(1), Quantity.of(2)


def test_equal_sizes_are_equal() -> None:
    assert RANK * (INSIDE / RANK) == INSIDE
    assert INSIDE + OUT == OUT + INSIDE
    assert (INSIDE + OUT) * TWO - OUT == INSIDE + INSIDE + OUT
    assert Quantity.of(0) == INSIDE - INSIDE
    assert (INSIDE / RANK) * (RANK / INSIDE) == ONE
    assert INSIDE / TWO + INSIDE / TWO == INSIDE


def test_text() -> None:
    assert str(INSIDE / RANK) == "in / rank"
    assert str(INSIDE - ONE) == "in - 1"
    assert str(-INSIDE) == "-in"
    assert str(TWO * INSIDE * RANK) == "2 * in * rank"
    assert str(INSIDE // TWO) == "(in // 2)"
    assert str(Quantity.function("sqrt", RANK)) == "sqrt(rank)"
    assert str(Quantity.of(0)) == "0"


def test_division_is_exact() -> None:
    third = ONE / Quantity.of(3)
    assert third.constant == Fraction(1, 3) and third.whole is None
    assert (third * Quantity.of(3)).whole == 1
    assert Quantity.of(2.0).whole == 2
    assert (Quantity.of(16.0) / Quantity.of(8)).constant == 2


def test_only_certain_differences_are_differences() -> None:
    assert INSIDE.differs_from(OUT)
    assert not INSIDE.differs_from(INSIDE)
    # what has no canonical form may be equal to anything
    assert not Quantity.function("round", INSIDE).differs_from(OUT)


@pytest.mark.parametrize(
    ("left", "sign", "right"),
    [
        (ONE, "/", Quantity.of(0)),
        (ONE, "//", Quantity.of(0)),
        (ONE, "%", Quantity.of(0)),
        (Quantity.of(0), "**", -ONE),
        (-ONE, "**", Quantity.of(0.5)),
        (Quantity.of(9), "**", Quantity.of(9**9)),
        (Quantity.of(2), "**", Quantity.of(63)),
        (ONE, "/", STEP),
        (ONE, "/", STEPS - ONE),
        (STEPS, "%", STEP),
        (STEP, "**", STEP),
        (TWO, "**", STEP),
    ],
)
def test_what_has_no_answer(left: Quantity, sign: str, right: Quantity) -> None:
    operations = {
        "/": Quantity.__truediv__, "//": Quantity.__floordiv__, "%": Quantity.__mod__, "**": Quantity.__pow__,
    }  # fmt: skip
    with pytest.raises(ArithmeticProblem):
        operations[sign](left, right)


@pytest.mark.parametrize("value", [LARGEST + 1, float("inf"), float("nan")])
def test_numbers_without_a_place(value: float) -> None:
    with pytest.raises(ArithmeticProblem):
        Quantity.of(value)


def test_growth_is_bounded() -> None:
    value = INSIDE
    with pytest.raises(ArithmeticProblem, match="too many parts"):
        for _ in range(64):
            value = Quantity.function("sqrt", value + value // TWO)
    value = INSIDE + OUT + RANK + ONE
    with pytest.raises(ArithmeticProblem, match="too many terms"):
        for _ in range(64):
            value = value * (INSIDE + OUT + RANK + ONE)


@pytest.mark.parametrize("name", ["sqrt", "exp", "tanh"])
def test_functions_of_the_step_are_those_that_python_has(name: str) -> None:
    with pytest.raises(ArithmeticProblem, match="of the step"):
        Quantity.function(name, STEP)
    assert str(Quantity.function("max", STEP, TWO)) == "max(step, 2)"


@pytest.mark.parametrize("name", sorted(Quantity.FUNCTIONS.keys() & STRUCTURES.keys()))
def test_functions_of_numbers_are_those_of_tensors(name: str) -> None:
    for value in (0.25, 2.0, 300.0):
        known = Quantity.function(name, Quantity.of(value)).constant
        expected = STRUCTURES[name].evaluate(
            Expression(name, (Expression("number"),)), torch.tensor(value, dtype=torch.float64)
        )
        assert known is not None and float(known) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", sorted(name for name, kind in STRUCTURES.items() if not kind.internal))
def test_a_function_of_a_number_is_computed_or_refused(name: str) -> None:
    text = f"method m() {{\nA = train zeros[out, in]\ndelta = {name}(2) * A\n}}\nadapt 0 {{ with m }}"
    try:
        surgery.plan(surgery.parse(text), nn.Sequential(nn.Linear(4, 3)))
    except surgery.SurgError as error:
        assert {found.code for found in error.diagnostics} <= {"SURG004", "SURG005"}


numbers = st.integers(-1000, 1000) | st.fractions(-100, 100, max_denominator=50)


@given(numbers, numbers, numbers)
def test_arithmetic_is_that_of_fractions(a: Fraction, b: Fraction, c: Fraction) -> None:
    left, middle, right = map(Quantity.of, (a, b, c))
    assert (left + middle * right).constant == a + b * c
    assert (left * middle - right).constant == a * b - c
    if b:
        assert (left / middle).constant == Fraction(a) / Fraction(b)
        assert (left // middle).constant == a // b
        assert (left % middle).constant == a % b


@given(numbers, numbers, st.integers(1, 9), st.integers(1, 9))
def test_symbols_stand_for_any_number(a: Fraction, b: Fraction, x: int, y: int) -> None:
    """The symbolic result, read as Python, is the result at every value."""

    def formula(first: Quantity, second: Quantity) -> Quantity:
        return (first * Quantity.of(a) + second / first) * (first - Quantity.of(b))

    symbolic = eval(str(formula(INSIDE, RANK)).replace("in", "x").replace("rank", "y"), {"x": x, "y": y})
    known = formula(Quantity.of(x), Quantity.of(y)).constant
    assert known is not None and float(symbolic) == pytest.approx(float(known))


def compare(operator: str, left: Quantity, right: Quantity) -> Condition:
    return Condition(operator, (left, right))


@pytest.mark.parametrize(
    ("condition", "stays"),
    [
        (compare(">", STEP, Quantity.of(50)), True),
        (compare(">=", STEP + ONE, RANK), True),
        (compare("<", Quantity.of(50), STEP), True),
        (compare("<=", STEP, Quantity.of(50)), False),
        (compare(">", TWO, STEP), False),
        (compare("==", STEP, Quantity.of(50)), False),
        (compare(">", STEPS - STEP, TWO), False),
        (compare("==", STEP % TWO, Quantity.of(0)), False),
        (compare(">", STEPS, Quantity.of(10)), True),
        (Condition("and", (compare(">", STEP, ONE), compare(">", STEP, TWO))), True),
        (Condition("or", (compare(">", STEP, ONE), compare("<", STEP, TWO))), False),
        (Condition("not", (compare(">", STEP, ONE),)), False),
        (Condition("constant", (True,)), True),
    ],
)
def test_conditions_that_stay_true(condition: Condition, stays: bool) -> None:
    assert condition.stays_true is stays


def test_a_condition_is_python() -> None:
    condition = Condition("and", (compare(">", STEP, TWO), Condition("not", (compare("<", STEPS, TWO),))))
    assert condition.source == "step > 2 and not (steps < 2)"
    assert condition.value is None and condition.symbols == {"step", "steps"}
    assert compare("==", INSIDE, INSIDE).value is True and compare("<", INSIDE, INSIDE).value is None
