"""Bounds on the rank at symbolic sizes: those that are certainly no better are left out, the rest is a minimum."""

import pytest

from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.rank import rank_bound

SIZES = {name: Quantity.symbol(name) for name in ("in", "out", "rank", "outer", "groups", "heads")} | {
    "1": Quantity.of(1),
    "2 * rank": Quantity.of(2) * Quantity.symbol("rank"),
    "rank * groups": Quantity.symbol("rank") * Quantity.symbol("groups"),
    "rank + outer": Quantity.symbol("rank") + Quantity.symbol("outer"),
}


def chain(*names: str) -> Expression:
    """The product of matrices whose sizes are these."""
    sizes = [SIZES[name] for name in ("out", *names, "in")]
    found, *rest = (Expression("tensor", (), pair, name="A") for pair in zip(sizes, sizes[1:], strict=False))
    for matrix in rest:
        found = Expression("matmul", (found, matrix), (found.shape[0], matrix.shape[1]))
    return found


@pytest.mark.parametrize(("names", "bound"), [
    (("rank", "outer"), "min(rank, outer)"),
    (("outer", "rank", "outer"), "min(outer, rank)"),
    (("rank", "2 * rank", "rank * groups", "rank + outer"), "rank"),
    (("rank + outer", "rank"), "rank"),
    (("rank", "in", "heads"), "rank"),
    (("heads",), "heads"),
    (("rank", "1"), "1"),
    ((), "min(out, in)"),
])  # fmt: skip
def test_the_bound_of_a_product(names: tuple[str, ...], bound: str) -> None:
    assert str(rank_bound(chain(*names))) == bound


def test_the_bound_of_a_sum() -> None:
    product = chain("rank", "outer")
    assert str(rank_bound(Expression("add", (product, chain("rank")), product.shape))) == "min(rank, outer) + rank"
