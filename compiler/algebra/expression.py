"""Matrix expressions: the small typed tree that every equation of a method becomes.

A shape is a tuple of sizes: `()` a number, `(n,)` a vector, `(m, n)` a matrix, with leading axes kept. A size is a
`Quantity`: a whole number once a site is known, symbolic (`rank`, `in`, `in / groups`) before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.span import Span

Shape = tuple[Quantity, ...]
BEFORE = "_before"  # behind the name of a copy from before the optimizer step
GRADIENT = "_grad"  # behind the name of a trained tensor: its gradient
MARK = "_earlier_"  # in the name of what belongs to the site some blocks earlier


@dataclass(frozen=True)
class Expression:
    """One node.

    operation   arguments          attributes
    weight      -                  the site's W, [out, in]
    tensor      -                  name: a tensor of the method
    number      -                  value: a Quantity, may hold `step` and other things known only in the run
    filled      -                  value: the number that all its entries are
    x, y        -                  name: rows of activations, [tokens, in] and [tokens, out]
    dropout     rows, share
    matmul      left, right
    add, subtract, multiply, divide     left, right (elementwise, broadcast)
    negate      operand
    transpose   operand            the last two axes
    slice       operand            index: per axis `Range(start, stop)`, a Quantity (one entry) or None (a new axis)
    previous    operand            the value before the optimizer step (`prev`), in events only
    NAME        ...                a structure or function of `structures/`, by its name: diag, mask, stop, sqrt ...
    """

    operation: str
    arguments: tuple[Expression, ...] = ()
    shape: Shape = ()
    name: str = ""
    value: Quantity | None = None
    index: tuple[Range | Quantity | None, ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)
    parts: int = field(init=False, compare=False, repr=False)  # nodes of the tree, one that occurs twice counted twice
    depth: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", 1 + sum(argument.parts for argument in self.arguments))
        object.__setattr__(self, "depth", 1 + max((argument.depth for argument in self.arguments), default=0))


@dataclass(frozen=True)
class Range:
    """`start:stop` of one axis."""

    start: Quantity
    stop: Quantity


def number(quantity: Quantity, span: Span | None = None) -> Expression:
    """A number as an expression."""
    return Expression("number", value=quantity, span=span)


def transposed(matrix: Expression) -> Expression:
    """The matrix with its last two axes exchanged."""
    return Expression("transpose", (matrix,), (*matrix.shape[:-2], matrix.shape[-1], matrix.shape[-2]))


def negated(node: Expression) -> Expression:
    """The node times -1."""
    return Expression("negate", (node,), node.shape)


def without_gradient(node: Expression) -> Expression:
    """The node, held constant in the backward pass."""
    return Expression("stop", (node,), node.shape)


def rewriting(change: Callable[[Expression], Expression]) -> Callable[[Expression], Expression]:
    """A function from a tree to the one with `change(node)` for each node, from the leaves up.

    A part that occurs twice, be it in two trees, stays one; what does not change stays itself.
    """
    known: dict[int, tuple[Expression, Expression]] = {}  # with what was rewritten, so that its id stays taken

    def rewritten(node: Expression) -> Expression:
        if id(node) not in known:
            parts = tuple(map(rewritten, node.arguments))
            same = all(new is old for new, old in zip(parts, node.arguments, strict=True))
            known[id(node)] = node, change(node if same else replace(node, arguments=parts))
        return known[id(node)][1]

    return rewritten
