"""The narrow passes of a low-rank linear on a CUDA device, against float64; run by `make gpu`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels.low_rank import narrow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# rows, width of the input, and rank and width of the output of each site
CASES = [
    (8192, 2048, [(16, 2048), (16, 512), (16, 512)]),  # whole blocks
    (1000, 1000, [(1, 1000)]),
    (200, 136, [(3, 96), (8, 40)]),  # ranks side by side that no wide load reaches
    (777, 2048, [(48, 640)]),
    (4097, 1024, [(64, 2056)]),
    (513, 768, [(128, 264)]),
    (130, 70, [(16, 70), (4, 33), (2, 5)]),
    (1, 64, [(8, 64)]),
]
REPEATS = 50
HALF_BITS = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""What rounding a sum to the dtype costs, relative; sums that stay in float32 are held to 1e-5."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def poison() -> None:
    """Makes what the allocator gives next full of NaN: a number that no kernel wrote then shows."""
    torch.full((1 << 26,), float("nan"), device="cuda")


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def passes(
    x: Tensor, dys: Sequence[Tensor], u: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """What is rounded to x's dtype, and what is not."""
    poison()
    product = narrow.narrow_product(x, rights, scales)
    poison()
    du, dlefts = narrow.narrow_gradients(dys, u, lefts, scales)
    poison()
    return [product, du], [*dlefts, *narrow.right_gradients(u, x, rights)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["whole", "strided"])
@pytest.mark.parametrize(("rows", "width", "sites"), CASES)
def test_the_passes_are_their_definitions_and_repeat(
    rows: int, width: int, sites: list[tuple[int, int]], strided: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    ranks = [rank for rank, _ in sites]
    if strided:  # a slice of wider rows at an odd address, columns before rows, every second column
        x = drawn(rows, width + 24, dtype=dtype)[:, 1 : 1 + width]
        dys = [drawn(out, rows, dtype=dtype).T for _, out in sites]
        u = drawn(rows, 2 * sum(ranks), dtype=dtype)[:, ::2]
        rights, lefts = [drawn(width, rank).T for rank in ranks], [drawn(rank, out).T for rank, out in sites]
    else:
        x, u = drawn(rows, width, dtype=dtype), drawn(rows, sum(ranks), dtype=dtype)
        dys = [drawn(rows, out, dtype=dtype) for _, out in sites]
        rights, lefts = [drawn(rank, width) for rank in ranks], [drawn(out, rank) for rank, out in sites]
    scales = [0.5 + site for site in range(len(sites))]
    parts = torch.split(u.double(), ranks, 1)
    near = [right.to(dtype).double() for right in rights], [left.to(dtype).double() for left in lefts]
    wants = [
        torch.cat([scale * (x.double() @ right.T) for scale, right in zip(scales, near[0], strict=True)], 1),
        torch.cat([s * (dy.double() @ left) for s, dy, left in zip(scales, dys, near[1], strict=True)], 1),
        *(dy.double().T @ part for dy, part in zip(dys, parts, strict=True)),
        *(part.T @ x.double() for part in parts),
    ]
    rounded, whole = passes(x, dys, u, lefts, rights, scales)
    for got, want in zip(rounded, wants, strict=False):
        assert got.dtype == dtype and distance(got, want) < HALF_BITS[dtype]
    for got, want in zip(whole, wants[2:], strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape and distance(got, want) < 1e-5
    for _ in range(REPEATS):
        again = passes(x, dys, u, lefts, rights, scales)
        assert all(
            torch.equal(one, other) for one, other in zip([*rounded, *whole], [*again[0], *again[1]], strict=True)
        )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
def test_factors_of_other_dtypes(stored: torch.dtype) -> None:
    """They are read as they are, and their gradients have their dtype."""
    x, dy, u = (drawn(512, size, dtype=torch.bfloat16) for size in (256, 384, 16))
    left, right = drawn(384, 16, dtype=stored), drawn(16, 256, dtype=stored)
    (product, du), (dleft, dright) = passes(x, [dy], u, [left], [right], [2.0])
    assert dleft.dtype == dright.dtype == stored
    assert distance(product, 2.0 * x.double() @ right.double().T) < 1e-2
    assert distance(du, 2.0 * dy.double() @ left.double()) < 1e-2
    assert distance(dleft, dy.double().T @ u.double()) < 6e-3
    assert distance(dright, u.double().T @ x.double()) < 6e-3
