"""Expressions to torch: the reference that every lowering must equal, and the part of lowering that forms matrices.

The code is plain torch, so on `torch.fx.Proxy` arguments it records nodes instead of computing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from surgery.compiler.algebra.expression import BEFORE, GRADIENT, MARK, Expression, Range, rewriting
from surgery.compiler.algebra.order import multiplication_order
from surgery.compiler.algebra.quantity import Quantity, value_of, whole_of
from surgery.compiler.algebra.schedule import at_step, reads_clock
from surgery.compiler.algebra.structures import STRUCTURES, Tensor
from surgery.compiler.algebra.structures.noise import NOISE


def wider(dtype: torch.dtype, other: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype in which weight algebra runs: float32, or the weight's if that is wider."""
    return torch.promote_types(dtype, other)


@dataclass
class Evaluator:
    """Values of expressions for one site: `weight` `[out, in]` and the method's tensors, all cast to `dtype`.

    `weight` is a function so that W is read through one place and only where an equation needs it dense. What is named
    in `stacked`, and all that is computed from it, has a leading axis more than its shape says: that of the experts.
    """

    weight: Callable[[], Tensor]
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    stacked: frozenset[str] = frozenset()
    training: Any = 0  # whether this is the forward of a step, as a number or a node
    noisy: Any = True  # whether noise is wanted where it stands
    _known: dict[tuple[int, bool], tuple[Expression, Tensor]] = field(default_factory=dict)

    def __call__(self, node: Expression, stopped: bool = False) -> Tensor:
        """The dense value; a part used twice is computed once. `stopped` detaches every tensor on the way."""
        key = (id(node), stopped)
        if key not in self._known:
            self._known[key] = (node, self._value(node, stopped))  # the node is kept, so its id stays taken
        return self._known[key][1]

    def is_stacked(self, node: Expression) -> bool:
        """Whether a value has the axis of the experts in front."""
        if not self.stacked:
            return False
        if node.operation in ("tensor", "weight"):
            return node.name.partition(MARK)[0].removesuffix(BEFORE).removesuffix(GRADIENT) in self.stacked
        return any(map(self.is_stacked, node.arguments))

    def _aligned(self, node: Expression, stopped: bool) -> tuple[Tensor, ...]:
        """The operands of an elementwise operation: axes that one lacks are put in behind that of the experts."""
        rank = len(node.shape)
        return tuple(self.lifted(part, rank, stopped) for part in node.arguments)

    def lifted(self, node: Expression, rank: int, stopped: bool = False) -> Tensor:
        """The value as one operand among others of `rank` axes."""
        value = self(node, stopped)
        if self.is_stacked(node):
            for _ in range(rank - len(node.shape)):
                value = value.unsqueeze(1)
        return value

    def leaf(self, node: Expression, stopped: bool) -> Tensor:
        """A tensor of the method as it is stored; its copy from before the step is called NAME_before."""
        tensor = self.tensors[node.name]
        return tensor.detach() if stopped else tensor

    def view(self, node: Expression, stopped: bool = False) -> Tensor | None:
        """W or a tensor of the method as it is stored, transposed or in part; None for what is computed."""
        match node.operation:
            case "weight":
                return self.weight()
            case "tensor":
                return self.leaf(node, stopped)
            case "stop":
                return self.view(node.arguments[0], True)
            case "transpose" | "slice":
                inner = self.view(node.arguments[0], stopped)
                if inner is None:
                    return None
                return inner.transpose(-1, -2) if node.operation == "transpose" else inner[_index(node)]
        return None

    def operand(self, node: Expression, stopped: bool = False) -> Tensor:
        """An operand of a kernel: what is stored as it is, what is computed in the working dtype."""
        view = self.view(node, stopped)
        return self(node, stopped) if view is None else view

    def cast(self, value: Tensor, name: str) -> Tensor:
        """A stored tensor in the working dtype; no cast is recorded where it already is, and positions stay whole."""
        return value if self.dtype_of(value, name) == self.dtype or self.is_index(value, name) else value.to(self.dtype)

    def dtype_of(self, value: Tensor, name: str) -> torch.dtype | None:
        """The dtype in which a tensor is stored, None where only a graph knows it."""
        return self.dtypes.get(name, value.dtype if isinstance(value, torch.Tensor) else None)

    def is_index(self, value: Tensor, name: str) -> bool:
        """Whether a tensor holds positions: whole numbers, which are never cast."""
        dtype = self.dtype_of(value, name)
        return dtype is not None and not dtype.is_floating_point

    def _value(self, node: Expression, stopped: bool) -> Tensor:
        parts = node.arguments
        match node.operation:
            case "number":
                assert node.value is not None
                return at_step(node.value, self.tensors) if reads_clock(node.value) else value_of(node.value)
            case "filled":
                assert node.value is not None
                return self.like().new_full(tuple(map(whole_of, node.shape)), value_of(node.value))
            case "weight":
                return self.cast(self.weight(), "W")
            case "tensor":
                return self.cast(self.leaf(node, stopped), node.name)
            case "matmul":
                return self._product(node, stopped)
            case "stop":
                return self(parts[0], True) if _has_tensors(parts[0]) else self(parts[0], stopped)
            case "previous":
                return self(rewriting(_before)(parts[0]), stopped)
            case "transpose":
                return self(parts[0], stopped).transpose(-1, -2)
            case "slice":
                leading = (slice(None),) if self.is_stacked(parts[0]) else ()
                return self(parts[0], stopped)[(*leading, *_index(node))]
            case "negate":
                return -self(parts[0], stopped)
            case "add":
                left, right = self._aligned(node, stopped)
                return left + right
            case "subtract":
                left, right = self._aligned(node, stopped)
                return left - right
            case "training":
                return self.training
            case "multiply" if any(part.operation == "training" for part in parts) and self.noisy is not self.training:
                return replace(self, noisy=self.training)._value(node, stopped)  # nothing is drawn for evaluation
            case "multiply" if parts[0].value == Quantity.of(1) and not parts[0].shape:
                return self(parts[1], stopped)
            case "multiply":
                left, right = self._aligned(node, stopped)
                return left * right
            case "divide":
                left, right = self._aligned(node, stopped)
                return left / right
            case "power":
                left, right = self._aligned(node, stopped)
                return left**right
        structure = STRUCTURES[node.operation]
        if structure.as_stored:
            return structure.evaluate(node, *(self.operand(part, stopped) for part in parts))
        like = (self.like(),) if structure.constant else ()
        if node.operation in NOISE:
            return structure.evaluate(node, *like, *(self(part, stopped) for part in parts), wanted=self.noisy)  # type: ignore[call-arg]
        return structure.evaluate(node, *like, *(self(part, stopped) for part in parts))

    def like(self) -> Tensor:
        """A tensor of the working dtype on the site's device."""
        first = next((name for name in self.tensors if not self.is_index(self.tensors[name], name)), None)
        return self.cast(self.weight(), "W") if first is None else self.cast(self.tensors[first], first)

    def _product(self, node: Expression, stopped: bool) -> Tensor:
        """A chain of products in its cheapest order; a diagonal matrix scales rows or columns."""
        factors = chain(node)
        diagonal = [part.operation == "diag" for part in factors]
        if any(len(part.shape) != 2 for part in factors) or not (any(diagonal) or len(factors) > 2):
            return self._matmul(node, stopped)
        sizes = [whole_of(factors[0].shape[-2]), *(whole_of(part.shape[-1]) for part in factors)]
        order = multiplication_order(sizes)

        def product(first: int, last: int) -> Tensor:
            if first == last:
                return self(factors[first], stopped)
            split = order[first, last]
            if first == split and diagonal[first]:
                return self(factors[first].arguments[0], stopped).unsqueeze(-1) * product(split + 1, last)
            if split + 1 == last and diagonal[last]:
                return product(first, split) * self(factors[last].arguments[0], stopped).unsqueeze(-2)
            return torch.matmul(product(first, split), product(split + 1, last))

        return product(0, len(factors) - 1)

    def _matmul(self, node: Expression, stopped: bool) -> Tensor:
        """One product; a stacked vector is a matrix of one row, or of one column."""
        left, right = node.arguments
        rank = max(len(left.shape), len(right.shape), 2)
        row = len(left.shape) == 1 and self.is_stacked(left)
        column = len(right.shape) == 1 and self.is_stacked(right)
        first = self(left, stopped).unsqueeze(-2) if row else self.lifted(left, rank, stopped)
        second = self(right, stopped).unsqueeze(-1) if column else self.lifted(right, rank, stopped)
        product = torch.matmul(first, second)
        product = product.squeeze(-1) if column else product
        return product.squeeze(-2 if not column else -1) if row else product


