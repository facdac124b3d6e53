"""Methods composed, `mask(W) * lora(rank = 16) + circulant()`: one formula, each part with its own input and events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from surgery.compiler import nodes
from surgery.compiler.algebra.arguments import bind_arguments
from surgery.compiler.algebra.build import Builder, Value
from surgery.compiler.algebra.expression import MARK, Expression, negated, number, rewriting
from surgery.compiler.algebra.facts import gradients_reach
from surgery.compiler.algebra.formula import EventFormula, MethodFormula, TensorFormula, Term, rows
from surgery.compiler.algebra.measured import Gain
from surgery.compiler.algebra.method import elaborate, is_square
from surgery.compiler.algebra.names import FUNCTIONS_IN_TIME, MEASURED, names_in, taken
from surgery.compiler.algebra.narrow import total
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.shapes import spelt
from surgery.compiler.algebra.structures import STRUCTURES
from surgery.compiler.diagnostics import Diagnostics, Note, SurgError, did_you_mean, fail
from surgery.compiler.printer import show

Measured = Callable[[Gain], Quantity] | None


@dataclass(frozen=True)
class Part:
    """One method call of a composition: its name there (`lora`, `lora_2`), and its parameters' values."""

    name: str
    method: nodes.Method
    call: nodes.Call
    arguments: Mapping[str, Value]


@dataclass(frozen=True)
class Composed(nodes.Method):
    """A composition as a method: its name is its text with all arguments, its statements are those of its parts."""

    expression: nodes.Expr = nodes.Number("0")  # the `with` expression, each call replaced by the part's name
    parts: tuple[Part, ...] = ()


def compose(value: nodes.Expr, methods: Mapping[str, nodes.Method], measured: Measured = None) -> Composed:
    """The method that a `with` expression stands for; raises `SurgError` with all that is wrong in its calls.

    `measured` tells numbers of the data, as for `bind_arguments`.
    """
    diagnostics = Diagnostics()
    parts: list[Part] = []

    def replaced(node: Any) -> Any:
        call = nodes.Call(node.name, (), span=node.span) if isinstance(node, nodes.Name) else node
        if isinstance(call, nodes.Call) and call.function in methods:
            try:
                parts.append(_part(call, methods[call.function], parts, measured))
            except SurgError as error:
                diagnostics.found += error.diagnostics
                return node
            return nodes.Name(parts[-1].name, span=node.span)
        return _rebuilt(node, replaced)

    expression = replaced(value)
    known_functions = methods.keys() | STRUCTURES.keys() | Quantity.FUNCTIONS.keys() | MEASURED | FUNCTIONS_IN_TIME
    for call in calls(value):
        if call.function not in known_functions:
            known = did_you_mean(call.function, methods)
            diagnostics.error("SURG002", f"there is no method `{call.function}`", call.span, help=known)
    diagnostics.raise_errors()
    if not parts:
        raise fail("SURG004", f"`with` takes methods, and `{show(value)}` has none", value.span)
    statements = tuple(statement for part in parts for statement in part.method.statements)
    text = show(_with_calls(expression, {part.name: _written_out(part) for part in parts}))
    return Composed(text, (), statements, span=value.span, expression=expression, parts=tuple(parts))


def _part(call: nodes.Call, method: nodes.Method, before: Sequence[Part], measured: Measured) -> Part:
    if why := taken(method.name):
        message = f"tensors cannot stand below `{method.name}`, {why}"
        raise fail("SURG035", message, call.span, help="give the method another name")
    others, name, count = {part.name for part in before}, method.name, 1
    while name in others:
        count += 1
        name = f"{method.name}_{count}"
    return Part(name, method, call, bind_arguments(method, call, measured))


def calls(node: nodes.Node) -> list[nodes.Call]:
    """All calls in a part of the tree, outermost first."""
    found = [node] if isinstance(node, nodes.Call) else []
    for value in vars(node).values():
        for part in value if isinstance(value, tuple) else (value,):
            found += calls(part) if isinstance(part, nodes.Node) else []
    return found


def _written_out(part: Part) -> nodes.Call:
    """The call with every argument by name, as the plan keeps it."""
    arguments = []
    for name, value in part.arguments.items():
        if isinstance(value, Expression):
            assert value.value is not None
            constant = value.value.constant
            if constant is None:  # the data will tell
                arguments.append(nodes.Argument(nodes.Name(str(value.value)), name))
                continue
            text = nodes.Number(repr(abs(constant if isinstance(constant, int) else float(constant))))
            node: nodes.Expr = nodes.Unary("-", text) if constant < 0 else text
        else:
            node = nodes.Boolean(value) if isinstance(value, bool) else nodes.String(value)
        arguments.append(nodes.Argument(node, name))
    return nodes.Call(part.method.name, tuple(arguments))


