"""Random expressions: every lowering equals the evaluator forward and backward, and every fact holds of the numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.branch import FUSED
from surgery.compiler.algebra.evaluate import evaluate
from surgery.compiler.algebra.expression import Expression, Range
from surgery.compiler.algebra.facts import identity_at_start, keeps_zeros
from surgery.compiler.algebra.formula import MethodFormula, Start, TensorFormula, Term, rows
from surgery.compiler.algebra.low_rank import factor
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.quantity import Quantity, size, whole_of
from surgery.compiler.algebra.rank import rank_bound
from surgery.compiler.algebra.structures import STRUCTURES

SIZES = st.sampled_from([1, 2, 3, 5])
OUT, IN = 4, 6


def of(value: float) -> Expression:
    return Expression("number", value=Quantity.of(value))


def call(name: str, *arguments: Expression) -> Expression:
    return Expression(name, arguments, STRUCTURES[name].shape(*arguments))


@dataclass
class Grower:
    """Draws a random expression of a given shape, and keeps the tensors that it reads."""

    draw: Any
    tensors: dict[str, TensorFormula] = field(default_factory=dict)

    def tensor(self, *shape: int) -> Expression:
        name = f"T{len(self.tensors)}"
        sizes = tuple(size(length) for length in shape)
        start = self.draw(st.sampled_from(["zeros", "normal", "ones"]))
        role = self.draw(st.sampled_from(["train", "train", "frozen"]))
        self.tensors[name] = TensorFormula(
            name, role, sizes, Start(start, (Quantity.of(1),) if start == "normal" else ())
        )
        return Expression("tensor", (), sizes, name=name)

    def vector(self, length: int, depth: int) -> Expression:
        if depth and self.draw(st.booleans()):
            return call("row_norm", self.matrix(length, self.draw(SIZES), depth - 1))
        return self.tensor(length)

    def matrix(self, rows: int, columns: int, depth: int) -> Expression:
        shape = (size(rows), size(columns))
        leaves = (
            ["tensor"] + ["weight"] * ((rows, columns) == (OUT, IN)) + ["weight.T"] * ((rows, columns) == (IN, OUT))
        )
        inner = ["matmul", "matmul", "matmul", "add", "subtract", "multiply", "scale", "shrink", "negate", "transpose",
                 "stop", "rows", "columns", "diag", "slice", "tanh", "surrogate", "mask", "stack"]  # fmt: skip
        if depth and self.draw(st.integers(0, 2)) == 0:
            return self.structured(rows, columns, depth - 1)
        kind = self.draw(st.sampled_from(leaves if depth == 0 else leaves + inner))

        def deeper() -> Expression:
            return self.matrix(rows, columns, depth - 1)

        match kind:
            case "tensor":
                return self.tensor(rows, columns)
            case "weight":
                return Expression("weight", (), shape, name="W")
            case "weight.T":
                return Expression("transpose", (Expression("weight", (), shape[::-1], name="W"),), shape)
            case "matmul":
                width = self.draw(SIZES)
                left, right = self.matrix(rows, width, depth - 1), self.matrix(width, columns, depth - 1)
                return Expression("matmul", (left, right), shape)
            case "add" | "subtract" | "multiply":
                return Expression(kind, (deeper(), deeper()), shape)
            case "scale":
                return Expression("multiply", (of(self.draw(st.sampled_from([-2.0, 0.5, 3]))), deeper()), shape)
            case "shrink":
                return Expression("divide", (deeper(), of(4)), shape)
            case "negate":
                return Expression("negate", (deeper(),), shape)
            case "transpose":
                return Expression("transpose", (self.matrix(columns, rows, depth - 1),), shape)
            case "rows":
                column = Expression("slice", (self.vector(rows, depth - 1),), (size(rows), size(1)),
                                    index=(Range(size(0), size(rows)), None))  # fmt: skip
                return Expression("multiply", (column, deeper()), shape)
            case "columns":
                return Expression("multiply", (deeper(), self.vector(columns, depth - 1)), shape)
            case "diag":
                return Expression("matmul", (call("diag", self.vector(rows, depth - 1)), deeper()), shape)
            case "slice":
                larger = self.matrix(rows + 1, columns, depth - 1)
                index = (Range(size(1), size(rows + 1)), Range(size(0), size(columns)))
                return Expression("slice", (larger,), shape, index=index)
            case "stop" | "tanh":
                return call(kind, deeper())
            case "surrogate":
                return call("surrogate", deeper(), deeper())
            case "mask":
                return Expression("multiply", (call("mask", deeper()), deeper()), shape)
            case "stack":
                return Expression("slice", (call("vstack", deeper(), deeper()),), shape,
                                  index=(Range(size(0), size(rows)), Range(size(0), size(columns))))  # fmt: skip
        raise AssertionError(kind)

    def index(self, length: int, total: int) -> Expression:
        name = f"T{len(self.tensors)}"
        start = Start("choice", (size(total),))
        self.tensors[name] = TensorFormula(name, "frozen", (size(length),), start)
        return Expression("tensor", (), (size(length),), name=name)

    def onehot(self, rows: int, columns: int) -> Expression:
        name = f"T{len(self.tensors)}"
        self.tensors[name] = TensorFormula(name, "frozen", (size(rows), size(columns)), Start("onehot_rows"))
        return call("selection", Expression("tensor", (), (size(rows), size(columns)), name=name))

    def blocks(self, *shape: int) -> Expression:
        """A tensor with leading axes, or the product of two."""
        if self.draw(st.booleans()):
            return self.tensor(*shape)
        *leading, rows, columns = shape
        return product(self.tensor(*leading, rows, 1), self.tensor(*leading, 1, columns))

    def structured(self, rows: int, columns: int, depth: int) -> Expression:
        """A matrix of that shape in which a structure of the library stands."""
        square = ["circ", "skewcirc", "symtoeplitz", "eye"] + ["cayley", "skew"] * (rows > 1)
        square += ["rotary"] * (rows % 2 == 0)
        kinds = ["toeplitz", "kron", "khatri_rao", "blockdiag", "grid", "tile", "wrap", "select", "selection",
                 "scatter", "ifft2", "topk_mask", "where", "hadamard", "piece"]  # fmt: skip
        kinds += ["vstack"] * (rows > 1) + ["hstack"] * (columns > 1)
        kind = self.draw(st.sampled_from(kinds + square))
        a, b = (self.draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0])) for n in (rows, columns))
        few, length = self.draw(st.sampled_from([1, 2])), self.draw(SIZES)
        match kind:
            case "toeplitz":
                return call(kind, self.vector(rows, depth), self.vector(columns, depth))
            case "kron":
                return call(kind, self.matrix(a, b, depth), self.matrix(rows // a, columns // b, depth))
            case "khatri_rao":
                return call(kind, self.matrix(a, columns, depth), self.matrix(rows // a, columns, depth))
            case "blockdiag":
                g = math.gcd(rows, columns)
                return call(kind, self.blocks(g, rows // g, columns // g))
            case "grid":
                return call(kind, self.blocks(a, b, rows // a, columns // b))
            case "tile":
                return product(call(kind, of(rows), of(length)), self.matrix(length, columns, depth))
            case "wrap":
                return product(self.matrix(rows, length, depth), transposed(call(kind, of(columns), of(length))))
            case "select":
                count = min(few, columns)
                return product(self.matrix(rows, count, depth), call(kind, self.index(count, columns), of(columns)))
            case "selection":
                return product(self.matrix(rows, few, depth), self.onehot(few, columns))
            case "scatter":
                count = min(length, rows * columns)
                return call(kind, self.tensor(count), self.index(count, rows * columns), of(rows), of(columns))
            case "ifft2":
                return call(kind, self.matrix(rows, columns, depth))
            case "topk_mask":
                mask = call(kind, self.tensor(rows, columns), of(0.5))
                return Expression("multiply", (mask, self.matrix(rows, columns, depth)), mask.shape)
            case "where":
                chosen = call("mask", self.tensor(rows, columns))
                return call(kind, chosen, self.matrix(rows, columns, depth), of(0))
            case "vstack":
                upper = self.draw(st.integers(1, rows - 1))
                return call(kind, self.matrix(upper, columns, depth), self.matrix(rows - upper, columns, depth))
            case "hstack":
                left = self.draw(st.integers(1, columns - 1))
                return call(kind, self.matrix(rows, left, depth), self.matrix(rows, columns - left, depth))
            case "piece":
                whole = call(self.draw(st.sampled_from(["tile", "wrap"])), of(rows + 2), of(columns + few))
                index = (Range(size(1), size(rows + 1)), Range(size(few), size(columns + few)))
                return Expression("slice", (whole,), (size(rows), size(columns)), index=index)
            case "hadamard":
                left, right = (product(self.tensor(rows, few), self.tensor(few, columns)) for _ in range(2))
                return Expression("multiply", (left, right), left.shape)
            case "eye":
                left = call(kind, of(rows))
            case "rotary":
                left = call(kind, of(few), of(rows))
            case "cayley" | "skew":
                left = call("skew", self.tensor(rows * (rows - 1) // 2))
                left = call("cayley", left) if kind == "cayley" else left
            case _:
                left = call(kind, self.vector(rows, depth))
        return product(left, self.matrix(rows, columns, depth))


def product(left: Expression, right: Expression) -> Expression:
    return Expression("matmul", (left, right), (*left.shape[:-1], right.shape[-1]))


def transposed(node: Expression) -> Expression:
    return Expression("transpose", (node,), node.shape[::-1])


def on_x(matrix: Expression) -> Term:
    return Term(matrix, rows("x", matrix.shape[1]))


@st.composite
def formulas(draw: Any, depth: int = 3) -> MethodFormula:
    grower = Grower(draw)
    expression = grower.matrix(OUT, IN, depth)
    form = draw(st.sampled_from(["delta", "weight"]))
    return MethodFormula("random", tuple(grower.tensors.values()), form, expression, (on_x(expression),), (), "")


def values_of(formula: MethodFormula, seed: int, at_start: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for tensor in formula.tensors:
        shape = tuple(whole_of(length) for length in tensor.shape)
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if tensor.start.name == "choice":
            total = whole_of(tensor.start.arguments[0])
            values[tensor.name] = torch.randperm(total, generator=generator)[: shape[0]]
            continue
        if tensor.start.name == "onehot_rows":
            value = torch.eye(shape[1], dtype=torch.float64)[torch.randint(shape[1], shape[:1], generator=generator)]
        if at_start and tensor.start.name in ("zeros", "ones"):
            value = torch.full(shape, float(tensor.start.name == "ones"), dtype=torch.float64)
        values[tensor.name] = value.requires_grad_(tensor.role == "train")
    return values


def weight_of(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    return weight * (torch.rand(OUT, IN, generator=generator) > 0.4)


def gradients(y: torch.Tensor, x: torch.Tensor, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    probe = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    leaves = [x, *(value for value in values.values() if value.requires_grad)]
    found = torch.autograd.grad((y * probe).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


PROPERTY = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("way", [("branch", ""), ("branch", FUSED), ("fold", ""), ("recompute", "")], ids="-".join)
@pytest.mark.parametrize("transposed", [False, True])
@PROPERTY
@given(formula=formulas(), rows=st.sampled_from([2, 7]), biased=st.booleans())
def test_lowerings_equal_the_evaluator(
    way: tuple[str, str], transposed: bool, formula: MethodFormula, rows: int, biased: bool
) -> None:
    strategy, operation = way
    weight, values = weight_of(3), values_of(formula, 3)
    x = torch.randn(rows, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    bias = torch.randn(OUT, dtype=torch.float64) if biased else None
    effective = evaluate(formula.expression, weight, values) + (weight if formula.form == "delta" else 0)
    expected = functional.linear(x, effective, bias)
    dtypes = {name: value.dtype for name, value in values.items()}
    adaptation = Adaptation(formula, strategy, rows, torch.float64, dtypes, operation=operation)
    stored = weight.T.contiguous() if transposed else weight
    found = adaptation(x, Base(stored, transposed, torch.float64), bias, values, False)
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * scale)
    for ours, theirs in zip(gradients(found, x, values), gradients(expected, x, values), strict=True):
        bound = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * bound)


@PROPERTY
@given(formula=formulas())
def test_the_rank_bound_and_the_factors_hold(formula: MethodFormula) -> None:
    weight, values = weight_of(4), values_of(formula, 4)
    value = evaluate(formula.expression, weight, values).detach()
    bound = whole_of(rank_bound(formula.expression))
    assert torch.linalg.matrix_rank(value, rtol=1e-9) <= bound
    if factors := factor(formula.expression):
        left, right = (evaluate(side, weight, values) for side in factors)
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(left @ right, value, rtol=1e-9, atol=1e-10 * scale)


@PROPERTY
@given(formula=formulas())
def test_identity_at_start_and_kept_zeros_hold(formula: MethodFormula) -> None:
    weight = weight_of(5)
    if identity_at_start(formula):
        value = evaluate(formula.expression, weight, values_of(formula, 5, at_start=True))
        torch.testing.assert_close(value, weight if formula.form == "weight" else torch.zeros_like(weight))
    if keeps_zeros(formula.expression):
        value = evaluate(formula.expression, weight, values_of(formula, 5))
        assert not value[weight == 0].any()


def test_the_facts_are_not_vacuous() -> None:
    """Each fact is found at least where it is plain to see."""
    a = Expression("tensor", (), (size(2), size(IN)), name="A")
    b = Expression("tensor", (), (size(OUT), size(2)), name="B")
    product = Expression("matmul", (b, a), (size(OUT), size(IN)))
    weight = Expression("weight", (), product.shape, name="W")
    zeros = TensorFormula("B", "train", b.shape, Start("zeros"))
    normal = TensorFormula("A", "train", a.shape, Start("normal", (Quantity.of(1),)))
    formula = MethodFormula("lora", (zeros, normal), "delta", product, (on_x(product),), (), "")
    assert identity_at_start(formula)
    assert rank_bound(product) == size(2) and factor(product) == (b, a)
    assert keeps_zeros(Expression("multiply", (call("mask", weight), product), product.shape))
    assert not keeps_zeros(product)
