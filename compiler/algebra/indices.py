"""Index tensors: `choice` draws them, and `select` and `scatter` alone read them."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.compiler.algebra.expression import MARK, Expression
from surgery.compiler.algebra.formula import TensorFormula
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.diagnostics import fail


def check_indices(value: Expression, tensors: Mapping[str, TensorFormula]) -> None:
    """Refuse an index that `choice` does not draw or that may lie outside, and a drawn one in any other place."""
    index, limit = _index_of(value)
    for position, part in enumerate(value.arguments):
        tensor = tensors.get(part.name.partition(MARK)[0]) if part.operation == "tensor" else None
        if tensor is not None:
            _check(tensor, value.operation, limit if position == index else None)
        check_indices(part, tensors)


def _index_of(node: Expression) -> tuple[int | None, Quantity | None]:
    """Which argument is an index, and how many positions there are to choose from."""
    if node.operation == "select":
        return 0, node.shape[-1]
    return (1, node.shape[0] * node.shape[1]) if node.operation == "scatter" else (None, None)


def _check(tensor: TensorFormula, function: str, limit: Quantity | None) -> None:
    drawn = tensor.start.name == "choice"
    if limit is None:
        if drawn:
            message = f"`{tensor.name}` holds positions, which `select` and `scatter` alone can read"
            advice = f"the rows that it chooses are `select({tensor.name}, n)`"
            raise fail("SURG004", message, tensor.span, help=advice)
        return
    if not drawn:
        message = f"`{tensor.name}` is an index of `{function}`, so `choice` has to draw it"
        raise fail("SURG004", message, tensor.span, help=f"write `{tensor.name} = frozen choice({limit})[k]`")
    most = tensor.start.arguments[0]
    if most.whole is not None and limit.whole is not None and most.whole > limit.whole:
        message = f"`{tensor.name}` is drawn below {most}, and `{function}` has {limit} positions here"
        raise fail("SURG005", message, tensor.span, help=f"draw it from as many: `choice({limit})`")