def chain(node: Expression) -> list[Expression]:
    """The factors of a product of products, left to right."""
    if node.operation != "matmul":
        return [node]
    return [*chain(node.arguments[0]), *chain(node.arguments[1])]


def _has_tensors(node: Expression) -> bool:
    return node.operation in ("tensor", "weight") or any(_has_tensors(part) for part in node.arguments)


def _before(node: Expression) -> Expression:
    """A tensor's copy that was kept at the start of the step; W's too."""
    if node.operation in ("tensor", "weight"):
        return Expression("tensor", (), node.shape, name=f"{node.name}{BEFORE}")
    return node


def _index(node: Expression) -> tuple[slice | int | None, ...]:
    index: list[slice | int | None] = []
    for part in node.index:
        if isinstance(part, Range):
            index.append(slice(whole_of(part.start), whole_of(part.stop)))
        else:
            index.append(None if part is None else whole_of(part))
    return tuple(index)


def evaluate(
    node: Expression, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None,
    stacked: frozenset[str] = frozenset(),
) -> torch.Tensor:  # fmt: skip
    """The dense value of an expression at a site, in `dtype` (default: float32 or the weight's, if wider).

    `weight` is `[out, in]`; what is `stacked` has the experts' axis in front. This is the reference: float64 arguments
    give a float64 answer.
    """
    value = Evaluator(lambda: weight, tensors, dtype or wider(weight.dtype), stacked=stacked)(node)
    return value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=dtype or wider(weight.dtype))
