"""`sum(EXPR for i in a..b)`, and hstack and vstack likewise: written out, or one term of a symbolic number of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import STRUCTURES, ShapeProblem
from surgery.compiler.diagnostics import SurgError, fail
from surgery.compiler.printer import show

if TYPE_CHECKING:
    from surgery.compiler.algebra.build import Builder

JOINED = {"sum": "add", "hstack": "hstack", "vstack": "vstack"}


def comprehension(builder: Builder, node: nodes.Call, over: nodes.Comprehension) -> Expression:
    """The expression of a sum or a stack over a range; both ends belong to it.

    A known range is written out as a balanced tree, an empty sum is zero. While an end is a symbol, one term stands for
    all, with the variable as a symbol. Raises SURG010 where the range is longer than can be written out.
    """
    if node.function not in JOINED:
        raise fail("SURG004", f"`{node.function}` takes no `for`; sum, hstack and vstack do", over.span or node.span)
    if over.variable in builder.names or over.variable in STRUCTURES:
        raise fail("SURG009", f"`{over.variable}` has a meaning here already", over.span, help="choose another name")
    first, last = builder.size(over.first), builder.size(over.last)
    count = last - first + Quantity.of(1)
    if count.constant is None:
        return _repeated(builder, node, over, count)
    length = count.whole or 0
    if length > builder.most_terms:
        limit = f"at most {builder.most_terms:,} are written out"
        raise fail("SURG010", f"the range {first}..{last} has {length:,} terms", over.span, help=limit)
    if length < 1:
        return _empty(builder, node, over, f"{first}..{last}")
    within = replace(builder, most_terms=builder.most_terms // length)
    terms: list[Expression] = []
    parts = 0
    for step in range(length):
        terms.append(_term(within, over, first + Quantity.of(step)))
        parts += terms[-1].parts
        builder.check_parts(parts, node)
    if node.function == "sum" and all(term.operation == "number" for term in terms):
        total = Quantity.of(0)
        for term in terms:
            total = total + (term.value or Quantity.of(0))
        return Expression("number", value=total, span=node.span)
    return _joined(node, terms)


def _term(builder: Builder, over: nodes.Comprehension, value: Quantity) -> Expression:
    names = {**builder.names, over.variable: Expression("number", value=value)}
    return replace(builder, names=names).expression(over.body)


def _joined(node: nodes.Call, terms: Sequence[Expression]) -> Expression:
    """A balanced tree, so that many terms are not deep."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    left, right = _joined(node, terms[:half]), _joined(node, terms[half:])
    operation = JOINED[node.function]
    if operation == "add":
        if len(left.shape) != len(right.shape) or any(
            a.differs_from(b) for a, b in zip(left.shape, right.shape, strict=True)
        ):
            raise _uneven(node)
        return Expression("add", (left, right), left.shape, span=node.span)
    try:
        shape = STRUCTURES[operation].shape(left, right)
    except ShapeProblem as problem:
        raise fail("SURG005", str(problem), node.span) from problem
    return Expression(operation, (left, right), shape, span=node.span)


def _symbolic(builder: Builder, node: nodes.Call, over: nodes.Comprehension) -> Expression:
    """One term with the variable as a symbol; its shape may not depend on it."""
    term = _term(builder, over, Quantity.symbol(over.variable))
    if any(over.variable in length.symbols for length in term.shape):
        raise _uneven(node)
    return term


def _empty(builder: Builder, node: nodes.Call, over: nodes.Comprehension, bounds: str) -> Expression:
    if node.function != "sum":
        raise fail("SURG005", f"`{show(node)}`: the range {bounds} is empty, so there is nothing to stack", over.span)
    term = _symbolic(builder, node, over)
    zero = Quantity.of(0)
    return Expression("filled" if term.shape else "number", (), term.shape, value=zero, span=node.span)


def _repeated(builder: Builder, node: nodes.Call, over: nodes.Comprehension, count: Quantity) -> Expression:
    term = _symbolic(builder, node, over)
    if term.value is not None and not term.shape:
        total = count * term.value
        if over.variable in term.value.symbols:
            total = Quantity.unknown(show(node), count, term.value)
        return Expression("number", value=total, span=node.span)
    if node.function != "sum" and len(term.shape) < 2:
        raise fail("SURG005", f"{node.function} takes matrices", node.span)
    parts = (term, Expression("number", value=count))
    name = f"{node.function}_for"
    return Expression(name, parts, STRUCTURES[name].shape(*parts), name=over.variable, span=node.span)


def _uneven(node: nodes.Call) -> SurgError:
    return fail("SURG005", f"the terms of `{show(node)}` have different shapes", node.span)
