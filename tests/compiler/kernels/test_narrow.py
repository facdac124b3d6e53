"""The narrow passes of a low-rank linear: the plain forms, and how the kernels cut the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels.low_rank import narrow, plain

RANKS = [(1,), (3, 8), (16, 16, 16), (48,), (128,)]
SHARED_MEMORY = 227 * 1024
"""Bytes that one program may have on Hopper."""
PROCESSORS = 132


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def expected(
    x: Tensor, dys: Sequence[Tensor], u: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor], scales: list[float]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """u, du, and the gradients to lefts and to rights (with u in the place of du), in float64 by their definitions."""
    parts = torch.split(u.double(), [right.shape[0] for right in rights], 1)
    triples = [*zip(scales, dys, lefts, strict=True)]
    return (
        torch.cat([s * (x.double() @ right.double().T) for s, right in zip(scales, rights, strict=True)], 1),
        torch.cat([s * (dy.double() @ left.double()) for s, dy, left in triples], 1),
        [dy.double().T @ part for dy, part in zip(dys, parts, strict=True)],
        [part.T @ x.double() for part in parts],
    )


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (37, 65), (64, 128)])
def test_the_plain_forms_are_their_definitions(ranks: tuple[int, ...], rows: int, width: int) -> None:
    torch.manual_seed(sum(ranks) + rows)
    x, u = drawn(width, rows).T, drawn(rows, sum(ranks))
    rights, lefts = [drawn(r, width) for r in ranks], [drawn(width + i, r) for i, r in enumerate(ranks)]
    dys, scales = [drawn(rows, 2 * left.shape[0])[:, ::2] for left in lefts], [0.5 + i for i in range(len(ranks))]
    want_u, want_du, want_lefts, want_rights = expected(x, dys, u, lefts, rights, scales)
    du, dlefts = plain.narrow_gradients(dys, u, lefts, scales)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(plain.narrow_product(x, rights, scales), want_u, **close)
    torch.testing.assert_close(du, want_du, **close)
    torch.testing.assert_close(dlefts, want_lefts, **close)
    torch.testing.assert_close(plain.right_gradients(u, x, rights), want_rights, **close)


@pytest.mark.parametrize("rank", [1, 4, 16, 32, 48, 64, 128])
@pytest.mark.parametrize("width", [64, 512, 2048, 8192, 14336, 131072])
@pytest.mark.parametrize("rows", [1, 60, 1024, 8192, 32768])
def test_the_blocks_fit_into_shared_memory_and_leave_few_multiprocessors_idle(rows: int, width: int, rank: int) -> None:
    padded = narrow.padded(rank)
    for size in (2, 4, 8):
        blocks = narrow.product_blocks(rows, width, rank, size, PROCESSORS)
        stage = 2 * blocks.rows * blocks.columns + size * padded * blocks.columns
        assert blocks.stages >= 2 and blocks.stages * stage + 2 * padded * blocks.columns <= SHARED_MEMORY
        assert blocks.parts == 1 or blocks.parts * -(-rows // 64) <= PROCESSORS
    both, alone = (
        narrow.gradient_blocks(rows, (width,), (rank,), PROCESSORS),
        narrow.right_blocks(rows, width, rank, PROCESSORS),
    )
    for blocks, at_a_time in ((both, PROCESSORS), (alone, 2 * PROCESSORS)):
        stage = 2 * blocks.rows * (blocks.columns + padded)
        assert blocks.stages * stage + 2 * padded * blocks.columns <= SHARED_MEMORY
        across, down = -(-width // blocks.columns), -(-rows // blocks.rows)
        steps = -(-across * blocks.parts // at_a_time) * -(-down // blocks.parts)  # of 64 rows, one after the other
        assert across * down < 4 * at_a_time or across * down / at_a_time > 0.75 * steps
