"""Lowering of `x @ W_effective.T` to torch: as a branch beside the frozen product, or folded into one weight.

Both equal the evaluator, forward and backward. The code is plain torch: called on tensors it computes, called on
`torch.fx.Proxy` it records the nodes of the rewritten graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch.nn import functional

from surgery.compiler.algebra.evaluate import Evaluator, value_of, whole_of, wider
from surgery.compiler.algebra.expression import Expression, Range
from surgery.compiler.algebra.facts import is_column, is_row, is_scalar
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.order import multiplication_order
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import STRUCTURES, Tensor

ONE = Expression("number", value=Quantity.of(1))


@dataclass(frozen=True)
class Base:
    """The frozen weight of a site, the one place through which W and `x @ W.T` are reached."""

    stored: Tensor
    transposed: bool  # stored as [in, out], as Conv1D does
    dtype: torch.dtype

    def base_weight(self) -> Tensor:
        """W as `[out, in]`."""
        return self.stored.transpose(0, 1) if self.transposed else self.stored

    def base_linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`; a transposed one takes x as `[rows, in]`, as Conv1D does."""
        if not self.transposed:
            return functional.linear(x, self.stored, bias)
        return torch.matmul(x, self.stored) if bias is None else torch.addmm(bias, x, self.stored)

    def base_linear_transposed(self, x: Tensor) -> Tensor:
        """`x @ W`."""
        return functional.linear(x, self.stored) if self.transposed else torch.matmul(x, self.stored)


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


@dataclass
class Branch:
    """Products with an activation, from the right, in the cheapest order; matrices are cast to its dtype."""

    base: Base
    evaluator: Evaluator
    dtype: torch.dtype  # of the activation
    rows: int  # planned tokens: they decide the order of multiplication

    def product(self, x: Tensor, node: Expression, transposed: bool = True, stopped: bool = False) -> Tensor:
        """`x @ M.T`, or `x @ M` if not transposed."""
        scale = Scale()
        factors = flatten(node, transposed, stopped, scale)
        if len(factors) == 1 and _distributes(factors[0].node):
            return self._scaled(self._sum(x, factors[0]), scale)
        return self._chain(x, factors, scale)

    def _sum(self, x: Tensor, factor: Factor) -> Tensor:
        node = factor.node
        left, right = (self.product(x, part, factor.transposed, factor.stopped) for part in node.arguments)
        return left + right if node.operation == "add" else left - right

    def _chain(self, x: Tensor, factors: list[Factor], scale: Scale) -> Tensor:
        sizes = [self.rows, factors[0].sides[0], *(factor.sides[1] for factor in factors)]
        order = multiplication_order(sizes, lambda a, b, c: self._cost(factors, sizes, a, b, c))
        splits, last = [len(factors)], len(factors)
        while last > 0:
            last = order[0, last]
            splits.append(last)
        splits.reverse()  # 0 = x alone, then the end of every matrix that is multiplied onto it
        narrowest = min(splits[1:], key=lambda end: sizes[end + 1])
        for first, end in zip(splits, splits[1:], strict=False):
            x = self._apply(x, factors, order, first + 1, end)
            if end == narrowest:
                x = self._scaled(x, scale)
        return x

    def _cost(self, factors: list[Factor], sizes: list[int], first: int, split: int, last: int) -> int:
        if first == 0 and split + 1 == last:
            node = factors[last - 1].node
            if node.operation in STRUCTURES and STRUCTURES[node.operation].has_product:
                return STRUCTURES[node.operation].product_cost(sizes[0], [whole_of(size) for size in node.shape])
        return 2 * sizes[first] * sizes[split + 1] * sizes[last + 1]

    def _apply(
        self, x: Tensor, factors: list[Factor], order: Mapping[tuple[int, int], int], first: int, last: int
    ) -> Tensor:
        if first < last:
            return torch.matmul(x, self._matrix(factors, order, first, last))
        factor = factors[first - 1]
        node = factor.node
        if node.operation == "weight":
            return self.base.base_linear(x) if factor.transposed else self.base.base_linear_transposed(x)
        if node.operation in STRUCTURES and STRUCTURES[node.operation].has_product:
            values = [self._cast(part, factor.stopped) for part in node.arguments]
            return STRUCTURES[node.operation].product(x, factor.transposed, *values)
        if _distributes(node):
            return self._sum(x, factor)
        if factor.transposed:
            return functional.linear(x, self._cast(node, factor.stopped))
        return torch.matmul(x, self._cast(node, factor.stopped))

    def _matrix(self, factors: list[Factor], order: Mapping[tuple[int, int], int], first: int, last: int) -> Tensor:
        if first == last:
            factor = factors[first - 1]
            value = self._cast(factor.node, factor.stopped)
            return value.transpose(-1, -2) if factor.transposed else value
        split = order[first, last]
        return torch.matmul(self._matrix(factors, order, first, split), self._matrix(factors, order, split + 1, last))

    def _cast(self, node: Expression, stopped: bool) -> Tensor:
        """A matrix in the activation's dtype: stored tensors are cast at use, computed ones are rounded once."""
        if node.operation == "tensor":
            stored = self.evaluator.leaf(node, stopped)
            return stored if self.evaluator.dtypes.get(node.name) == self.dtype else stored.to(self.dtype)
        value = self.evaluator(node, stopped)
        return value if self.evaluator.dtype == self.dtype else value.to(self.dtype)

    def _scaled(self, x: Tensor, scale: Scale) -> Tensor:
        if scale.number != 1:
            x = x * scale.number
        return reduce(lambda product, factor: product * self._cast(*factor), scale.tensors, x)