def _with_calls(node: Any, written: Mapping[str, nodes.Call]) -> Any:
    if isinstance(node, nodes.Name) and node.name in written:
        return written[node.name]
    return _rebuilt(node, lambda part: _with_calls(part, written))


def _rebuilt(node: Any, change: Callable[[Any], Any]) -> Any:
    """A part of the tree with `change` applied to each of its own parts."""
    if isinstance(node, tuple):
        return tuple(map(change, node))
    if not isinstance(node, nodes.Node):
        return node
    return replace(node, **{entry.name: change(getattr(node, entry.name)) for entry in fields(node)})


def ranks(method: nodes.Method, arguments: Mapping[str, int | float | str | bool]) -> list[int]:
    """The ranks that are asked for, one per method that has one."""
    if isinstance(method, Composed):
        found = [part.arguments.get("rank") for part in method.parts]
        known = [rank.value.whole for rank in found if isinstance(rank, Expression) and rank.value is not None]
        return [rank for rank in known if rank is not None]
    rank = arguments.get("rank")
    return [rank] if isinstance(rank, int) else []


def formula_of(
    method: nodes.Method, arguments: Mapping[str, Value], sizes: Mapping[str, Quantity]
) -> tuple[MethodFormula | None, Diagnostics]:
    """`elaborate`, for a composition too."""
    return _composed(method, sizes) if isinstance(method, Composed) else elaborate(method, arguments, sizes)


def _composed(method: Composed, sizes: Mapping[str, Quantity]) -> tuple[MethodFormula | None, Diagnostics]:
    diagnostics = Diagnostics()
    if sizes["in"].constant is None and any(is_square(part.method) for part in method.parts):
        sizes = {**sizes, "out": sizes["in"]}
    found: dict[str, MethodFormula] = {}
    for part in method.parts:
        formula, problems = elaborate(part.method, part.arguments, sizes)
        diagnostics.found += problems.found
        if formula is not None and formula.form != "delta":
            message = f"`{part.method.name}` is of the form `{formula.form}`, which cannot be composed"
            diagnostics.error("SURG035", message, part.call.span, help="only methods of the form `delta` add up")
        elif formula is not None:
            found[part.name] = renamed(formula, f"{part.name}.")
    if diagnostics.errors:
        return None, diagnostics
    try:
        return _joined(method, found, sizes), diagnostics
    except SurgError as error:
        diagnostics.found += error.diagnostics
        return None, diagnostics


def _joined(method: Composed, found: Mapping[str, MethodFormula], sizes: Mapping[str, Quantity]) -> MethodFormula:
    shape = (sizes["out"], sizes["in"])
    names: dict[str, Value] = {name: number(value) for name, value in sizes.items()}
    names["W"] = Expression("weight", (), shape, name="W")
    names |= {name: formula.expression for name, formula in found.items()}
    used: set[str] = set()
    builder = Builder(names, None, used)
    value = builder.expression(method.expression)
    if len(value.shape) != 2 or any(a.differs_from(b) for a, b in zip(value.shape, shape, strict=True)):
        raise fail("SURG005", f"the composition must be {spelt(shape)}, this is {spelt(value.shape)}", method.span)
    _check_moves(method.expression, found)
    plain = rows("x", sizes["in"])
    terms: list[Term] = []
    for matrix, origin in _terms(method.expression, builder, found, plain):
        if matrix.shape != value.shape:
            raise fail("SURG005", f"a summand is {spelt(matrix.shape)}, the sum {spelt(value.shape)}", method.span)
        same = next((number for number, term in enumerate(terms) if term.input == origin), None)
        if same is None:
            terms.append(Term(matrix, origin))
        else:
            first = terms[same].matrix
            terms[same] = Term(Expression("add", (first, matrix), first.shape, span=first.span), origin)
    _check_trained(method, found, terms)
    parts = tuple(found.values())
    return MethodFormula(
        "_".join(found), tuple(tensor for part in parts for tensor in part.tensors), "delta",
        value if len(terms) > 1 else terms[0].matrix, tuple(terms),
        tuple(event for part in parts for event in part.events), f"delta = {method.name}", None,
        frozenset[str]().union(*(part.coordinates for part in parts)), method.span, shape,
        total(penalties) if (penalties := [part.penalty for part in parts if part.penalty is not None]) else None,
    )  # fmt: skip


