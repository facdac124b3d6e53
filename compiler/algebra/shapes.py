"""Shapes as people read them, and those of products and of elementwise operations."""

from __future__ import annotations

import math

from surgery.compiler import nodes
from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.formula import TOKENS
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.diagnostics import Note, SurgError, fail
from surgery.compiler.printer import show
from surgery.compiler.span import Span

LARGEST_TENSOR = 1 << 40  # numbers: more than any machine holds, and its bytes can still be counted


def spelt(shape: Shape) -> str:
    """A shape for people: `[out, rank]`, or `a number`."""
    return f"[{', '.join(map(str, shape))}]" if shape else "a number"


def check_extent(shape: Shape, span: Span | None) -> None:
    """Refuse a tensor or a matrix that no machine could hold (SURG010)."""
    numbers = math.prod(length.whole for length in shape if length.whole is not None)
    if numbers > LARGEST_TENSOR:
        limit = f"at most {LARGEST_TENSOR:,} are possible"
        raise fail("SURG010", f"{spelt(shape)} has {numbers:,} numbers or more", span, help=limit)


def product_shape(node: nodes.Binary, left: Expression, right: Expression) -> Shape:
    """The shape of `left @ right`; SURG005 where their sizes do not meet."""
    if len(left.shape) < 2 or len(right.shape) < 2:
        raise _differ(node, left, right, "`@` multiplies matrices")
    if left.shape[-1].differs_from(right.shape[-2]):
        why = f"{left.shape[-1]} columns meet {right.shape[-2]} rows"
        raise _differ(node, left, right, why, _turned(node, left, right))
    leading = _broadcast(node, left, right, left.shape[:-2], right.shape[:-2])
    return (*leading, left.shape[-2], right.shape[-1])


def broadcast_shape(node: nodes.Binary, left: Expression, right: Expression) -> Shape:
    """The shape of an elementwise operation: axes of one entry are repeated; SURG005 where others differ."""
    return _broadcast(node, left, right, left.shape, right.shape)


def _broadcast(node: nodes.Binary, left: Expression, right: Expression, a: Shape, b: Shape) -> Shape:
    one = Quantity.of(1)
    length = max(len(a), len(b))
    axes = []
    for p, q in zip((one,) * (length - len(a)) + a, (one,) * (length - len(b)) + b, strict=True):
        if p != one and q != one and p.differs_from(q):
            raise _differ(node, left, right, f"{p} does not match {q}", _column(node, left, right))
        axes.append(q if p == one else p)
    return tuple(axes)


def _turned(node: nodes.Binary, left: Expression, right: Expression) -> str | None:
    """Advice where a transpose, or an activation on the left, makes a product fit."""
    if TOKENS in right.shape:
        return f"rows of activations stand on the left: `{show(node.right)} @ ...`"
    if right.shape[-1] == left.shape[-1]:
        turned = node.right
    elif TOKENS not in left.shape and right.shape[-2] == left.shape[-2]:
        turned = node.left
    else:
        return None
    return f"`{show(turned.operand if isinstance(turned, nodes.Transpose) else nodes.Transpose(turned))}` fits here"


def _column(node: nodes.Binary, left: Expression, right: Expression) -> str | None:
    """Advice where a vector lies along the rows of a matrix: it is meant as a column."""
    for matrix, vector, written in ((left, right, node.right), (right, left, node.left)):
        if len(matrix.shape) == 2 and len(vector.shape) == 1 and not matrix.shape[0].differs_from(vector.shape[0]):
            said = show(written) if isinstance(written, nodes.Name | nodes.Call) else f"({show(written)})"
            return f"a vector goes along the columns; as a column it is `{said}[:, None]`"
    return None


def _differ(node: nodes.Binary, left: Expression, right: Expression, why: str, advice: str | None = None) -> SurgError:
    notes = (
        Note(f"`{show(node.left)}` is {spelt(left.shape)}", node.left.span),
        Note(f"`{show(node.right)}` is {spelt(right.shape)}", node.right.span),
    )
    message = f"{spelt(left.shape)} {node.operator} {spelt(right.shape)}: {why}"
    return fail("SURG005", message, node.operator_span or node.span, notes=notes, help=advice)
