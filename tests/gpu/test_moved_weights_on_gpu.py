"""All weights of an event in one launch on a CUDA device; run by `make gpu`."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels.moved_weights import add_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCALE = 0.7
SHAPES = [(304, 512), (129, 257), (7, 5), (1, 3000), (2048, 64)]  # whole tiles, rests in both directions, less than one


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


@pytest.mark.parametrize(("subtracts", "elsewhere", "transposed"), [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize("rank", [1, 6, 16, 64, 200])  # 200 is not the kernel's
@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_sums_are_those_of_the_definition(
    dtype: torch.dtype, factors: torch.dtype, stack: tuple[int, ...], rank: int, subtracts: bool, elsewhere: bool,
    transposed: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    sizes = [(*stack, *(reversed(shape) if transposed else shape)) for shape in SHAPES]
    targets, others = drawn(sizes, dtype), drawn(sizes, dtype)
    lefts, old_lefts = (drawn([(*stack, rows, rank) for rows, _ in SHAPES], factors) for _ in range(2))
    rights, old_rights = (drawn([(*stack, rank, columns) for _, columns in SHAPES], factors) for _ in range(2))
    sources = [tensor.clone() for tensor in targets]
    for repeat in range(3):
        for target, source in zip(targets, sources, strict=True):
            target.fill_(torch.nan) if elsewhere else target.copy_(source)
        add_products(
            targets, lefts, rights, SCALE,
            before=(old_lefts, old_rights) if subtracts else None, sources=sources if elsewhere else None,
            transposed=transposed,
        )  # fmt: skip
        for number, target in enumerate(targets):
            if repeat:
                assert torch.equal(target, others[number]), "a run repeats to the bit"
            others[number] = target.clone()
    for number, target in enumerate(targets):
        change = lefts[number].double() @ rights[number].double()
        if subtracts:
            change = change - old_lefts[number].double() @ old_rights[number].double()
        change = SCALE * (change.mT if transposed else change)
        wanted = sources[number].double() + change
        # one rounding of the result, and what tensor cores leave of float32 factors
        rounding = torch.finfo(dtype).eps * wanted.abs()
        products = (2e-5 if dtype == torch.float32 else 2e-3) * change.abs().max()
        assert ((target.double() - wanted).abs() <= rounding + products).all()


def test_the_table_follows_the_tensors() -> None:
    """Other tensors under the same names, in the memory of the first or not, are those that are moved."""
    for _ in range(3):
        target, left, right = torch.zeros(64, 64, device="cuda"), *drawn([(64, 16), (16, 64)], torch.float32)
        for times in (1, 2):
            add_products([target], [left], [right])
            torch.testing.assert_close(target, times * (left @ right), rtol=1e-4, atol=1e-4)
        right.data = torch.zeros(16, 64, device="cuda")
        before = target.clone()
        add_products([target], [left], [right])
        assert torch.equal(target, before)


def test_the_table_follows_how_weights_are_stored() -> None:
    target, (left, right) = torch.zeros(64, 64, device="cuda"), drawn([(64, 16), (16, 64)], torch.float32)
    for transposed, change in ((False, left @ right), (True, (left @ right).T)):
        target.zero_()
        add_products([target], [left], [right], transposed=transposed)
        torch.testing.assert_close(target, change, rtol=1e-4, atol=1e-4)


def test_a_weight_of_two_sites_is_moved_by_both() -> None:
    target = torch.zeros(256, 256, device="cuda")
    lefts, rights = drawn([(256, 16)] * 2, torch.float32), drawn([(16, 256)] * 2, torch.float32)
    add_products([target, target], lefts, rights)
    change = lefts[0] @ rights[0] + lefts[1] @ rights[1]
    torch.testing.assert_close(target, change, rtol=1e-4, atol=1e-4)
