"""Weights moved by narrow products, in plain torch, against the definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels.moved_weights import add_products

SHAPES = ((6, 9), (1, 5), (17, 4))
SCALE = 0.7


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(
    source: Tensor, left: Tensor, right: Tensor, old: tuple[Tensor, Tensor] | None, transposed: bool
) -> Tensor:
    """The definition, in float64."""
    change = left.double() @ right.double()
    if old is not None:
        change = change - old[0].double() @ old[1].double()
    return source.double() + SCALE * (change.transpose(-1, -2) if transposed else change)


@pytest.mark.parametrize(
    ("subtracts", "elsewhere", "transposed", "stack"), [*itertools.product([False, True], repeat=4)]
)
@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float64, torch.float32, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 2**-8),  # one rounding to eight digits
        (torch.bfloat16, torch.bfloat16, 2**-8),
        (torch.float16, torch.float32, 2**-11),
    ],
)
def test_sums_are_those_of_the_definition(
    dtype: torch.dtype, factors: torch.dtype, tolerance: float, subtracts: bool, elsewhere: bool, transposed: bool,
    stack: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    leading = (3,) if stack else ()
    sizes = [(*leading, *(reversed(shape) if transposed else shape)) for shape in SHAPES]
    targets, others = drawn(sizes, dtype), drawn(sizes, dtype)
    lefts, old_lefts = (drawn([(*leading, rows, 3) for rows, _ in SHAPES], factors) for _ in range(2))
    rights, old_rights = (drawn([(*leading, 3, columns) for _, columns in SHAPES], factors) for _ in range(2))
    before = (old_lefts, old_rights) if subtracts else None
    sources = others if elsewhere else None
    known = [tensor.clone() for tensor in sources or targets]
    if elsewhere:
        for target in targets:
            target.fill_(torch.nan)
    add_products(targets, lefts, rights, SCALE, before=before, sources=sources, transposed=transposed)
    for number, (target, source) in enumerate(zip(targets, known, strict=True)):
        old = (old_lefts[number], old_rights[number]) if subtracts else None
        wanted = expected(source, lefts[number], rights[number], old, transposed)
        torch.testing.assert_close(target.double(), wanted, rtol=tolerance, atol=tolerance)
        if elsewhere:
            assert torch.equal(others[number], source)


def test_a_small_change_of_large_factors_keeps_its_digits() -> None:
    """The two products agree in nearly all of their digits; their float32 difference would hold few of the change's."""
    torch.manual_seed(0)
    left, right = (tensor.float() * 100 for tensor in (torch.randn(8, 2), torch.randn(2, 8)))
    step = torch.full_like(left, 2**-12)
    target = torch.zeros(8, 8)
    add_products([target], [left + step], [right], before=([left], [right]))
    exact = ((left + step).double() - left.double()) @ right.double()
    torch.testing.assert_close(target.double(), exact, rtol=1e-5, atol=1e-7)
    products = (left + step) @ right - left @ right
    assert (products.double() - exact).abs().max() > 100 * (target.double() - exact).abs().max()


def test_half_precision_is_rounded_once() -> None:
    """From the same source, however often: the sum of many changes below half a unit is not lost."""
    source = torch.ones(2, 2, dtype=torch.bfloat16)
    target, left, right = source.clone(), torch.zeros(2, 1), torch.ones(1, 2)
    start = left.clone()
    added = source.clone()
    for _ in range(64):
        before = left.clone()
        left += 2**-12
        add_products([target], [left], [right], before=([start], [right]), sources=[source])
        add_products([added], [left], [right], before=([before], [right]))
    assert torch.equal(target, torch.full_like(target, 1 + 64 * 2**-12))
    assert torch.equal(added, source), "each of them alone is lost"


def test_nothing_to_move() -> None:
    add_products([], [], [])
