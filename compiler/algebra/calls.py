"""Calls in an expression: structures and functions, numbers of the step, what remembers or looks at other sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.comprehension import comprehension
from surgery.compiler.algebra.expression import GRADIENT, Expression, number
from surgery.compiler.algebra.facts import tensors_read
from surgery.compiler.algebra.in_time import IN_TIME, NOISE
from surgery.compiler.algebra.measured import read_gain
from surgery.compiler.algebra.names import FUNCTIONS_IN_TIME, MEASURED, STARTS
from surgery.compiler.algebra.previous import previous
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.schedule import SCHEDULES, scheduled
from surgery.compiler.algebra.shapes import spelt
from surgery.compiler.algebra.sources import SOURCES, source
from surgery.compiler.algebra.structures import STRUCTURES, ShapeProblem, Structure
from surgery.compiler.diagnostics import Note, did_you_mean, fail
from surgery.compiler.printer import show

if TYPE_CHECKING:
    from surgery.compiler.algebra.build import Builder

NUMBERS_ONLY = frozenset({"min", "max"})


def read_call(builder: Builder, node: nodes.Call) -> Expression:
    """The expression of a call; errors are at the call or at its arguments."""
    function, arguments = node.function, node.arguments
    if function == "prev":
        if builder.occasion is None:
            raise fail("SURG004", "`prev` is known only in events", node.span)
        _check_count(node, 1)
        inner = builder.expression(arguments[0].value)
        if _has_previous(inner):
            raise fail("SURG008", "`prev` of `prev` is not built yet", node.span)
        if any(GRADIENT in name for name in tensors_read(inner)):
            raise fail("SURG004", "`prev` of a gradient: that of the step before is gone", node.span)
        return Expression("previous", (inner,), inner.shape)
    if function == "dropout":
        return _dropout(builder, node)
    if function == "previous":
        return previous(builder, node)
    if function == "where" and (truth := _truth(builder, arguments[:1])) is not None:
        return _chosen(builder, node, truth)
    if function in NOISE:
        message = f"`{function}` is drawn in a shape: `{show(node)}[out, in]`"
        raise fail("SURG004", message, node.span)
    if function in MEASURED:
        return _measured(builder, node)
    if function in IN_TIME and (function != "grad" or builder.occasion is not None):
        return _in_time(builder, node)
    if function in SCHEDULES:
        return _scheduled(builder, node)
    if function in SOURCES:
        return source(node, builder)
    known = {name for name, kind in STRUCTURES.items() if not kind.internal} | Quantity.FUNCTIONS.keys()
    if function not in known:
        if function in STARTS:
            raise builder.start_inside(function, node)
        help_text = did_you_mean(function, sorted(known | MEASURED | FUNCTIONS_IN_TIME))
        raise fail("SURG002", f"there is no function `{function}`", node.span, help=help_text)
    if arguments and isinstance(arguments[0].value, nodes.Comprehension):
        return comprehension(builder, node, arguments[0].value)
    structure = STRUCTURES.get(function)
    values = _arguments(builder, node, structure)
    quantities = [value.value for value in values if value.value is not None and not value.shape]
    if function in Quantity.FUNCTIONS and len(quantities) == len(values) and values:
        if function not in NUMBERS_ONLY:
            _check_count(node, 1)
        return number(Quantity.function(function, *quantities), node.span)
    if structure is None:
        raise fail("SURG004", f"`{function}` takes numbers", node.span)
    _check_count(node, structure.arity, len(structure.optional))
    try:
        shape = structure.shape(*values)
    except ShapeProblem as problem:
        given = ", ".join(spelt(value.shape) for value in values)
        notes = [Note(f"given: {given}")]
        raise fail("SURG005", f"{problem}", node.span, notes=notes, help=problem.help) from problem
    return Expression(function, tuple(values), shape)


def _in_time(builder: Builder, node: nodes.Call) -> Expression:
    """A call that remembers something, or looks at all sites."""
    if builder.occasion is None:
        raise fail("SURG004", f"`{node.function}` is known only in events", node.span)
    read, count = IN_TIME[node.function]
    _check_count(node, count)
    return read(builder, node)


def _measured(builder: Builder, node: nodes.Call) -> Expression:
    """A number that the data tell, of the block of a site."""
    if builder.measured is None:
        message = f"`{node.function}` is known only where a rule gives the parameters of its method"
        help_text = f"give it to one: `with lora(rank = {show(node)})`"
        raise fail("SURG004", message, node.span, help=help_text)
    return number(builder.measured(read_gain(node)), node.span)


def _scheduled(builder: Builder, node: nodes.Call) -> Expression:
    """A number that follows the clock."""
    if "step" not in builder.names:
        message = f"`{node.function}` reads the step, which is known only in equations, events and penalties"
        raise fail("SURG004", message, node.span)
    _check_count(node, SCHEDULES[node.function][1])
    numbers = (builder.number(argument.value) for argument in node.arguments)
    return number(scheduled(node.function, *numbers), node.span)


def _arguments(builder: Builder, node: nodes.Call, structure: Structure | None) -> list[Expression]:
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
            length = builder.size(argument.value)
            if length.whole is not None and length.whole < 1:
                message = f"a size must be at least 1, `{show(argument.value)}` is {length}"
                raise fail("SURG004", message, argument.value.span or node.span)
            values.append(number(length, argument.value.span))
        else:
            values.append(builder.expression(argument.value))
    return values


def _truth(builder: Builder, arguments: tuple[nodes.Argument, ...]) -> bool | None:
    """Whether the argument is true, where that is known now: a bool parameter of the method."""
    for argument in arguments:
        named = isinstance(argument.value, nodes.Name) and isinstance(builder.names.get(argument.value.name), bool)
        if named or isinstance(argument.value, nodes.Boolean):
            return builder.value(argument.value) is True
    return None


def _chosen(builder: Builder, node: nodes.Call, truth: bool) -> Expression:
    """`where(truth, a, b)`: one of two expressions of one shape."""
    _check_count(node, 3)
    yes, no = (builder.expression(argument.value) for argument in node.arguments[1:])
    if len(yes.shape) != len(no.shape) or any(a.differs_from(b) for a, b in zip(yes.shape, no.shape, strict=True)):
        message = f"`where` chooses between {spelt(yes.shape)} and {spelt(no.shape)}, which differ"
        raise fail("SURG005", message, node.span)
    return yes if truth else no


def _dropout(builder: Builder, node: nodes.Call) -> Expression:
    if "x" not in builder.names:
        raise fail("SURG004", "`dropout` belongs on activations: `input = dropout(x, p)`", node.span)
    _check_count(node, 2)
    rows, share = builder.expression(node.arguments[0].value), builder.number(node.arguments[1].value)
    if share.constant is not None and not 0 <= share.constant < 1:
        message = f"dropout must be at least 0 and below 1, this is {share.constant}"
        raise fail("SURG004", message, node.arguments[1].value.span)
    return rows if share.constant == 0 else Expression("dropout", (rows, number(share)), rows.shape)


def _check_count(node: nodes.Call, arity: int, optional: int = 0) -> None:
    given = len(node.arguments)
    if not arity <= given <= arity + optional:
        takes = f"{arity} or {arity + optional} arguments" if optional else f"{arity} argument{'s' * (arity != 1)}"
        raise fail("SURG004", f"`{node.function}` takes {takes}, {given} given", node.span)


def _has_previous(node: Expression) -> bool:
    return node.operation == "previous" or any(_has_previous(part) for part in node.arguments)
