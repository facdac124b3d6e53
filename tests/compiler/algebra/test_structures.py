"""Structured matrices: values against loops written from the definitions, products and gradients against the values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.branch import Branch
from surgery.compiler.algebra.evaluate import Evaluator, evaluate
from surgery.compiler.algebra.expression import Expression, Range
from surgery.compiler.algebra.low_rank import factor
from surgery.compiler.algebra.quantity import Quantity, size
from surgery.compiler.algebra.rank import rank_bound
from surgery.compiler.algebra.structures import STRUCTURES, ShapeProblem
from surgery.compiler.algebra.structures.displacement import smooth_length

Array = NDArray[Any]
Loop = Callable[..., Array]


def of(value: float) -> Expression:
    return Expression("number", value=Quantity.of(value))


def tensor(name: str, *shape: int) -> Expression:
    return Expression("tensor", (), tuple(map(size, shape)), name=name)


def call(name: str, *arguments: Expression) -> Expression:
    return Expression(name, arguments, STRUCTURES[name].shape(*arguments))


def filled(rows: int, columns: int, entry: Callable[[int, int], float]) -> Array:
    return np.array([[entry(i, j) for j in range(columns)] for i in range(rows)], dtype=np.float64)


# --- the definitions, entry by entry ----------------------------------------------------------------------------------


def circ(v: Array) -> Array:
    return filled(len(v), len(v), lambda i, j: v[(i - j) % len(v)])


def skewcirc(v: Array) -> Array:
    return filled(len(v), len(v), lambda i, j: v[(i - j) % len(v)] * (-1 if j > i else 1))


def toeplitz(column: Array, row: Array) -> Array:
    return filled(len(column), len(row), lambda i, j: column[i - j] if i >= j else row[j - i])


def symtoeplitz(v: Array) -> Array:
    return filled(len(v), len(v), lambda i, j: v[abs(i - j)])


def kron(p: Array, q: Array) -> Array:
    (a, b), (c, d) = p.shape, q.shape
    return filled(a * c, b * d, lambda i, j: p[i // c, j // d] * q[i % c, j % d])


def khatri_rao(p: Array, q: Array) -> Array:
    d = len(q)
    return filled(len(p) * d, p.shape[1], lambda i, k: p[i // d, k] * q[i % d, k])


def blockdiag(t: Array) -> Array:
    g, m, n = t.shape
    return filled(g * m, g * n, lambda i, j: t[i // m, i % m, j % n] if i // m == j // n else 0)


def grid(t: Array) -> Array:
    p, q, m, n = t.shape
    return filled(p * m, q * n, lambda i, j: t[i // m, j // n, i % m, j % n])


def grid_left(t: Array) -> Array:
    p, q, m, r = t.shape
    return filled(p * m, p * q * r,
                  lambda i, j: t[i // m, j // r % q, i % m, j % r] if i // m == j // (q * r) else 0)  # fmt: skip


def grid_right(t: Array) -> Array:
    p, q, r, n = t.shape
    return filled(p * q * r, q * n,
                  lambda i, j: t[i // (q * r), j // n, i % r, j % n] if i // r % q == j // n else 0)  # fmt: skip


def grid_circ(w: Array) -> Array:
    return grid(np.array([[circ(v) for v in row] for row in w]))


def grid_circ_turned(w: Array) -> Array:
    return grid(np.array([[circ(v).T for v in row] for row in w]))


def tile(n: int, q: int) -> Array:
    return filled(n, q, lambda i, j: float(i % q == j))


def wrap(n: int, q: int) -> Array:
    padded = math.ceil(n / q) * q
    return filled(n, q, lambda c, j: float(sum(p % n == c and p % q == j for p in range(padded))))


def rotary(j: int, q: int) -> Array:
    """Column k is what the rotation makes of the k-th unit vector."""
    half = q // 2
    angle = np.array([j * 10000 ** (-2 * (k % half) / q) for k in range(q)])
    units = np.eye(q)
    turned = np.stack([np.concatenate([-x[half:], x[:half]]) for x in units])
    matrix: Array = (units * np.cos(angle) + turned * np.sin(angle)).T
    return matrix


def skew(v: Array) -> Array:
    side = (1 + math.isqrt(1 + 8 * len(v))) // 2
    matrix, place = np.zeros((side, side)), iter(v)
    for i in range(side):
        for j in range(i + 1, side):
            matrix[i, j] = next(place)
            matrix[j, i] = -matrix[i, j]
    return matrix


def cayley(s: Array) -> Array:
    matrix: Array = (np.eye(len(s)) + s) @ np.linalg.inv(np.eye(len(s)) - s)
    return matrix


def ifft2(s: Array) -> Array:
    m, n = s.shape
    return filled(m, n, lambda a, b: sum(
        s[k, h] * math.cos(2 * math.pi * (a * k / m + b * h / n)) for k in range(m) for h in range(n)) / (m * n)
    )  # fmt: skip


def select(index: Array, n: int) -> Array:
    return filled(len(index), n, lambda i, j: float(index[i] == j))


def scatter(v: Array, index: Array, m: int, n: int) -> Array:
    return filled(m, n, lambda i, j: sum(v[k] for k in range(len(v)) if index[k] == i * n + j))


def topk_mask(score: Array, share: float) -> Array:
    order = sorted(range(score.size), key=lambda place: (-score.flat[place], place))
    kept = set(order[: round(share * score.size)])
    rows, columns = score.shape
    return filled(rows, columns, lambda i, j: float(i * columns + j in kept))


# --- the cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One structure with sizes: shapes of its tensors, numbers behind them, and an index in the place of a tensor."""

    loop: Loop
    shapes: tuple[tuple[int, ...], ...] = ()
    numbers: tuple[float, ...] = ()
    index: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.loop.__name__

    def node(self) -> Expression:
        tensors = [tensor(f"T{k}", *shape) for k, shape in enumerate(self.shapes)]
        index = [tensor("index", len(self.index))] if self.index else []
        return call(self.name, *tensors, *index, *map(of, self.numbers))

    def values(self, *leading: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        draws = {
            f"T{k}": torch.randn(*leading, *shape, generator=generator, dtype=torch.float64).to(dtype)
            for k, shape in enumerate(self.shapes)
        }
        return draws | ({"index": torch.tensor(self.index)} if self.index else {})

    def expected(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.from_numpy(self.loop(*(value.numpy() for value in values.values()), *self.numbers))


CASES = [
    *(Case(loop, ((n,),)) for loop in (circ, skewcirc, symtoeplitz) for n in (1, 2, 5, 7, 12, 13)),
    *(Case(toeplitz, ((m,), (n,))) for m, n in [(1, 1), (1, 4), (5, 3), (3, 7), (6, 6)]),
    *(Case(kron, shapes) for shapes in [((2, 3), (4, 5)), ((5, 1), (1, 4)), ((1, 6), (3, 2)), ((3, 3), (2, 2))]),
    *(Case(khatri_rao, shapes) for shapes in [((2, 3), (5, 3)), ((1, 4), (3, 4))]),
    *(Case(blockdiag, (shape,)) for shape in [(3, 2, 4), (1, 2, 3), (4, 1, 1)]),
    *(Case(loop, (shape,)) for loop in (grid, grid_left, grid_right) for shape in [(2, 3, 4, 5), (1, 2, 3, 1)]),
    *(Case(loop, (shape,)) for loop in (grid_circ, grid_circ_turned) for shape in [(2, 3, 4), (1, 2, 5), (3, 1, 1)]),
    *(Case(loop, (), sizes) for loop in (tile, wrap)
      for sizes in [(12, 4), (13, 5), (5, 5), (3, 7), (2, 9), (9, 1), (1, 3)]),
    *(Case(rotary, (), (j, q)) for j, q in [(0, 4), (3, 6), (1, 2), (7, 10)]),
    *(Case(skew, ((length,),)) for length in (1, 3, 6, 15)),
    *(Case(cayley, ((n, n),)) for n in (1, 2, 5)),
    *(Case(ifft2, (shape,)) for shape in [(4, 6), (3, 5), (1, 2)]),
    *(Case(select, (), (n,), index) for n, index in [(5, (3, 0, 4)), (4, (2,)), (3, (2, 1, 0))]),
    *(Case(scatter, ((len(index),),), sizes, index) for sizes, index in [((3, 4), (11, 0, 5)), ((2, 2), (3, 3))]),
    *(Case(topk_mask, ((4, 5),), (share,)) for share in (0.0, 0.3, 1.0)),
]  # fmt: skip
WITH_PRODUCT = [case for case in CASES if STRUCTURES[case.name].has_product]


def named(case: Case) -> str:
    return f"{case.name}-{case.shapes}-{case.numbers}"


WEIGHT = torch.zeros(2, 2, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_value_is_that_of_the_definition(case: Case) -> None:
    values = case.values()
    node = case.node()
    found = evaluate(node, WEIGHT, values)
    assert found.dtype == torch.float64
    assert tuple(found.shape) == tuple(length.whole for length in node.shape)
    torch.testing.assert_close(found, case.expected(values), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.shapes and not case.index and "grid_circ" not in case.name], ids=named
)
def test_leading_axes_are_kept(case: Case) -> None:
    values = case.values(2, 3)
    leading = call(case.name, *(tensor(f"T{k}", 2, 3, *shape) for k, shape in enumerate(case.shapes)),
                   *map(of, case.numbers))  # fmt: skip
    found = evaluate(leading, WEIGHT, values)
    assert tuple(found.shape) == tuple(length.whole for length in leading.shape)
    # the same through a node that knows nothing of them, as one of stacked experts is
    torch.testing.assert_close(evaluate(case.node(), WEIGHT, values), found, rtol=0, atol=0)
    for i in range(2):
        for j in range(3):
            part = {name: value[i, j] for name, value in values.items()}
            torch.testing.assert_close(found[i, j], evaluate(case.node(), WEIGHT, part), rtol=1e-10, atol=1e-11)


def branch_of(values: dict[str, torch.Tensor], dtype: torch.dtype, rows: int = 4) -> Branch:
    evaluator = Evaluator(lambda: WEIGHT, values, torch.promote_types(dtype, torch.float32))
    return Branch(Base(WEIGHT, False, dtype), evaluator, dtype, rows)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", WITH_PRODUCT, ids=named)
def test_a_product_and_its_gradients_are_those_of_the_value(case: Case, transposed: bool) -> None:
    values = {
        name: value.requires_grad_() if value.is_floating_point() else value for name, value in case.values().items()
    }
    node = case.node()
    matrix = evaluate(node, WEIGHT, values)
    right = matrix.T if transposed else matrix
    x = torch.randn(2, 3, right.shape[0], dtype=torch.float64, requires_grad=True)
    branch = branch_of(values, torch.float64)
    arguments = [branch.cast(part) for part in node.arguments]
    found, expected = STRUCTURES[case.name].product(node, x, transposed, *arguments), x @ right
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(branch.product(x, node, transposed), expected, rtol=1e-10, atol=1e-11)
    probe = torch.randn(expected.shape, dtype=torch.float64)
    leaves = [x, *(value for value in values.values() if value.requires_grad)]
    ours, theirs = (torch.autograd.grad((y * probe).sum(), leaves, retain_graph=True) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", WITH_PRODUCT, ids=named)
def test_a_product_in_bfloat16_is_that_of_float32_rounded(case: Case) -> None:
    """Inputs rounded to bfloat16 and one rounding of the result, or of both matrices, each within 2 ** -8."""
    values = case.values(dtype=torch.float32)
    node = case.node()
    matrix = evaluate(node, WEIGHT, values)
    x = torch.randn(3, matrix.shape[1]).bfloat16()
    found = branch_of(values, torch.bfloat16).product(x, node)
    assert found.dtype == torch.bfloat16
    expected = x.double() @ matrix.T
    bound = 3 * 2**-8 * (x.double().abs() @ matrix.abs().T)
    assert bool(((found.double() - expected).abs() <= bound + 1e-6).all())


# --- what was built from them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inside", "out", "q"), [(48, 48, 12), (50, 70, 12), (70, 50, 12), (20, 60, 16), (5, 9, 7)])
def test_tile_and_wrap_are_the_sharing_of_mora(inside: int, out: int, q: int) -> None:
    x, matrix = torch.randn(3, inside, dtype=torch.float64), torch.randn(q, q, dtype=torch.float64)
    groups = math.ceil(inside / q)
    padded = torch.cat([x, x[..., : groups * q - inside]], -1)
    chunks = torch.nn.functional.linear(padded.reshape(-1, groups, q).sum(-2), matrix)
    expected = chunks.repeat(1, math.ceil(out / q))[..., :out]
    left, right = (evaluate(call(*pair), WEIGHT, {"like": x}) for pair in
                   (("tile", of(out), of(q)), ("wrap", of(inside), of(q))))  # fmt: skip
    torch.testing.assert_close(x @ (left @ matrix @ right.T).T, expected)


def test_skew_and_cayley_are_those_of_peft() -> None:
    layer: Any = pytest.importorskip("peft.tuners.oft.layer")
    rotation = layer.OFTRotationModule(3, 6, 4, 12, use_cayley_neumann=False)
    v = torch.randn(3, 6, dtype=torch.float64)
    theirs = rotation._cayley_batch(v, 4, use_cayley_neumann=False)
    node = call("cayley", call("skew", tensor("v", 3, 6)))
    # x @ R is weight = W @ R.T
    torch.testing.assert_close(evaluate(node, WEIGHT, {"v": v}).transpose(-1, -2), theirs, rtol=1e-6, atol=1e-7)


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def matmul(left: Expression, right: Expression) -> Expression:
    return Expression("matmul", (left, right), (*left.shape[:-1], right.shape[-1]))


def products() -> dict[str, Expression]:
    """Expressions of [40, 30] that a branch runs without a tensor of that size."""
    p, q, r, s = tensor("P", 40, 2), tensor("Q", 2, 30), tensor("R", 40, 3), tensor("S", 3, 30)
    first, second = matmul(p, q), matmul(r, s)
    scaled = Expression("multiply", (of(0.5), second), second.shape)
    blocks = call("circ", tensor("C", 4, 3, 10))
    turned = Expression("transpose", (blocks,), blocks.shape)
    return {
        "loha": Expression("multiply", (first, second), first.shape),
        "loha scaled, part stopped": Expression("multiply", (call("stop", first), scaled), first.shape),
        "sum": Expression("add", (first, second), first.shape),
        "blockdiag": call("blockdiag", matmul(tensor("BB", 5, 8, 1), tensor("BA", 5, 1, 6))),
        "grid": call("grid", matmul(tensor("GB", 2, 2, 20, 1), tensor("GA", 2, 2, 1, 15))),
        "kron": call("kron", tensor("KB", 10, 3), tensor("KA", 4, 10)),
        "stack": call("vstack", matmul(tensor("B1", 20, 2), q), call("hstack",
                      matmul(tensor("B2", 20, 1), tensor("A2", 1, 10)),
                      matmul(tensor("B3", 20, 3), tensor("A3", 3, 20)))),
        "piece": matmul(tensor("PM", 40, 3), Expression("slice", (call("wrap", of(50), of(30)),), (size(3), size(30)),
                        index=(Range(size(20), size(23)), Range(size(0), size(30))))),
        "circulant blocks": call("grid", blocks),
        "circulant blocks turned": call("grid", turned),
        "tile": matmul(matmul(call("tile", of(40), of(6)), tensor("M", 6, 6)),
                       Expression("transpose", (call("wrap", of(30), of(6)),), (size(6), size(30)))),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(products()))
def test_a_branch_forms_no_dense_matrix(name: str) -> None:
    node = products()[name]
    values = {part.name: torch.randn([length.whole or 0 for length in part.shape], dtype=torch.float64)
              for part in leaves(node)} or {"like": torch.zeros(1, dtype=torch.float64)}  # fmt: skip
    x = torch.randn(3, 30, dtype=torch.float64)
    with _Sizes() as sizes:
        found = branch_of(values, torch.float64, rows=3).product(x, node)
    assert sizes.largest < 40 * 30
    torch.testing.assert_close(found, x @ evaluate(node, WEIGHT, values).T)


def leaves(node: Expression) -> list[Expression]:
    if node.operation == "tensor":
        return [node]
    return [leaf for part in node.arguments for leaf in leaves(part)]


@pytest.mark.parametrize(("name", "rank"), [("loha", 6), ("blockdiag", 5), ("grid", 4), ("kron", 12), ("tile", 6)])
def test_rank_bounds_are_met_and_factors_are_exact(name: str, rank: int) -> None:
    node = products()[name]
    values = {part.name: torch.randn([length.whole or 0 for length in part.shape], dtype=torch.float64)
              for part in leaves(node)}  # fmt: skip
    value = evaluate(node, WEIGHT, values)
    assert rank_bound(node) == size(rank)
    assert int(torch.linalg.matrix_rank(value)) == rank
    factors = factor(node)
    assert factors is not None
    left, right = (evaluate(side, WEIGHT, values) for side in factors)
    assert left.shape[1] == rank
    torch.testing.assert_close(left @ right, value)


def test_a_full_kronecker_product_has_no_factors() -> None:
    assert factor(call("kron", tensor("P", 3, 3), tensor("Q", 4, 4))) is None


def test_lengths_of_transforms_are_smooth() -> None:
    assert [smooth_length(n) for n in (1, 11, 13, 121, 1023, 1535)] == [1, 12, 14, 125, 1024, 1536]


# --- sizes that do not belong together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("circ", (of(2),), "takes a vector"),
        ("toeplitz", (tensor("a", 2, 3), tensor("b", 3)), "same leading axes"),
        ("kron", (tensor("a", 3), tensor("b", 2, 2)), "two matrices"),
        ("khatri_rao", (tensor("a", 3, 2), tensor("b", 3, 4)), "2 columns meet 4"),
        ("blockdiag", (tensor("a", 3, 2),), "3 axes"),
        ("grid", (tensor("a", 3, 2, 2),), "4 axes"),
        ("rotary", (of(1), of(5)), "its size is even"),
        ("rotary", (of(0.5), of(4)), "whole number"),
        ("skew", (tensor("a", 5),), "= 5 entries"),
        ("skew", (tensor("a", 6), of(3)), "takes 3 entries"),
        ("cayley", (tensor("a", 3, 2),), "square"),
        ("select", (tensor("a", 4), of(3)), "4 different rows of 3"),
        ("scatter", (tensor("a", 3), tensor("b", 2), of(4), of(4)), "same length"),
        ("scatter", (tensor("a", 9), tensor("b", 9), of(2), of(4)), "9 entries in a matrix of 8"),
        ("topk_mask", (tensor("a", 3, 3), of(1.5)), "between 0 and 1"),
        ("mean", (tensor("a", 3, 3), of(2)), "no axis 2"),
        ("where", (tensor("a", 3, 3), tensor("b", 3), of(0)), "shape of its first"),
    ],
)
def test_sizes_that_do_not_fit_are_named(name: str, arguments: tuple[Expression, ...], message: str) -> None:
    with pytest.raises(ShapeProblem, match=message):
        STRUCTURES[name].shape(*arguments)


def test_the_size_of_skew_is_seen_in_symbols() -> None:
    half = Quantity.of(2)
    for side in (Quantity.symbol("block"), Quantity.symbol("in") / Quantity.symbol("groups")):
        length = side * (side - Quantity.of(1)) / half
        assert call("skew", Expression("tensor", (), (length,), name="v")).shape == (side, side)
    with pytest.raises(ShapeProblem, match="size = b"):
        call("skew", Expression("tensor", (), (Quantity.symbol("n"),), name="v"))


# --- functions --------------------------------------------------------------------------------------------------------

REDUCTIONS = {"mean": np.mean, "sum": np.sum, "min": np.min, "max": np.max, "norm": np.linalg.norm}


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("name", [*REDUCTIONS, "var", "fro"])
def test_reductions_along_an_axis(name: str, axis: int | None) -> None:
    matrix = torch.randn(4, 3, dtype=torch.float64)
    node = call(name, tensor("M", 4, 3), *([] if axis is None else [of(axis)]))
    found = evaluate(node, WEIGHT, {"M": matrix})
    assert tuple(found.shape) == tuple(length.whole for length in node.shape)
    function: Any = {**REDUCTIONS, "fro": np.linalg.norm}.get(name, lambda m, axis: np.var(m, axis=axis, ddof=1))
    np.testing.assert_allclose(found.numpy(), function(matrix.numpy(), axis=axis))


def test_softmax_along_an_axis_and_where() -> None:
    matrix = torch.tensor([[0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    found = evaluate(call("softmax", tensor("M", 2, 2), of(0)), WEIGHT, {"M": matrix})
    torch.testing.assert_close(found, torch.softmax(matrix, 0))
    chosen = evaluate(call("where", tensor("M", 2, 2), tensor("M", 2, 2), of(-1)), WEIGHT, {"M": matrix})
    assert chosen.tolist() == [[-1.0, 2.0], [1.0, -1.0]]
    with pytest.raises(ShapeProblem, match="every row"):
        rows = Expression("x", (), (Quantity.symbol("tokens"), size(3)), name="x")
        call("softmax", rows, of(0))
