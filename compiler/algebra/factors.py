"""A matrix as a product of factors, with what scales the whole product taken out."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.compiler.algebra.expression import Expression, Range
from surgery.compiler.algebra.facts import is_column, is_row, is_scalar
from surgery.compiler.algebra.low_rank import split
from surgery.compiler.algebra.quantity import Quantity, value_of, whole_of

ONE = Expression("number", value=Quantity.of(1))


@dataclass(frozen=True)
class Factor:
    """One matrix of a product, perhaps transposed, perhaps without gradient."""

    node: Expression
    transposed: bool
    stopped: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns as it stands in the product."""
        rows, columns = (whole_of(size) for size in self.node.shape[-2:])
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass
class Scale:
    """What multiplies a whole product: a number and tensors of one entry."""

    number: float | int = 1
    tensors: list[tuple[Expression, bool]] = field(default_factory=list)

    def take(self, node: Expression, stopped: bool, inverse: bool = False) -> None:
        """Multiply (or divide) by a factor of one entry."""
        if node.value is not None:
            value = value_of(node.value)
            self.number = self.number / value if inverse else self.number * value
        else:
            self.tensors.append((Expression("divide", (ONE, node), node.shape) if inverse else node, stopped))


def flatten(node: Expression, transposed: bool, stopped: bool, scale: Scale) -> list[Factor]:
    """The matrix (or its transpose) as a product of factors; factors of one entry go into `scale`."""
    parts = node.arguments
    match node.operation:
        case "matmul":
            sides = [flatten(part, transposed, stopped, scale) for part in parts]
            return sides[1] + sides[0] if transposed else sides[0] + sides[1]
        case "transpose":
            return flatten(parts[0], not transposed, stopped, scale)
        case "stop":
            return flatten(parts[0], transposed, True, scale)
        case "negate":
            scale.number = -scale.number
            return flatten(parts[0], transposed, stopped, scale)
        case "multiply" | "divide":
            pairs = (parts, parts[::-1]) if node.operation == "multiply" else (parts,)
            for part, by in pairs:
                if part.shape != node.shape:
                    continue
                if is_scalar(by):
                    scale.take(by, stopped, node.operation == "divide")
                    return flatten(part, transposed, stopped, scale)
                if is_row(by) or is_column(by):
                    inner = flatten(part, transposed, stopped, scale)
                    factor = Factor(_diagonal(by, node.operation == "divide"), False, stopped)
                    # a row scales columns (M @ diag), a column scales rows (diag @ M); transposing swaps the sides
                    return [*inner, factor] if is_row(by) != transposed else [factor, *inner]
    if cheaper := split(node):
        return flatten(cheaper, transposed, stopped, scale)
    return [Factor(node, transposed, stopped)]


def _diagonal(vector: Expression, inverse: bool) -> Expression:
    if len(vector.shape) == 2:  # [n, 1] or [1, n] to [n]
        index = tuple(
            Quantity.of(0) if size == Quantity.of(1) and position != _long_axis(vector) else Range(Quantity.of(0), size)
            for position, size in enumerate(vector.shape)
        )
        vector = Expression("slice", (vector,), (vector.shape[_long_axis(vector)],), index=index)
    if inverse:
        vector = Expression("divide", (ONE, vector), vector.shape)
    return Expression("diag", (vector,), (*vector.shape, vector.shape[-1]))


def _long_axis(vector: Expression) -> int:
    return 0 if is_column(vector) else 1
