"""What a call gives to the parameters of a method, checked by their kinds."""

from __future__ import annotations

from collections.abc import Callable

from surgery.compiler import nodes
from surgery.compiler.algebra.build import Builder, Value
from surgery.compiler.algebra.expression import Expression, number
from surgery.compiler.algebra.measured import Gain
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.diagnostics import Diagnostics, SurgError, did_you_mean, fail
from surgery.compiler.printer import show

KINDS = ("int", "real", "text", "bool")


def bind_arguments(
    method: nodes.Method, call: nodes.Call | None, measured: Callable[[Gain], Quantity] | None = None
) -> dict[str, Value]:
    """The values of a method's parameters: those given in the call, else the defaults, checked by kind.

    Without a call, a parameter is a symbol of its own name. `measured` tells numbers of the data. Raises `SurgError`
    with all that is wrong.
    """
    diagnostics = Diagnostics()
    given: dict[str, nodes.Argument] = {}
    names = [parameter.name for parameter in method.parameters]
    for position, argument in enumerate(call.arguments if call else ()):
        name = argument.name or (names[position] if position < len(names) else None)
        span = argument.span or (call.span if call else None)
        if name is None:
            diagnostics.error("SURG004", f"`{method.name}` takes {len(names)} parameters, more are given", span)
        elif name not in names:
            known = did_you_mean(name, names) or f"`{method.name}` takes no parameters"
            diagnostics.error("SURG002", f"`{method.name}` has no parameter `{name}`", span, help=known)
        elif name in given:
            diagnostics.error("SURG009", f"`{name}` is given twice", span)
        else:
            given[name] = argument
    values: dict[str, Value] = {}
    for parameter in method.parameters:
        if parameter.kind not in KINDS:
            message = f"a parameter is int, real, text or bool, not `{parameter.kind}`"
            diagnostics.error("SURG004", message, parameter.span, help=did_you_mean(parameter.kind, KINDS))
            continue
        node = given[parameter.name].value if parameter.name in given else parameter.default
        if call is None and parameter.kind in ("int", "real"):
            values[parameter.name] = number(Quantity.symbol(parameter.name))
            continue
        if node is None:
            if call is None:
                values[parameter.name] = parameter.name
                continue
            takes = ", ".join(map(show, method.parameters))
            message = f"`{method.name}` needs `{parameter.name}`"
            diagnostics.error("SURG004", message, call.span, help=f"it takes ({takes})")
            values[parameter.name] = number(Quantity.symbol(parameter.name))  # defaults may read it
            continue
        try:
            values[parameter.name] = _of_kind(parameter, node, Builder(dict(values), measured=measured))
        except SurgError as error:
            diagnostics.found += error.diagnostics
            values[parameter.name] = number(Quantity.symbol(parameter.name))
    diagnostics.raise_errors()
    return values


def _of_kind(parameter: nodes.Parameter, node: nodes.Expr, builder: Builder) -> Value:
    value = builder.value(node)
    wanted = {"int": "a whole number", "real": "a number", "text": "a text", "bool": "true or false"}[parameter.kind]
    quantity = value.value if isinstance(value, Expression) else None
    good = {
        "int": quantity is not None and (quantity.whole is not None or quantity.constant is None),
        "real": quantity is not None,
        "text": isinstance(value, str),
        "bool": isinstance(value, bool),
    }[parameter.kind]
    if not good:
        raise fail("SURG004", f"`{parameter.name}` is {wanted}, not `{show(node)}`", node.span)
    if parameter.kind == "int" and quantity is not None and quantity.whole is not None:
        return number(Quantity.of(quantity.whole), node.span)
    return value
