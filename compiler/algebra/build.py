"""Tree to algebra: expressions with shapes, located shape errors, and conditions.

The same code reads a method twice: with symbolic sizes (`surgery check`, the methods table) and with a site's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.comprehension import comprehension
from surgery.compiler.algebra.condition import COMPARE, Condition
from surgery.compiler.algebra.expression import GRADIENT, Expression, Range, negated, transposed
from surgery.compiler.algebra.facts import tensors_read
from surgery.compiler.algebra.in_time import IN_TIME, NOISE, Occasion, noise
from surgery.compiler.algebra.measured import Gain, read_gain
from surgery.compiler.algebra.names import COORDINATES, MEASURED, STARTS
from surgery.compiler.algebra.previous import previous
from surgery.compiler.algebra.quantity import LARGEST, ArithmeticProblem, Quantity
from surgery.compiler.algebra.schedule import SCHEDULES, scheduled
from surgery.compiler.algebra.shapes import broadcast_shape, check_extent, product_shape, spelt
from surgery.compiler.algebra.sources import SOURCES, source
from surgery.compiler.algebra.structures import STRUCTURES, ShapeProblem, Structure
from surgery.compiler.diagnostics import Note, SurgError, did_you_mean, fail
from surgery.compiler.printer import show
from surgery.compiler.span import Span

if TYPE_CHECKING:
    from surgery.compiler.algebra.formula import TensorFormula

Value = Expression | str | bool

MAXIMUM_PARTS = 5_000  # of an expression with the names in it written out: they may double it line by line
MAXIMUM_DEPTH = 100  # so that every later pass may recurse
MAXIMUM_TERMS = 1_024  # of a sum over a range, and of ranges within ranges
NUMBERS_ONLY = frozenset({"min", "max"})


def number(quantity: Quantity, span: Span | None = None) -> Expression:
    """A number as an expression."""
    return Expression("number", value=quantity, span=span)


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
            case nodes.Subscript(operand, indices):
                return self._slice(node, self.expression(operand), indices)
            case nodes.Call(function, arguments):
                return self._call(node, function, arguments)
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
            raise self._start_inside(name, node)
        raise fail("SURG002", f"nothing is called `{name}` here", node.span, help=did_you_mean(name, self.names))

    def _start_inside(self, name: str, node: nodes.Expr) -> SurgError:
        advice = f"give it a tensor of its own, `T = frozen {show(node)}[...]`, and write `T` here"
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

    def _slice(
        self, node: nodes.Subscript, operand: Expression, indices: tuple[nodes.Expr | nodes.Slice, ...]
    ) -> Expression:
        shape: list[Quantity] = []
        taken: list[Range | Quantity | None] = []
        axis = 0
        for index in indices:
            if isinstance(index, nodes.Name) and index.name == "None":
                taken.append(None)
                shape.append(Quantity.of(1))
                continue
            if axis == len(operand.shape):
                raise fail("SURG005", f"too many indices for {spelt(operand.shape)}", index.span or node.span)
            length = operand.shape[axis]
            axis += 1
            if isinstance(index, nodes.Slice):
                start = self._position(index.start, length) if index.start else Quantity.of(0)
                stop = self._position(index.stop, length) if index.stop else length
                bounds = (start.whole, stop.whole, length.whole)
                if None not in bounds and not 0 <= bounds[0] <= bounds[1] <= bounds[2]:  # type: ignore[operator]
                    raise fail("SURG026", f"{start}:{stop} is outside of 0:{length}", index.span or node.span)
                taken.append(Range(start, stop))
                shape.append(stop - start)
            else:
                entry = self._position(index, length)
                if entry.whole is not None and length.whole is not None and not 0 <= entry.whole < length.whole:
                    last = length - Quantity.of(1)
                    raise fail("SURG026", f"index {entry} is outside of 0..{last}", index.span or node.span)
                taken.append(entry)
        taken += [Range(Quantity.of(0), length) for length in operand.shape[axis:]]
        return Expression("slice", (operand,), (*shape, *operand.shape[axis:]), index=tuple(taken))

    def _position(self, node: nodes.Expr, length: Quantity) -> Quantity:
        """A position along an axis of that length; one that counts from the end has no meaning here."""
        position = self.size(node)
        if position.constant is not None and position.constant < 0:
            message = f"a position counts from 0, `{show(node)}` is below it"
            raise fail("SURG026", message, node.span, help=f"from the end count as `{length} - 1`")
        return position

    def _call(self, node: nodes.Call, function: str, arguments: tuple[nodes.Argument, ...]) -> Expression:
        if function == "prev":
            if self.occasion is None:
                raise fail("SURG004", "`prev` is known only in events", node.span)
            self._check_count(node, 1)
            inner = self.expression(arguments[0].value)
            if _has_previous(inner):
                raise fail("SURG008", "`prev` of `prev` is not built yet", node.span)
            if any(GRADIENT in name for name in tensors_read(inner)):
                raise fail("SURG004", "`prev` of a gradient: that of the step before is gone", node.span)
            return Expression("previous", (inner,), inner.shape)
        if function == "dropout":
            return self._dropout(node)
        if function == "previous":
            return previous(self, node)
        if function == "where" and (truth := self._truth(arguments[:1])) is not None:
            return self._chosen(node, truth)
        if function in NOISE:
            message = f"`{function}` is drawn in a shape: `{show(node)}[out, in]`"
            raise fail("SURG004", message, node.span)
        if function in MEASURED:
            return self._measured(node)
        if function in IN_TIME and (function != "grad" or self.occasion is not None):
            return self._in_time(node)
        if function in SCHEDULES:
            return self._scheduled(node)
        if function in SOURCES:
            return source(node, self)
        known = {name for name, kind in STRUCTURES.items() if not kind.internal} | Quantity.FUNCTIONS.keys()
        if function not in known:
            if function in STARTS:
                raise self._start_inside(function, node)
            help_text = did_you_mean(function, sorted(known))
            raise fail("SURG002", f"there is no function `{function}`", node.span, help=help_text)
        if arguments and isinstance(arguments[0].value, nodes.Comprehension):
            return comprehension(self, node, arguments[0].value)
        structure = STRUCTURES.get(function)
        values = self._arguments(node, structure)
        quantities = [value.value for value in values if value.value is not None and not value.shape]
        if function in Quantity.FUNCTIONS and len(quantities) == len(values) and values:
            if function not in NUMBERS_ONLY:
                self._check_count(node, 1)
            return number(Quantity.function(function, *quantities), node.span)
        if structure is None:
            raise fail("SURG004", f"`{function}` takes numbers", node.span)
        self._check_count(node, structure.arity, len(structure.optional))
        try:
            shape = structure.shape(*values)
        except ShapeProblem as problem:
            given = ", ".join(spelt(value.shape) for value in values)
            notes = [Note(f"given: {given}")]
            raise fail("SURG005", f"{problem}", node.span, notes=notes, help=problem.help) from problem
        return Expression(function, tuple(values), shape)

    def _in_time(self, node: nodes.Call) -> Expression:
        """A call that remembers something, or looks at all sites."""
        if self.occasion is None:
            raise fail("SURG004", f"`{node.function}` is known only in events", node.span)
        read, count = IN_TIME[node.function]
        self._check_count(node, count)
        return read(self, node)

    def _measured(self, node: nodes.Call) -> Expression:
        """A number that the data tell, of the block of a site."""
        if self.measured is None:
            message = f"`{node.function}` is known only where a rule gives the parameters of its method"
            help_text = f"give it to one: `with lora(rank = {show(node)})`"
            raise fail("SURG004", message, node.span, help=help_text)
        return number(self.measured(read_gain(node)), node.span)

    def _scheduled(self, node: nodes.Call) -> Expression:
        """A number that follows the clock."""
        if "step" not in self.names:
            message = f"`{node.function}` reads the step, which is known only in equations, events and penalties"
            raise fail("SURG004", message, node.span)
        self._check_count(node, SCHEDULES[node.function][1])
        numbers = (self.number(argument.value) for argument in node.arguments)
        return number(scheduled(node.function, *numbers), node.span)

    def _arguments(self, node: nodes.Call, structure: Structure | None) -> list[Expression]:
        """The arguments of a call in their order; those named are the optional ones of a structure."""
        values: list[Expression] = []
        for position, argument in enumerate(node.arguments):
            if argument.name is not None:
                optional = structure.optional if structure else ()
                if argument.name not in optional:
                    known = did_you_mean(argument.name, optional) or f"`{node.function}` takes no names"
                    message = f"`{node.function}` has no argument `{argument.name}`"
                    raise fail("SURG002", message, argument.span or node.span, help=known)
                if structure is None or position != structure.arity + optional.index(argument.name):
                    message = f"`{argument.name}` comes behind the other arguments of `{node.function}`, once"
                    raise fail("SURG004", message, argument.span or node.span)
            if structure and position in structure.sizes:
                length = self.size(argument.value)
                if length.whole is not None and length.whole < 1:
                    message = f"a size must be at least 1, `{show(argument.value)}` is {length}"
                    raise fail("SURG004", message, argument.value.span or node.span)
                values.append(number(length, argument.value.span))
            else:
                values.append(self.expression(argument.value))
        return values

    def _truth(self, arguments: tuple[nodes.Argument, ...]) -> bool | None:
        """Whether the argument is true, where that is known now: a bool parameter of the method."""
        for argument in arguments:
            named = isinstance(argument.value, nodes.Name) and isinstance(self.names.get(argument.value.name), bool)
            if named or isinstance(argument.value, nodes.Boolean):
                return self.value(argument.value) is True
        return None

    def _chosen(self, node: nodes.Call, truth: bool) -> Expression:
        """`where(truth, a, b)`: one of two expressions of one shape."""
        self._check_count(node, 3)
        yes, no = (self.expression(argument.value) for argument in node.arguments[1:])
        if len(yes.shape) != len(no.shape) or any(a.differs_from(b) for a, b in zip(yes.shape, no.shape, strict=True)):
            message = f"`where` chooses between {spelt(yes.shape)} and {spelt(no.shape)}, which differ"
            raise fail("SURG005", message, node.span)
        return yes if truth else no

    def _dropout(self, node: nodes.Call) -> Expression:
        if "x" not in self.names:
            raise fail("SURG004", "`dropout` belongs on activations: `input = dropout(x, p)`", node.span)
        self._check_count(node, 2)
        rows, share = self.expression(node.arguments[0].value), self.number(node.arguments[1].value)
        if share.constant is not None and not 0 <= share.constant < 1:
            message = f"dropout must be at least 0 and below 1, this is {share.constant}"
            raise fail("SURG004", message, node.arguments[1].value.span)
        return rows if share.constant == 0 else Expression("dropout", (rows, number(share)), rows.shape)

    def _check_count(self, node: nodes.Call, arity: int, optional: int = 0) -> None:
        given = len(node.arguments)
        if not arity <= given <= arity + optional:
            takes = f"{arity} or {arity + optional} arguments" if optional else f"{arity} argument{'s' * (arity != 1)}"
            raise fail("SURG004", f"`{node.function}` takes {takes}, {given} given", node.span)

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


def _has_previous(node: Expression) -> bool:
    return node.operation == "previous" or any(_has_previous(part) for part in node.arguments)


def _text(value: Value) -> str | bool:
    assert not isinstance(value, Expression)
    return value
