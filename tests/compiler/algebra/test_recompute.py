"""The weight that is rebuilt equals its definition; nothing of its size is kept, and no gradient of it is formed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.cost import Kept
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import MethodFormula, Start, TensorFormula, Term, rows
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.quantity import Quantity, size
from surgery.compiler.algebra.recompute import gradient_factors
from surgery.compiler.algebra.recorder import Recorder
from surgery.compiler.algebra.structures import STRUCTURES
from surgery.compiler.kernels.recompute import rebuilt_linear, rebuilt_linear_reference

OUT, IN, RANK, ROWS = 12, 10, 3, 7


def random(*shape: int, seed: int = 0, trained: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)


def sparse(seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    weight = random(OUT, IN, seed=seed, trained=False)
    return (weight * (random(OUT, IN, seed=seed + 1, trained=False) > 0)).to(dtype)


def masked(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """LoRS's weight, scale 2."""
    return W + (W != 0) * (2.0 * A @ B)


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every tensor that an operation gives, with the operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        self.results += [(name, leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(ROWS,), (2, ROWS), (2, 3, ROWS)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_the_kernel_equals_its_definition(leading: tuple[int, ...], biased: bool, factored: bool) -> None:
    found: list[Any] = []
    expected: list[Any] = []
    for run, results in ((rebuilt_linear, found), (rebuilt_linear_reference, expected)):
        x, W = random(*leading, IN), sparse()
        A, B = random(OUT, RANK, seed=1), random(RANK, IN, seed=2)
        bias = random(OUT, seed=3) if biased else None
        y = run(masked, x, bias, *((A, B) if factored else (None, None)), W, A, B)
        torch.autograd.backward(y, random(*leading, OUT, seed=4, trained=False))
        results += [y, x.grad, A.grad, B.grad, None if bias is None else bias.grad]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (found[2] is not None) == factored


def test_what_needs_no_gradient_is_not_computed() -> None:
    x, W = random(ROWS, IN, trained=False), sparse()
    A, B = random(OUT, RANK, seed=1), random(RANK, IN, seed=2, trained=False)
    built: list[int] = []

    def build(*operands: Tensor) -> Tensor:
        built.append(1)
        return masked(*operands)

    torch.autograd.backward(rebuilt_linear(build, x, None, A, B, W, A, B).sum())
    assert len(built) == 1, "the weight is only needed for the gradient of x"
    assert A.grad is not None and x.grad is None and B.grad is None


def test_a_second_backward_of_the_gradient_is_refused() -> None:
    x, W, A, B = random(ROWS, IN), sparse(), random(OUT, RANK, seed=1), random(RANK, IN, seed=2)
    y = rebuilt_linear(masked, x, None, A, B, W, A, B)
    (first,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(first.sum())


def test_a_weight_that_moves_between_forward_and_backward_is_noticed() -> None:
    x, W, A, B = random(ROWS, IN), sparse(), random(OUT, RANK, seed=1), random(RANK, IN, seed=2)
    y = rebuilt_linear(masked, x, None, A, B, W, A, B)
    W.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.backward(y.sum())


def test_the_kernel_compiles_without_a_graph_break() -> None:
    x, W, A, B = random(ROWS, IN), sparse(), random(OUT, RANK, seed=1), random(RANK, IN, seed=2)

    def run(x: Tensor) -> Tensor:
        return rebuilt_linear(masked, torch.tanh(x), None, A, B, W, A, B).square().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(run(x), (x, A, B))
    for ours, theirs in zip(torch.autograd.grad(compiled(x), (x, A, B)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_rounds_products_and_not_the_weight() -> None:
    """Under autocast the weight keeps its own algebra in both directions; the products run in bfloat16."""
    W, A, B = sparse(dtype=torch.float32), random(OUT, RANK, seed=1, dtype=torch.float32), random(RANK, IN, seed=2)
    B = B.detach().float().requires_grad_()
    x = random(ROWS, IN, dtype=torch.float32)
    built: list[Tensor] = []

    def build(*operands: Tensor) -> Tensor:
        built.append(masked(*operands))
        return built[-1]

    with torch.autocast("cpu", torch.bfloat16):
        y = rebuilt_linear(build, x, None, A, B, W, A, B)
    dy = random(ROWS, OUT, seed=5, trained=False).to(torch.bfloat16)
    torch.autograd.backward(y, dy)
    assert y.dtype == torch.bfloat16 and len(built) == 2
    for weight in built:
        torch.testing.assert_close(weight, masked(W, A, B).detach(), rtol=0, atol=0)
    expected = dy.float() @ masked(W, A, B).detach()
    assert x.grad is not None and A.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    wanted = dy.float().T @ (x.detach() @ B.detach().T)
    torch.testing.assert_close(A.grad, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


# --- which gradients go through factors -------------------------------------------------------------------------------


def tensor(name: str, *shape: int) -> Expression:
    return Expression("tensor", (), tuple(map(size, shape)), name=name)


def call(name: str, *arguments: Expression) -> Expression:
    return Expression(name, arguments, STRUCTURES[name].shape(*arguments))


def joined(operation: str, left: Expression, right: Expression) -> Expression:
    return Expression(operation, (left, right), left.shape if left.shape else right.shape)


def number(value: float) -> Expression:
    return Expression("number", value=Quantity.of(value))


LEFT, RIGHT, WIDE = tensor("A", OUT, RANK), tensor("B", RANK, IN), tensor("D", OUT, IN)
WEIGHT = Expression("weight", (), (size(OUT), size(IN)), name="W")
PRODUCT = Expression("matmul", (LEFT, RIGHT), WEIGHT.shape)
UNDER_MASK = joined("multiply", call("mask", WEIGHT), joined("multiply", number(2), PRODUCT))
LORS = call("surrogate", UNDER_MASK, PRODUCT)
INSIDE_W = Expression(
    "matmul", (Expression("matmul", (WEIGHT, tensor("T", IN, RANK)), LEFT.shape), RIGHT), WEIGHT.shape
)
CASES = {
    "surrogate": (LORS, True),
    "scaled": (joined("multiply", number(-0.5), LORS), True),
    "one term of a sum": (joined("add", LORS, joined("subtract", call("stop", UNDER_MASK), LORS)), True),
    "plain product": (PRODUCT, True),
    "beside frozen terms": (joined("add", WEIGHT, joined("subtract", tensor("frozen", OUT, IN), LORS)), True),
    "surrogate of a surrogate": (call("surrogate", WEIGHT, LORS), True),
    "under a frozen factor": (joined("multiply", tensor("frozen", OUT, IN), LORS), False),
    "under the mask": (UNDER_MASK, False),
    "a dense term": (joined("add", LORS, WIDE), False),
    "factors that hold W": (INSIDE_W, False),
    "tanh of it": (call("tanh", LORS), False),
}


def formula_of(expression: Expression, form: str = "delta") -> MethodFormula:
    shapes = {"A": LEFT, "B": RIGHT, "D": WIDE, "T": tensor("T", IN, RANK), "frozen": WIDE}
    tensors = tuple(
        TensorFormula(name, "frozen" if name == "frozen" else "train", node.shape, Start("normal", (Quantity.of(1),)))
        for name, node in shapes.items()
    )
    return MethodFormula("case", tensors, form, expression, (Term(expression, rows("x", size(IN))),), (), "")


@pytest.mark.parametrize("name", CASES)
def test_factors_are_found_where_the_gradient_is_a_narrow_product(name: str) -> None:
    expression, factored = CASES[name]
    factors = gradient_factors(formula_of(expression))
    assert (factors is not None) == factored
    if factors:
        assert factors[0].shape[-1].whole <= 2 * RANK  # type: ignore[operator]


def test_tensors_of_earlier_blocks_have_their_gradient() -> None:
    earlier = Expression("matmul", (tensor("A_earlier_1", OUT, RANK), tensor("B_earlier_1", RANK, IN)), WEIGHT.shape)
    factors = gradient_factors(formula_of(joined("add", LORS, earlier)))
    assert factors and factors[0].shape[-1].whole == 2 * RANK
    assert gradient_factors(formula_of(joined("add", LORS, tensor("frozen_earlier_1", OUT, IN)))) == (LEFT, RIGHT)
    inside = Expression("matmul", (tensor("W_earlier_1", OUT, IN), tensor("T_earlier_1", IN, RANK)), LEFT.shape)
    assert gradient_factors(formula_of(Expression("matmul", (inside, RIGHT), WEIGHT.shape))) is None


def test_nothing_trained_has_no_factors() -> None:
    assert gradient_factors(formula_of(call("stop", LORS))) == ()
    assert gradient_factors(formula_of(joined("add", WEIGHT, call("mask", PRODUCT)), "weight")) == ()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", ["branch", "fold", "recompute"])
@pytest.mark.parametrize("form", ["delta", "weight"])
def test_every_strategy_has_the_stated_gradient(name: str, strategy: str, form: str) -> None:
    """Against the surrogate written as a function of its own, whose backward is that of its second argument."""
    formula = formula_of(CASES[name][0], form)

    def values() -> dict[str, Tensor]:
        made = {}
        for number, entry in enumerate(formula.tensors):
            shape = [int(length.whole or 0) for length in entry.shape]
            made[entry.name] = 0.3 * random(*shape, seed=number, trained=False)
            made[entry.name].requires_grad_(entry.role == "train")
        return made

    class Stated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, gradient: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
            return None, dy

    W = sparse()

    def reference(node: Expression, tensors: dict[str, Tensor]) -> Any:
        parts = [reference(part, tensors) for part in node.arguments]
        match node.operation:
            case "weight":
                return W
            case "tensor":
                return tensors[node.name]
            case "number":
                return float(node.value.constant)  # type: ignore[union-attr, arg-type]
            case "surrogate":
                return Stated.apply(*parts)  # type: ignore[no-untyped-call]
            case "mask":
                return (parts[0] != 0).to(W.dtype).detach()
            case "stop":
                return parts[0].detach()
            case "tanh":
                return parts[0].tanh()
            case "matmul":
                return parts[0] @ parts[1]
            case "multiply":
                return parts[0] * parts[1]
            case "add":
                return parts[0] + parts[1]
            case "subtract":
                return parts[0] - parts[1]
        raise AssertionError(node.operation)

    ours, theirs = values(), values()
    x, other = random(ROWS, IN, seed=20), random(ROWS, IN, seed=20)
    adaptation = Adaptation(formula, strategy, ROWS, torch.float64, dict.fromkeys(ours, torch.float64))
    y = adaptation(x, Base(W, False, torch.float64), None, ours, True)
    effective = reference(formula.expression, theirs) + (W if form == "delta" else 0)
    expected = functional.linear(other, effective)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = random(ROWS, OUT, seed=21, trained=False)
    torch.autograd.backward(y, dy)
    torch.autograd.backward(expected, dy)
    assert x.grad is not None and other.grad is not None
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-10, atol=1e-10)
    for key, value in theirs.items():
        zero = torch.zeros_like(value)
        found, wanted = ours[key].grad, value.grad
        torch.testing.assert_close(zero if found is None else found, zero if wanted is None else wanted,
                                   rtol=1e-9, atol=1e-10)  # fmt: skip


# --- what is kept and formed ------------------------------------------------------------------------------------------


def site(strategy: str, expression: Expression, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Tensor, Any]:
    formula = formula_of(expression)
    tensors = {entry.name: random(*(int(length.whole or 0) for length in entry.shape), seed=number)
               for number, entry in enumerate(formula.tensors) if entry.name in "AB"}  # fmt: skip
    adaptation = Adaptation(formula, strategy, ROWS, dtype, dict.fromkeys(tensors, torch.float64))
    W, x = sparse(dtype=dtype), random(ROWS, IN, seed=20, dtype=dtype)
    return lambda: adaptation(x, Base(W, False, dtype), None, tensors, True), W, x, tensors


@pytest.mark.parametrize(("strategy", "expression", "clean"), [
    ("recompute", LORS, True), ("recompute", UNDER_MASK, True), ("fold", LORS, False), ("branch", LORS, False),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nothing_of_the_weights_size_is_kept(
    strategy: str, expression: Expression, clean: bool, dtype: torch.dtype
) -> None:
    run, W, _, tensors = site(strategy, expression, dtype)
    kept = Kept([W, *tensors.values()])
    with kept:
        y = run()
    assert clean == all(value.numel() < OUT * IN for value in kept.tensors)
    torch.autograd.backward(y.sum())
    assert tensors["A"].grad is not None


def test_no_gradient_of_the_weights_size_is_formed() -> None:
    """In the backward the only tensors of that size are W, its weight, and what builds it: no product over the rows."""
    run, W, x, tensors = site("recompute", LORS)
    y = run()
    with Shapes() as backward:
        torch.autograd.backward(y, random(ROWS, OUT, seed=21, trained=False))
    weight = masked(W, tensors["A"], tensors["B"]).detach()
    dense = [(name, value) for name, value in backward.results if set(value.shape) == {OUT, IN}]
    assert any(torch.equal(value, weight) for _, value in dense), "the weight is built again"
    assert not [name for name, _ in dense if name in ("mm", "addmm", "bmm")], "not even the product of the factors"
    gradient = random(ROWS, OUT, seed=21, trained=False).T @ x.detach()
    masked_gradient = gradient * (W != 0)
    for _, value in dense:
        same = value if value.shape == gradient.shape else value.T
        assert not torch.allclose(same, gradient) and not torch.allclose(same, masked_gradient)


def test_the_released_gradient_is_the_stated_one() -> None:
    """dA = dy.T (x B.T) and dB = (dy A).T x: neither the mask nor the scale."""
    run, W, x, tensors = site("recompute", LORS)
    dy = random(ROWS, OUT, seed=21, trained=False)
    y = run()
    torch.autograd.backward(y, dy)
    A, B = tensors["A"], tensors["B"]
    torch.testing.assert_close(y, x @ masked(W, A, B).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A.grad, dy.T @ (x @ B.T), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B.grad, (dy @ A).T @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, dy @ masked(W, A, B), rtol=1e-10, atol=1e-10)


def test_a_method_may_call_its_tensor_bias() -> None:
    product = Expression("matmul", (tensor("bias", OUT, RANK), RIGHT), WEIGHT.shape)
    expression = joined("multiply", call("mask", WEIGHT), product)
    entries = tuple(TensorFormula(name, "train", node.shape, Start("normal", (Quantity.of(1),)))
                    for name, node in (("bias", LEFT), ("B", RIGHT)))  # fmt: skip
    formula = replace(formula_of(expression), tensors=entries)
    tensors = {"bias": random(OUT, RANK), "B": random(RANK, IN, seed=1)}
    own, x, W = random(OUT, seed=2), random(ROWS, IN, seed=3), sparse()
    adaptation = Adaptation(formula, "recompute", ROWS, torch.float64, dict.fromkeys(tensors, torch.float64))
    y = adaptation(x, Base(W, False, torch.float64), own, tensors, True)
    expected = functional.linear(x, W + (W != 0) * (tensors["bias"] @ tensors["B"]), own)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("names", ["Aa", "aA", "Ww", "bB"])
def test_tensors_that_differ_by_case_alone_stay_apart(names: str) -> None:
    first, second = tuple(names)
    recorder = Recorder()
    one: Any = recorder[first]
    other: Any = recorder[second]
    graph = recorder.finish(one - 2 * other)
    function = fx.GraphModule(torch.nn.Module(), graph)
    assert list(recorder.inputs) == [first, second]
    assert float(function(torch.tensor(5.0), torch.tensor(1.0))) == 3
