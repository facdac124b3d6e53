"""Expressions of activations, rows of `x` and `y`: what they may hold, and their values.

The code is plain torch, so on `torch.fx.Proxy` arguments it records nodes instead of computing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch.nn import functional

from surgery.compiler.algebra.expression import Expression, Range, without_gradient
from surgery.compiler.algebra.formula import TOKENS, reads_rows
from surgery.compiler.algebra.inputs import Input
from surgery.compiler.algebra.quantity import Quantity, value_of, whole_of
from surgery.compiler.algebra.structures import STRUCTURES, Tensor

ARITHMETIC: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda left, right: left + right,
    "subtract": lambda left, right: left - right,
    "multiply": lambda left, right: left * right,
    "divide": lambda left, right: left / right,
    "power": lambda left, right: left**right,
}


def misplaced(node: Expression) -> tuple[Expression, str] | None:
    """The innermost part that does not treat every row of an activation by itself, with what is wrong; None if fine."""
    if not reads_rows(node) or node.operation in ("x", "y"):
        return None
    for part in node.arguments:
        if found := misplaced(part):
            return found
    wrong = _wrong(node)
    return None if wrong is None else (node, wrong)


def _wrong(node: Expression) -> str | None:
    parts = node.arguments
    match node.operation:
        case "matmul":
            if reads_rows(parts[1]):
                return "an activation stands left of `@`, a matrix right of it"
        case name if name in ARITHMETIC:
            if any(not reads_rows(part) and len(part.shape) > 1 and part.shape[0] != Quantity.of(1) for part in parts):
                return "a matrix meets an activation in `@` alone; entry by entry it meets vectors and numbers"
        case "slice":
            if not _keeps_rows(node):
                return "of an activation only columns can be taken, as in `y[:, 0:8]`"
        case "negate" | "dropout" | "sum_for":
            pass
        case name if name not in STRUCTURES or not STRUCTURES[name].rowwise:
            return f"`{name}` does not treat every row of an activation by itself"
    return None


def _keeps_rows(node: Expression) -> bool:
    rows = Range(Quantity.of(0), TOKENS)
    return len(node.index) == 2 and node.index[0] == rows and isinstance(node.index[1], Range)


@dataclass
class Rows:
    """Values of expressions of activations at one site, `[..., n]`.

    `leaves` are the activations by name; `value` gives what reads none of them, in their dtype, and `product` gives
    `rows @ matrix`: the lowering and the reference differ in these two.
    """

    leaves: Mapping[str, Tensor | Input]
    value: Callable[[Expression], Tensor]
    product: Callable[[Tensor, Expression], Tensor]
    training: Tensor | bool
    _known: dict[tuple[int, bool], tuple[Expression, Tensor]] = field(default_factory=dict)

    def __call__(self, node: Expression, stopped: bool = False) -> Tensor:
        """The value; a part that occurs twice is computed once. `stopped` detaches everything on the way."""
        value = self._given(node, stopped)
        return value.dense() if isinstance(value, Input) else value

    def input(self, node: Expression) -> Tensor | Input:
        """The value for a product with a matrix: an x that is no rows stays what it is."""
        return self._given(node, False)

    def _given(self, node: Expression, stopped: bool) -> Tensor | Input:
        key = (id(node), stopped)
        if key not in self._known:
            self._known[key] = (node, self._value(node, stopped))  # the node is kept, so its id stays taken
        return self._known[key][1]

    def _value(self, node: Expression, stopped: bool) -> Tensor | Input:
        parts = node.arguments
        if node.operation == "number" and node.value is not None:
            return value_of(node.value)
        if not reads_rows(node):
            return self.value(without_gradient(node) if stopped else node)
        match node.operation:
            case "x" | "y":
                return self.leaves[node.name].detach() if stopped else self.leaves[node.name]
            case "matmul":
                return self.product(self._given(parts[0], stopped), without_gradient(parts[1]) if stopped else parts[1])
            case "dropout":
                share = parts[1].value
                assert share is not None
                rate = float(value_of(share))
                rows = self._given(parts[0], stopped)
                if isinstance(rows, Input):
                    return rows.dropout(rate, self.training) if rate else rows
                return functional.dropout(rows, rate, self.training) if rate else rows
            case "stop":
                return self._given(parts[0], True)
            case "negate":
                return -self(parts[0], stopped)
            case "slice":
                columns = node.index[1]
                assert isinstance(columns, Range)
                return self(parts[0], stopped)[..., whole_of(columns.start) : whole_of(columns.stop)]
            case name if name in ARITHMETIC:
                return ARITHMETIC[name](*(self(part, stopped) for part in parts))
        return STRUCTURES[node.operation].evaluate(node, *(self(part, stopped) for part in parts))
