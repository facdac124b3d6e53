"""What runs in one pass over W is found by algebra, and is what the equation says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.evaluate import Evaluator, evaluate
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import MethodFormula, Start, TensorFormula, Term, rows
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.norms import with_norms_by_parts
from surgery.compiler.algebra.quantity import Quantity, size
from surgery.compiler.algebra.structures import STRUCTURES
from surgery.compiler.algebra.updated import built, updated

OUT, IN, RANK, ROWS = 14, 11, 3, 7


def tensor(name: str, *shape: int) -> Expression:
    return Expression("tensor", (), tuple(map(size, shape)), name=name)


def call(name: str, *arguments: Expression) -> Expression:
    return Expression(name, arguments, STRUCTURES[name].shape(*arguments))


def joined(operation: str, left: Expression, right: Expression) -> Expression:
    return Expression(operation, (left, right), max(left.shape, right.shape, key=len))


def number(value: float) -> Expression:
    return Expression("number", value=Quantity.of(value))


def transpose(node: Expression) -> Expression:
    return Expression("transpose", (node,), node.shape[::-1])


def negative(node: Expression) -> Expression:
    return Expression("negate", (node,), node.shape)


W = Expression("weight", (), (size(OUT), size(IN)), name="W")
A, B = tensor("A", OUT, RANK), tensor("B", RANK, IN)
C, D, DENSE = tensor("C", OUT, 2), tensor("D", 2, IN), tensor("dense", OUT, IN)
PRODUCT = Expression("matmul", (A, B), W.shape)
TURNED = Expression("matmul", (transpose(B), transpose(A)), W.shape[::-1])
OTHER = Expression("matmul", (C, D), W.shape)
MASKED = joined("multiply", call("mask", W), joined("multiply", number(2), PRODUCT))
FOUND = {
    "plain": (joined("add", W, joined("multiply", number(0.5), PRODUCT)), "one"),
    "subtracted": (joined("subtract", W, PRODUCT), "one"),
    "change in front": (joined("add", joined("divide", PRODUCT, number(4)), W), "one"),
    "transposed product": (joined("add", W, transpose(TURNED)), "one"),
    "two products": (joined("subtract", joined("add", W, PRODUCT), OTHER), "one"),
    "under the mask": (joined("add", W, MASKED), "mask"),
    "mask behind": (joined("subtract", W, joined("multiply", PRODUCT, call("mask", W))), "mask"),
    "both masked": (joined("add", joined("add", W, MASKED), joined("multiply", call("mask", W), OTHER)), "mask"),
    "scaled mask": (joined("add", W, joined("multiply", number(-3), negative(MASKED))), "mask"),
    "times W": (joined("add", W, joined("multiply", W, PRODUCT)), "weight"),
    "a computed factor": (joined("add", W, Expression("matmul", (call("tanh", A), B), W.shape)), "one"),
}  # fmt: skip
OTHERS = {
    "no W": PRODUCT,
    "W twice": joined("add", W, joined("add", W, PRODUCT)),
    "a scaled W": joined("add", joined("multiply", number(2), W), PRODUCT),
    "a dense change": joined("add", W, DENSE),
    "a dense change beside": joined("add", W, joined("add", PRODUCT, DENSE)),
    "mixed": joined("add", joined("add", W, MASKED), PRODUCT),
    "another mask": joined("add", W, joined("multiply", call("mask", DENSE), PRODUCT)),
    "a gradient of its own": joined("add", W, call("surrogate", MASKED, PRODUCT)),
}


def values(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (OUT, RANK), "B": (RANK, IN), "C": (OUT, 2), "D": (2, IN), "dense": (OUT, IN), "m": (OUT,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def sparse() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight, kept = (torch.randn(OUT, IN, generator=generator, dtype=torch.float64) for _ in range(2))
    return weight * (kept > 0)


@pytest.mark.parametrize("name", FOUND)
def test_a_weight_of_the_form_is_found_and_built(name: str) -> None:
    expression, times = FOUND[name]
    found = updated(expression)
    assert found is not None and found.times == times
    weight, tensors = sparse(), values()
    expected = evaluate(expression, weight, tensors)
    torch.testing.assert_close(built(found, Evaluator(lambda: weight, tensors, torch.float64)), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_weight_is_not(name: str) -> None:
    assert updated(OTHERS[name]) is None


def norm_of(matrix: Expression) -> Expression:
    return call("row_norm", matrix)


def magnitude(matrix: Expression, stopped: bool) -> MethodFormula:
    """`diag(m / row_norm(V)) @ V`."""
    norm = norm_of(matrix)
    if stopped:
        norm = call("stop", norm)
    scales = call("diag", joined("divide", tensor("m", OUT), norm))
    expression = Expression("matmul", (scales, matrix), W.shape)
    entries = tuple(
        TensorFormula(name, "train", node.shape, Start("normal", (Quantity.of(1),)))
        for name, node in {"A": A, "B": B, "C": C, "D": D, "m": tensor("m", OUT)}.items()
    )
    return MethodFormula("case", entries, "weight", expression, (Term(expression, rows("x", size(IN))),), (), "")


@pytest.mark.parametrize("name", [name for name, (_, times) in FOUND.items() if times == "one"])
@pytest.mark.parametrize("turned", [False, True])
def test_norms_are_taken_from_the_parts(name: str, turned: bool) -> None:
    matrix = transpose(FOUND[name][0]) if turned else FOUND[name][0]
    formula = magnitude(FOUND[name][0], False)
    norm = norm_of(matrix)
    found = with_norms_by_parts(MethodFormula("case", formula.tensors, "delta", norm, formula.terms, (), "")).expression
    assert found.operation == "updated_row_norm" and found.shape == norm.shape
    weight, tensors = sparse(), values()
    torch.testing.assert_close(
        evaluate(found, weight, tensors), evaluate(norm, weight, tensors), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("matrix", [OTHERS["a dense change"], FOUND["under the mask"][0], PRODUCT])
def test_other_norms_stay_what_they_are(matrix: Expression) -> None:
    formula = magnitude(matrix, False)
    assert with_norms_by_parts(formula).expression is formula.expression


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether an operation gives a matrix of W's size."""

    found = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = operation(*args, **(kwargs or {}))
        new = isinstance(result, Tensor) and "view" not in str(operation) and result.ndim == 2
        self.found |= new and set(result.shape) == {OUT, IN} and str(operation) not in ("aten.t.default",)
        return result


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("name", ["plain", "two products"])
def test_the_branch_forms_no_matrix_and_has_the_gradients_of_the_equation(name: str, stopped: bool) -> None:
    formula = magnitude(FOUND[name][0], stopped)
    weight, ours, theirs = sparse() + 0.1, values(), values()
    for group in (ours, theirs):
        for value in group.values():
            value.requires_grad_()
    x = torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    adaptation = Adaptation(formula, "branch", ROWS, torch.float64, dict.fromkeys(ours, torch.float64))
    with Sizes() as sizes:  # type: ignore[no-untyped-call]
        y = adaptation(x, Base(weight, False, torch.float64), None, ours, True)
    assert not sizes.found
    expected = functional.linear(x, evaluate(formula.expression, weight, theirs))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn(ROWS, OUT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.autograd.backward(y, dy)
    torch.autograd.backward(expected, dy)
    for key in ("A", "B", "m"):
        torch.testing.assert_close(ours[key].grad, theirs[key].grad, rtol=1e-9, atol=1e-10)
