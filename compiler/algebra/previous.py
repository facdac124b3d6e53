"""`previous(e, k)`: an expression over the tensors and the x of the site of the same kind, k blocks earlier.

It is resolved while a formula is built: its leaves become tensors of their own names, `A_earlier_1`, `x_earlier_1`, and
where there is no earlier site it is zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.expression import MARK, Expression, Range, negated, rewriting
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import STRUCTURES
from surgery.compiler.diagnostics import fail
from surgery.compiler.printer import show

if TYPE_CHECKING:
    from surgery.compiler.algebra.build import Builder
    from surgery.compiler.algebra.formula import MethodFormula

BY_BLOCK = frozenset(["layer", "site", "heads", "head_dim"])  # what may differ from block to block
ZERO = Quantity.of(0)


def previous(builder: Builder, node: nodes.Call) -> Expression:
    """The value of a call of `previous`; raises a located `SurgError`."""
    if builder.earlier is None:
        raise fail("SURG004", "`previous` has no meaning here", node.span, help="it belongs into an equation")
    if not 1 <= len(node.arguments) <= 2:
        raise fail("SURG004", f"`previous` takes 1 or 2 arguments, {len(node.arguments)} given", node.span)
    inner = builder.expression(node.arguments[0].value)
    back = builder.size(node.arguments[1].value) if len(node.arguments) == 2 else Quantity.of(1)
    if back.whole is not None and back.whole < 1:
        advice = "`previous(e)` is e of the block before, `previous(e, 2)` of the one before that"
        message = f"`previous` goes back by 1 block or more, not by {back}"
        raise fail("SURG004", message, node.arguments[1].value.span, help=advice)
    wrong = _misread(inner)
    if wrong:
        raise fail("SURG008", f"`{show(node)}`: {wrong}", node.span)
    if not builder.earlier(back):
        return Expression("filled" if inner.shape else "number", (), inner.shape, value=ZERO)
    if back.whole is not None:
        builder.used.add(coordinate(back.whole))
    return rewriting(lambda node: _renamed(node, f"{MARK}{back}"))(inner)


def coordinate(back: int) -> str:
    """What a formula's coordinates call it that there is a site so many blocks earlier."""
    return f"earlier_{back}"


def _misread(node: Expression) -> str:
    if node.operation == "y":
        return "the base output of an earlier block is not kept, only its x and its tensors are"
    if MARK in node.name:
        return "`previous` of `previous` is not built yet"
    numbers = [node.value]
    for part in node.index:
        numbers += [part.start, part.stop] if isinstance(part, Range) else [part]
    read = BY_BLOCK & frozenset[str]().union(*(number.symbols for number in numbers if number is not None))
    if read:
        return f"it reads `{min(read)}`, which differs from block to block"
    return next((wrong for part in node.arguments if (wrong := _misread(part))), "")


def _renamed(node: Expression, mark: str) -> Expression:
    if node.operation == "weight":
        return Expression("tensor", (), node.shape, name=f"W{mark}", span=node.span)
    return replace(node, name=node.name + mark) if node.operation in ("tensor", "x") else node


def leaves(formula: MethodFormula) -> dict[str, tuple[str, int]]:
    """What a formula reads of earlier blocks: leaf to its name there (`A`, `W`, `x`) and how many blocks earlier."""
    found: dict[str, tuple[str, int]] = {}

    def collect(node: Expression) -> None:
        if MARK in node.name:
            name, _, back = node.name.partition(MARK)
            found[node.name] = (name, int(back))
        for part in node.arguments:
            collect(part)

    collect(formula.expression)
    if formula.penalty is not None:
        collect(formula.penalty)
    for term in formula.terms:
        collect(term.input)
    for event in formula.events:
        for change in event.changes:
            collect(change.value)
    return found


def without_zeros(node: Expression) -> Expression:
    """The expression without what earlier blocks that are not there add to it; exact, gradients included."""
    return rewriting(_without_zeros)(node)


def _without_zeros(node: Expression) -> Expression:
    parts = node.arguments
    zeros = [_is_zero(part) for part in parts]
    match node.operation:
        case "add" | "subtract" if any(zeros) and not all(zeros):
            left = parts[0] if zeros[1] else parts[1]
            if left.shape == node.shape:
                return left if node.operation == "add" or zeros[1] else negated(left)
        case "add" | "subtract":
            if all(zeros):
                return _zero(node)
        case "matmul" | "multiply":
            if any(zeros):
                return _zero(node)
        case "divide" | "negate" | "transpose" | "slice" | "stop" | "dropout":
            if zeros[0]:
                return _zero(node)
        case name if name in STRUCTURES and any(zeros) and STRUCTURES[name].is_zero(zeros):
            return _zero(node)
    return node


def _is_zero(node: Expression) -> bool:
    return node.operation in ("filled", "number") and node.value == ZERO


def _zero(node: Expression) -> Expression:
    return Expression("filled" if node.shape else "number", (), node.shape, value=ZERO)
