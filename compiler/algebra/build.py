"""Tree to algebra: expressions with shapes, located shape errors, and conditions.

The same code reads a method twice: with symbolic sizes (`surgery check`, the methods table) and with a site's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.calls import read_call
from surgery.compiler.algebra.condition import COMPARE, Condition
from surgery.compiler.algebra.expression import Expression, negated, number, transposed
from surgery.compiler.algebra.in_time import NOISE, Occasion, noise
from surgery.compiler.algebra.measured import Gain
from surgery.compiler.algebra.names import COORDINATES, STARTS
from surgery.compiler.algebra.quantity import LARGEST, ArithmeticProblem, Quantity
from surgery.compiler.algebra.shapes import broadcast_shape, check_extent, product_shape, spelt
from surgery.compiler.algebra.slices import sliced
from surgery.compiler.diagnostics import SurgError, did_you_mean, fail
from surgery.compiler.printer import show

if TYPE_CHECKING:
    from surgery.compiler.algebra.formula import TensorFormula

Value = Expression | str | bool

MAXIMUM_PARTS = 5_000  # of an expression with the names in it written out: they may double it line by line
MAXIMUM_DEPTH = 100  # so that every later pass may recurse
MAXIMUM_TERMS = 1_024  # of a sum over a range, and of ranges within ranges


@dataclass(frozen=True)
class Builder:
    """Reads expressions in the scope of `names`; every error is a `SurgError` at the node that caused it."""

    names: Mapping[str, Value]
    occasion: Occasion | None = None  # in an event
    used: set[str] = field(default_factory=set)
    earlier: Callable[[Quantity], bool] | None = None  # whether there is a site so many blocks earlier
    most_terms: int = MAXIMUM_TERMS
    tensors: dict[str, TensorFormula] | None = None  # where tensors that no statement names are entered
    measured: Callable[[Gain], Quantity] | None = None  # numbers of the data, where a rule gives its parameters

    def number(self, node: nodes.Expr, what: str = "a number") -> Quantity:
        """The expression's value where only a number will do."""
        value = self.expression(node)
        if value.value is None or value.shape:
            raise fail("SURG004", f"{what} is needed here, this is {spelt(value.shape)}", node.span)
        return value.value

    def size(self, node: nodes.Expr) -> Quantity:
        """The expression's value where a whole, positive number is needed: a size or an index."""
        value = self.number(node, "a whole number")
        if value.constant is None:
            return value
        if value.whole is None:
            raise self._remainder(node, value)
        if abs(value.whole) > LARGEST:
            raise fail("SURG004", f"`{show(node)}` is {value}, too large for a size", node.span)
        return Quantity.of(value.whole)

    def _remainder(self, node: nodes.Expr, value: Quantity) -> SurgError:
        division = node
        if isinstance(division, nodes.Binary) and division.operator == "/":
            left, right = self.number(division.left), self.number(division.right)
            return fail(
                "SURG027",
                f"`{show(node)}` is {left} / {right}, which leaves a remainder",
                node.span,
                help=f"a whole number is needed here: choose a divisor of {left}",
            )
        return fail("SURG027", f"`{show(node)}` is {value}, not a whole number", node.span)

    def text(self, node: nodes.Expr) -> str:
        """The expression's value where only a text will do."""
        value = self.value(node)
        if not isinstance(value, str):
            raise fail("SURG004", "a text in double quotes is needed here", node.span)
        return value

    def expression(self, node: nodes.Expr) -> Expression:
        """The algebra of a tree expression; texts, truth values and comparisons are refused."""
        value = self.value(node)
        if not isinstance(value, Expression):
            kind = "a text" if isinstance(value, str) else "true or false"
            raise fail("SURG004", f"a number or a matrix is needed here, this is {kind}", node.span)
        return value

    def value(self, node: nodes.Expr) -> Value:
        """The value of any tree expression."""
        try:
            value = self._value(node)
        except ArithmeticProblem as problem:
            raise fail("SURG004", f"`{show(node)}`: {problem}", node.span) from problem
        if isinstance(value, Expression):
            self.check_parts(value.parts, node, value.depth)
            check_extent(value.shape, node.span)
        return replace(value, span=node.span) if isinstance(value, Expression) and value.arguments else value

    def check_parts(self, parts: int, node: nodes.Expr, depth: int = 1) -> None:
        """Refuse an expression that is too large with the names in it written out (SURG010)."""
        if parts > MAXIMUM_PARTS or depth > MAXIMUM_DEPTH:
            message = f"with its names written out, `{show(node)}` has {parts:,} parts, nested {depth} deep"
            limits = f"at most {MAXIMUM_PARTS:,} parts and {MAXIMUM_DEPTH} levels are read"
            raise fail("SURG010", message, node.span, help=limits)

    def _value(self, node: nodes.Expr) -> Value:
        match node:
            case nodes.Number(text):
                return number(Quantity.of(int(text) if text.isdigit() else float(text)), node.span)
            case nodes.String(text):
                return text
            case nodes.Boolean(truth):
                return truth
            case nodes.Name(name):
                return self._name(node, name)
            case nodes.Unary("-", operand):
                inner = self.expression(operand)
                if inner.value is not None and not inner.shape:
                    return number(-inner.value)
                return negated(inner)
            case nodes.Binary(operator, _, _) if operator in COMPARE or operator in ("and", "or"):
                message = "a comparison is no number; it belongs behind `when`, `requires` or a rule's `where`"
                raise fail("SURG004", message, node.span)
            case nodes.Unary("not", _):
                raise fail("SURG004", "`not` belongs behind `when`, `requires` or a rule's `where`", node.span)
            case nodes.Binary():
                return self._binary(node)
            case nodes.Transpose(operand):
                inner = self.expression(operand)
                if len(inner.shape) < 2:
                    raise fail("SURG005", f"`.T` needs a matrix, this is {spelt(inner.shape)}", node.span)
                return transposed(inner)
            case nodes.Subscript(nodes.Call(function, _) as call, _) if function in NOISE:
                return noise(self, call, node)
            case nodes.Subscript(operand, _):
                return sliced(self, node, self.expression(operand))
            case nodes.Call():
                return read_call(self, node)
            case nodes.Comprehension():
                raise fail("SURG004", "`for` belongs into sum, hstack or vstack", node.span)
            case _:
                raise fail("SURG004", f"`{show(node)}` has no place in an equation", node.span)

    def _name(self, node: nodes.Name, name: str) -> Value:
        if name in self.names:
            self.used.add(name)
            return self.names[name]
        if name in ("x", "y"):
            form = "`input` and the `output` form" if name == "x" else "the `output` form"
            advice = "`delta` and `weight` are matrices; what is made of activations is `output = ...`"
            raise fail("SURG004", f"`{name}` can be used only in {form}", node.span, help=advice)
        if name in ("step", "steps", "training"):
            where = "in the equation of a method" if name == "training" else "in equations, events and penalties"
            raise fail("SURG004", f"`{name}` is known only {where}", node.span)
        if name in COORDINATES or name == "kind":
            advice = "it is known at a site, in a tensor or an equation"
            raise fail("SURG033", f"`{name}` is not known here", node.span, help=advice)
        if name in STARTS:
            raise self.start_inside(name, node)
        raise fail("SURG002", f"nothing is called `{name}` here", node.span, help=did_you_mean(name, self.names))

    def start_inside(self, name: str, node: nodes.Expr) -> SurgError:
        """What is wrong with a start that stands where a tensor should."""
        advice = f"give it a tensor of its own, `T = train {show(node)}[...]` or `frozen`, and write `T` here"
        return fail("SURG004", f"`{name}` starts a tensor, it is no part of an expression", node.span, help=advice)

    def _binary(self, node: nodes.Binary) -> Expression:
        left, right = self.expression(node.left), self.expression(node.right)
        sign = node.operator
        if left.value is not None and right.value is not None and not left.shape and not right.shape and sign != "@":
            operations = {
                "+": Quantity.__add__, "-": Quantity.__sub__, "*": Quantity.__mul__, "/": Quantity.__truediv__,
                "//": Quantity.__floordiv__, "%": Quantity.__mod__, "**": Quantity.__pow__,
            }  # fmt: skip
            return number(operations[sign](left.value, right.value), node.span)
        names = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide", "@": "matmul", "**": "power"}
        if sign not in names:
            raise fail("SURG004", f"`{sign}` is for whole numbers, not for matrices", node.operator_span or node.span)
        if sign == "**" and (right.value is None or right.shape):
            raise fail("SURG004", "the exponent must be a number", node.right.span)
        if sign == "/" and right.value == Quantity.of(0) and not right.shape:
            raise fail("SURG004", f"`{show(node)}`: division by zero", node.operator_span or node.span)
        shape = product_shape(node, left, right) if sign == "@" else broadcast_shape(node, left, right)
        if sign in ("+", "-") and right.operation == "filled" and right.value == Quantity.of(0) and shape == left.shape:
            return left  # an empty sum
        return Expression(names[sign], (left, right), shape)

    def condition(self, node: nodes.Expr) -> Condition:
        """A condition: comparisons joined by and, or, not."""
        match node:
            case nodes.Binary(operator, left, right) if operator in ("and", "or"):
                return Condition(operator, (self.condition(left), self.condition(right)))
            case nodes.Unary("not", operand):
                return Condition("not", (self.condition(operand),))
            case nodes.Boolean(truth):
                return Condition("constant", (truth,))
            case nodes.Binary(operator, left, right) if operator in COMPARE:
                sides = self.value(left), self.value(right)
                kinds = [type(side) for side in sides]
                if kinds[0] is not kinds[1] or (kinds[0] is not Expression and operator not in ("==", "!=")):
                    raise fail("SURG004", "the two sides cannot be compared", node.operator_span or node.span)
                if isinstance(sides[0], Expression):
                    return Condition(operator, (self.number(left), self.number(right)))
                return Condition(operator, (_text(sides[0]), _text(sides[1])))
            case _:
                raise fail("SURG004", "a condition is needed here, such as `in == out`", node.span)


def _text(value: Value) -> str | bool:
    assert not isinstance(value, Expression)
    return value