def _check_trained(method: Composed, found: Mapping[str, MethodFormula], terms: Sequence[Term]) -> None:
    """A gradient reaches what each part trains."""
    reached = frozenset[str]().union(*(gradients_reach(side) for term in terms for side in (term.matrix, term.input)))
    diagnostics = Diagnostics()
    for part in method.parts:
        lost = [tensor.name for tensor in found[part.name].tensors
                if tensor.role == "train" and tensor.name not in reached]  # fmt: skip
        if lost:
            names = ", ".join(f"`{name}`" for name in lost)
            message = f"{names} {'is' if len(lost) == 1 else 'are'} trained, but no gradient passes what stands around"
            diagnostics.error("SURG004", message, part.call.span, help="leave the method out, or what holds it back")
    diagnostics.raise_errors()


def _check_moves(node: nodes.Expr, found: Mapping[str, MethodFormula], factor: nodes.Expr | None = None) -> None:
    """What moves W moves it by its own delta: a factor in front would make the two readings of W differ."""
    if isinstance(node, nodes.Name) and node.name in found:
        if factor is not None and (found[node.name].moves_base or found[node.name].corrections):
            message = f"`{found[node.name].name}` moves W by its own `delta`, so it can only be added"
            note = Note("this stands around it", factor.span)
            raise fail("SURG035", message, node.span, notes=[note], help="put the factor into the method itself")
        return
    adds = isinstance(node, nodes.Binary) and node.operator == "+"
    inner = factor if adds or factor is not None else node
    for value in vars(node).values():
        for part in value if isinstance(value, tuple) else (value,):
            part = part.value if isinstance(part, nodes.Argument) else part
            if isinstance(part, nodes.Node) and not isinstance(part, nodes.Argument):
                _check_moves(part, found, inner)  # type: ignore[arg-type]


def _terms(
    node: nodes.Expr, builder: Builder, found: Mapping[str, MethodFormula], plain: Expression
) -> list[tuple[Expression, Expression]]:
    """The summands of a composition as matrices with their inputs; raises SURG035 where two inputs meet in one."""
    methods = [found[name] for name in found if name in names_in(node)]
    inputs = list(dict.fromkeys(term.input for method in methods for term in method.terms))
    if len(inputs) <= 1:
        return [(builder.expression(node), inputs[0] if inputs else plain)]
    if isinstance(node, nodes.Binary) and node.operator in ("+", "-"):
        left, right = (_terms(side, builder, found, plain) for side in (node.left, node.right))
        return left + (right if node.operator == "+" else [(negated(matrix), origin) for matrix, origin in right])
    if isinstance(node, nodes.Unary):
        return [(negated(matrix), origin) for matrix, origin in _terms(node.operand, builder, found, plain)]
    if isinstance(node, nodes.Binary) and node.operator in ("*", "@", "/"):
        left_free, right_free = (not names_in(side) & found.keys() for side in (node.left, node.right))
        operation = {"*": "multiply", "@": "matmul", "/": "divide"}[node.operator]
        shape = builder.expression(node).shape
        if right_free:
            by = builder.expression(node.right)
            return [(Expression(operation, (matrix, by), shape), origin)
                    for matrix, origin in _terms(node.left, builder, found, plain)]  # fmt: skip
        if left_free and node.operator != "/":
            by = builder.expression(node.left)
            return [(Expression(operation, (by, matrix), shape), origin)
                    for matrix, origin in _terms(node.right, builder, found, plain)]  # fmt: skip
    notes = [Note(f"`{method.name}` multiplies `{_spelt_input(method)}`") for method in methods]
    message = "methods with different inputs meet in one product"
    raise fail("SURG035", message, node.span, notes=notes, help="give them the same `input`, or add them")


def _spelt_input(method: MethodFormula) -> str:
    return f"dropout(x, {method.dropout:g})" if method.dropout else "x" if method.reads_plain_x else "another input"


# --- names ------------------------------------------------------------------------------------------------------------


def renamed(formula: MethodFormula, prefix: str) -> MethodFormula:
    """The formula with `prefix` before the name of every tensor."""

    def own(node: Expression) -> Expression:
        is_own = node.operation == "tensor" and not node.name.startswith(f"W{MARK}")
        return replace(node, name=prefix + node.name) if is_own else node

    named = rewriting(own)

    def tensor(entry: TensorFormula) -> TensorFormula:
        own = entry.start.expression
        start = entry.start if own is None else replace(entry.start, expression=named(own))
        return replace(entry, name=prefix + entry.name, start=start)

    def event(entry: EventFormula) -> EventFormula:
        changes = tuple(
            replace(change, target=change.target if change.target == "W" else prefix + change.target,
                    value=named(change.value))
            for change in entry.changes
        )  # fmt: skip
        return replace(entry, changes=changes)

    return replace(
        formula,
        tensors=tuple(map(tensor, formula.tensors)),
        expression=named(formula.expression),
        terms=tuple(Term(named(term.matrix), named(term.input)) for term in formula.terms),
        events=tuple(map(event, formula.events)),
        penalty=None if formula.penalty is None else named(formula.penalty),
    )
