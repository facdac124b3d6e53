"""What a rule applies: its method with the parameters' values, before and after the data have told some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery.compiler import nodes
from surgery.compiler.algebra.arguments import bind_arguments
from surgery.compiler.algebra.build import Value
from surgery.compiler.algebra.compose import calls, compose
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.measured import Gain
from surgery.compiler.algebra.quantity import Quantity, value_of
from surgery.compiler.diagnostics import did_you_mean, fail
from surgery.compiler.program import Rule


def bound(
    node: nodes.Expr, methods: Mapping[str, nodes.Method], asked: list[Gain] | None = None,
    known: Mapping[Gain, int] | None = None,
) -> tuple[nodes.Method, dict[str, Value]]:  # fmt: skip
    """The method of a `with` expression, and its parameters' values; those of a composition are in its parts.

    A number of the data is its `known` value, else a symbol, and put into `asked`. Raises `SurgError` for an unknown
    method and for arguments that it does not take.
    """

    def measured(gain: Gain) -> Quantity:
        if asked is not None:
            asked.append(gain)
        return Quantity.of(known[gain]) if known is not None else Quantity.symbol(str(gain))

    call = nodes.Call(node.name, (), span=node.span) if isinstance(node, nodes.Name) else node
    if not isinstance(call, nodes.Call) or (call.function not in methods and calls(call)[1:]):
        composed = compose(node, methods, measured)
        for part in composed.parts:
            _check_rank(part.arguments, part.call)
        return composed, {}
    if call.function not in methods:
        help_text = did_you_mean(call.function, methods)
        raise fail("SURG002", f"there is no method `{call.function}`", call.span, help=help_text)
    values = bind_arguments(methods[call.function], call, measured)
    _check_rank(values, call)
    return methods[call.function], values


def with_numbers(rule: Rule, methods: Mapping[str, nodes.Method], known: Mapping[Gain, int]) -> Rule:
    """The rule at a block whose numbers of the data are `known`; raises `SurgError` for arguments that do not fit."""
    node = next(clause.value for clause in rule.node.clauses if isinstance(clause, nodes.With))
    method, values = bound(node, methods, known=known)
    return replace(rule, method=method, arguments=arguments_of(values))


def arguments_of(values: Mapping[str, Value]) -> dict[str, int | float | str | bool]:
    """Parameters' values as JSON has them, without those that the data will tell."""
    found: dict[str, int | float | str | bool] = {}
    for name, value in values.items():
        if not isinstance(value, Expression):
            found[name] = value
        elif value.value is not None and value.value.constant is not None:
            found[name] = value_of(value.value)
    return found


def _check_rank(values: Mapping[str, Value], call: nodes.Call) -> None:
    """A rank below 1 is said at the rule; how large it may be is known at a site."""
    rank = values.get("rank")
    number = rank.value.whole if isinstance(rank, Expression) and rank.value is not None else None
    if number is not None and number < 1:
        where = next((argument.span for argument in call.arguments if argument.name == "rank"), call.span)
        raise fail("SURG026", f"rank {number} is out of range: it is at least 1", where)
