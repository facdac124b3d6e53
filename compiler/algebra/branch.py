"""Products of an activation with a matrix expression, from the right; no matrix is formed where that is cheaper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch.nn import functional

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.evaluate import Evaluator
from surgery.compiler.algebra.expression import Expression, without_gradient
from surgery.compiler.algebra.factors import Factor, Scale, flatten
from surgery.compiler.algebra.facts import reads_weight
from surgery.compiler.algebra.inputs import Input
from surgery.compiler.algebra.narrow import narrow, summands, total, turned
from surgery.compiler.algebra.order import multiplication_order
from surgery.compiler.algebra.price import bounds, is_parted, price
from surgery.compiler.algebra.quantity import value_of, whole_of
from surgery.compiler.algebra.recorder import called
from surgery.compiler.algebra.structures import STRUCTURES, Tensor
from surgery.compiler.kernels.added_linear import added_linear
from surgery.compiler.kernels.low_rank import low_rank_linear
from surgery.compiler.kernels.scaled_columns import scaled_columns

NEVER = 1 << 100  # above any number of operations
FUSED = low_rank_linear.__name__  # what a branch runs with that takes W and a narrow product in one operation


@dataclass
class Branch:
    """Products with an activation, from the right, in the cheapest order; matrices are cast to its dtype.

    With `fused` a product with W and the narrow part of what is added to it are one `low_rank_linear`.
    """

    base: Base
    evaluator: Evaluator
    dtype: torch.dtype  # of the activation
    rows: int  # planned tokens: they decide the order of multiplication
    fused: bool = False
    _with_weight: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # x and `x @ W.T`, by identity

    def adapted(self, x: Tensor, inside: Tensor, change: Expression, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + inside @ change.T + bias`; `inside` is x, or rows of its shape."""
        found = narrow(change) if self.fused else None
        if found is None:
            return self._added(x, inside, change, bias)
        operands: dict[str, Any] = {
            "weights": [self.base.base_weight()], "biases": [bias], "lefts": [self._side(found.left)],
            "rights": [self._side(found.right)], "scales": [found.scale],
        }  # fmt: skip
        if inside is not x:
            operands["narrow"] = inside
        y = called(low_rank_linear, x, **operands)[0]
        for part in found.rest:
            if part.operation == "negate":
                y = y - self.product(inside, part.arguments[0])
            else:
                y = y + self.product(inside, part)
        return y

    def _added(self, x: Tensor, inside: Tensor, change: Expression, bias: Tensor | None) -> Tensor:
        """`adapted` for a change that is not narrow; if it is one matrix to inside, its product is summed into W's."""
        scale = Scale()
        factors = flatten(change, True, False, scale)
        splits, order = self._splits(factors)
        plain = self.base.is_matrix and self.base.dtype == self.dtype and not scale.tensors
        if not plain or len(splits) > 2 or not self._is_dense(factors):
            return self.base_linear(x, bias) + self.product(inside, change)
        if len(factors) == 1 and factors[0].transposed:
            matrix = self.cast(factors[0].node, factors[0].stopped)
        else:
            matrix = self._matrix(factors, order, 1, len(factors)).transpose(-1, -2)
        apart = {} if inside is x else {"inside": inside}
        scaled = {} if scale.number == 1 else {"scale": float(scale.number)}
        return called(added_linear, x, self.base.base_weight(), bias, matrix, **apart, **scaled)

    def _is_dense(self, factors: list[Factor]) -> bool:
        """Whether a product of matrices is formed, or the only one is multiplied as the matrix that it is."""
        nodes = [factor.node for factor in factors]
        if any(map(self.evaluator.is_stacked, nodes)):
            return False
        if len(nodes) > 1 or self._formed(nodes[0]):
            return True
        own = nodes[0].operation in STRUCTURES and STRUCTURES[nodes[0].operation].has_product
        apart = nodes[0].operation == "weight" or _distributes(nodes[0]) or is_parted(nodes[0], self.rows)
        return not own and not apart

    def _side(self, node: Expression) -> Tensor:
        """A factor of a narrow product: a stored tensor as it is, a computed one in the dtype of weight algebra."""
        stored = self.evaluator.view(node)
        return self.evaluator(node) if stored is None else stored

    def base_linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`; without a bias computed once."""
        if bias is not None:
            return self.base.base_linear(x, bias)
        if id(x) not in self._with_weight:
            self._with_weight[id(x)] = (x, self.base.base_linear(x))
        return self._with_weight[id(x)][1]

    def product(self, x: Tensor, node: Expression, transposed: bool = True, stopped: bool = False) -> Tensor:
        """`x @ M.T`, or `x @ M` if not transposed."""
        scale = Scale()
        factors = flatten(node, transposed, stopped, scale)
        if len(factors) == 1 and _distributes(factors[0].node):
            return self._scaled(self._sum(x, factors[0]), scale)
        return self._chain(x, factors, scale)

    def _sum(self, x: Tensor, factor: Factor) -> Tensor:
        node = factor.node
        parts = [part if factor.transposed else turned(part) for part in summands(node)] if self.fused else []
        others = [part for part in parts if part.operation != "weight"]
        if others and len(others) == len(parts) - 1:
            change = total(others)
            return self.adapted(x, x, without_gradient(change) if factor.stopped else change)
        left, right = (self.product(x, part, factor.transposed, factor.stopped) for part in node.arguments)
        return left + right if node.operation == "add" else left - right

    def _splits(self, factors: list[Factor]) -> tuple[list[int], Mapping[tuple[int, int], int]]:
        """0, x alone, then the end of every matrix that is multiplied onto it; and the order within these."""
        sizes = [self.rows, factors[0].sides[0], *(factor.sides[1] for factor in factors)]
        order = multiplication_order(sizes, lambda a, b, c: self._cost(factors, sizes, a, b, c))
        splits, last = [len(factors)], len(factors)
        while last > 0:
            last = order[0, last]
            splits.append(last)
        return splits[::-1], order

    def _chain(self, x: Tensor, factors: list[Factor], scale: Scale) -> Tensor:
        sizes = [self.rows, factors[0].sides[0], *(factor.sides[1] for factor in factors)]
        splits, order = self._splits(factors)
        narrowest = min(splits[1:], key=lambda end: sizes[end + 1])
        for first, end in zip(splits, splits[1:], strict=False):
            x = self._apply(x, factors, order, first + 1, end)
            if end == narrowest:
                x = self._scaled(x, scale)
        return x

    def _cost(self, factors: list[Factor], sizes: list[int], first: int, split: int, last: int) -> int:
        if first == 0 and split + 1 == last and not self._formed(factors[last - 1].node):
            return price(factors[last - 1].node, sizes[0])
        if first > 0 and _merges_weight(factors[first - 1 : last]):
            return NEVER
        return 2 * sizes[first] * sizes[split + 1] * sizes[last + 1]

    def _apply(
        self, x: Tensor, factors: list[Factor], order: Mapping[tuple[int, int], int], first: int, last: int
    ) -> Tensor:
        if first < last:
            stacked = any(self.evaluator.is_stacked(factor.node) for factor in factors[first - 1 : last])
            stack = (factors[first - 1].sides[0], factors[last - 1].sides[1]) if stacked else None
            return self.base.product(x, self._matrix(factors, order, first, last), transposed=False, stack=stack)
        factor = factors[first - 1]
        node = factor.node
        if node.operation == "weight":
            return self.base_linear(x) if factor.transposed else self.base.base_linear_transposed(x)
        stacked = self.evaluator.is_stacked(node)
        if node.operation in STRUCTURES and not isinstance(x, Input):
            structure = STRUCTURES[node.operation]
            if structure.has_product and (structure.entrywise or not stacked):
                return self._structured(x, factor)
        if _distributes(node):
            return self._sum(x, factor)
        if not stacked and not isinstance(x, Input) and is_parted(node, self.rows):
            return self._piece(x, factor) if node.operation == "slice" else self._stack(x, factor)
        value, stack = self.cast(node, factor.stopped), factor.sides if stacked else None
        return self.base.product(x, value, transposed=factor.transposed, stack=stack)

    def vector(self, x: Tensor, node: Expression, stopped: bool = False) -> Tensor:
        """A number or a vector for the rows of x."""
        value = self.cast(node, stopped)
        return self.base.per_row(x, value, node.shape) if self.evaluator.is_stacked(node) else value

    def _structured(self, x: Tensor, factor: Factor) -> Tensor:
        """A structure's own product, in the dtype that it needs, or one with its matrix where that is quicker."""
        node, structure = factor.node, STRUCTURES[factor.node.operation]
        if self._formed(node):
            return self.base.product(x, self.cast(node, factor.stopped), transposed=factor.transposed)
        if structure.entrywise and self.evaluator.dtype != self.dtype and not self.evaluator.is_stacked(node):
            return called(scaled_columns, x, self.evaluator(node.arguments[0], factor.stopped))
        if not structure.wide or self.evaluator.dtype == self.dtype:
            values = [self.vector(x, part, factor.stopped) for part in node.arguments]
            return structure.product(node, x, factor.transposed, *values)
        values = [self.evaluator(part, factor.stopped) for part in node.arguments]
        return structure.product(node, x.to(self.evaluator.dtype), factor.transposed, *values).to(self.dtype)

    def _formed(self, node: Expression) -> bool:
        """Whether a structure with a product of its own is multiplied as the matrix that it is."""
        return node.operation in STRUCTURES and STRUCTURES[node.operation].forms(node, self.dtype)

    def _stack(self, x: Tensor, factor: Factor) -> Tensor:
        """A product with matrices side by side or one above the other: results side by side, or their sum."""
        node = factor.node
        if (node.operation == "vstack") == factor.transposed:
            return torch.cat([self.product(x, part, factor.transposed, factor.stopped) for part in node.arguments], -1)
        first, second = node.arguments
        widths = [whole_of(part.shape[-2 if node.operation == "vstack" else -1]) for part in node.arguments]
        left = self.product(x.narrow(-1, 0, widths[0]), first, factor.transposed, factor.stopped)
        return left + self.product(x.narrow(-1, *widths), second, factor.transposed, factor.stopped)

    def _piece(self, x: Tensor, factor: Factor) -> Tensor:
        """A product with rows and columns of a structure: x stands in zeros, and a part of the result is taken."""
        within, inner = bounds(factor.node), factor.node.arguments[0]
        assert within is not None
        taken, given = within if factor.transposed else within[::-1]
        length = whole_of(inner.shape[-1 if factor.transposed else -2])
        if given != (0, length):
            x = functional.pad(x, (given[0], length - given[1]))
        return self.product(x, inner, factor.transposed, factor.stopped).narrow(-1, taken[0], taken[1] - taken[0])

    def _matrix(self, factors: list[Factor], order: Mapping[tuple[int, int], int], first: int, last: int) -> Tensor:
        if first == last:
            factor = factors[first - 1]
            value = self.cast(factor.node, factor.stopped)
            return value.transpose(-1, -2) if factor.transposed else value
        split = order[first, last]
        return torch.matmul(self._matrix(factors, order, first, split), self._matrix(factors, order, split + 1, last))

    def cast(self, node: Expression, stopped: bool = False) -> Tensor:
        """A matrix in the activation's dtype: stored tensors are cast at use, computed ones are rounded once."""
        if node.value is not None and not node.shape:
            return value_of(node.value)
        if node.operation == "training":
            return self.evaluator.training
        if node.operation == "tensor":
            stored = self.evaluator.leaf(node, stopped)
            as_is = self.evaluator.dtypes.get(node.name) == self.dtype or self.evaluator.is_index(stored, node.name)
            return stored if as_is else stored.to(self.dtype)
        if self._formed(node):  # a matrix of given entries: they are rounded before there are many of each
            return STRUCTURES[node.operation].evaluate(node, *(self.cast(part, stopped) for part in node.arguments))
        value = self.evaluator(node, stopped)
        return value if self.evaluator.dtype == self.dtype else value.to(self.dtype)

    def _scaled(self, x: Tensor, scale: Scale) -> Tensor:
        if scale.number != 1:
            x = x * scale.number
        return reduce(lambda product, factor: product * self.vector(product, *factor), scale.tensors, x)


def _distributes(node: Expression) -> bool:
    """Whether a node is a sum of matrices of its own shape (a broadcast term is no matrix to multiply with)."""
    return node.operation in ("add", "subtract") and all(part.shape == node.shape for part in node.arguments)


def _merges_weight(factors: list[Factor]) -> bool:
    """Whether a product is as large as a W among its factors, or a sum with W: rounded, it would lose what is small."""
    size = factors[0].sides[0] * factors[-1].sides[1]
    whole = (factor for factor in factors if factor.node.operation == "weight" or _distributes(factor.node))
    return any(size >= factor.sides[0] * factor.sides[1] and reads_weight(factor.node) for factor in whole)