def _distributes(node: Expression) -> bool:
    """Whether a node is a sum of matrices of its own shape (a broadcast term is no matrix to multiply with)."""
    return node.operation in ("add", "subtract") and all(part.shape == node.shape for part in node.arguments)


@dataclass(frozen=True)
class Adaptation:
    """How one site is run: its formula, its strategy, and what lowering must know of dtypes and sizes."""

    formula: MethodFormula
    strategy: str
    rows: int
    dtype: torch.dtype  # of the activation and of W
    adapter_dtypes: Mapping[str, torch.dtype]

    def __call__(
        self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor], training: Tensor | bool
    ) -> Tensor:
        """The site's output for `x` `[..., in]`; `tensors` are the method's by name."""
        if self.strategy == "fold":
            return self._fold(x, base, bias, tensors)
        return self._branch(x, base, bias, tensors, training)

    def _evaluator(self, base: Base, tensors: Mapping[str, Tensor]) -> Evaluator:
        dtypes = {**self.adapter_dtypes, "W": base.dtype}
        return Evaluator(base.base_weight, tensors, wider(base.dtype), dtypes)

    def _fold(self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        evaluator = self._evaluator(base, tensors)
        value = evaluator(self.formula.expression)
        if self.formula.form == "delta":
            value = evaluator(Expression("weight", (), self.formula.expression.shape, name="W")) + value
        weight = value if evaluator.dtype == base.dtype else value.to(base.dtype)
        return functional.linear(x, weight, bias)

    def _branch(
        self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor], training: Tensor | bool
    ) -> Tensor:
        formula = self.formula
        branch = Branch(base, self._evaluator(base, tensors), self.dtype, self.rows)
        dropped = functional.dropout(x, formula.dropout, training) if formula.dropout else x
        if formula.form == "delta":
            return base.base_linear(x, bias) + branch.product(dropped, formula.expression)
        y = branch.product(dropped, formula.expression)
        if formula.dropout:  # x @ W.T + input @ (M - W).T
            y = base.base_linear(x) + (y - base.base_linear(dropped))
        return y if bias is None else y + bias
