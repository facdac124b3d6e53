"""`A[a:b, i]`: entries of an expression by their places, which count from 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.expression import Expression, Range
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.shapes import spelt
from surgery.compiler.diagnostics import fail
from surgery.compiler.printer import show

if TYPE_CHECKING:
    from surgery.compiler.algebra.build import Builder


def sliced(builder: Builder, node: nodes.Subscript, operand: Expression) -> Expression:
    """Some entries of an expression: `operand[a:b, 2, None]`. Raises SURG005, and SURG026 outside of an axis."""
    shape: list[Quantity] = []
    taken: list[Range | Quantity | None] = []
    axis = 0
    for index in node.indices:
        if isinstance(index, nodes.Name) and index.name == "None":
            taken.append(None)
            shape.append(Quantity.of(1))
            continue
        if axis == len(operand.shape):
            raise fail("SURG005", f"too many indices for {spelt(operand.shape)}", index.span or node.span)
        length = operand.shape[axis]
        axis += 1
        if isinstance(index, nodes.Slice):
            start = _position(builder, index.start, length) if index.start else Quantity.of(0)
            stop = _position(builder, index.stop, length) if index.stop else length
            bounds = (start.whole, stop.whole, length.whole)
            if None not in bounds and not 0 <= bounds[0] <= bounds[1] <= bounds[2]:  # type: ignore[operator]
                raise fail("SURG026", f"{start}:{stop} is outside of 0:{length}", index.span or node.span)
            taken.append(Range(start, stop))
            shape.append(stop - start)
        else:
            entry = _position(builder, index, length)
            if entry.whole is not None and length.whole is not None and not 0 <= entry.whole < length.whole:
                last = length - Quantity.of(1)
                raise fail("SURG026", f"index {entry} is outside of 0..{last}", index.span or node.span)
            taken.append(entry)
    taken += [Range(Quantity.of(0), length) for length in operand.shape[axis:]]
    return Expression("slice", (operand,), (*shape, *operand.shape[axis:]), index=tuple(taken))


def _position(builder: Builder, node: nodes.Expr, length: Quantity) -> Quantity:
    """A position along an axis of that length; one that counts from the end has no meaning here."""
    position = builder.size(node)
    if position.constant is not None and position.constant < 0:
        message = f"a position counts from 0, `{show(node)}` is below it"
        raise fail("SURG026", message, node.span, help=f"from the end count as `{length} - 1`")
    return position
