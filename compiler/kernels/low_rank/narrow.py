"""The narrow sides of a low-rank linear in Triton: each reads its wide matrix `[rows, width]` once.

`rows @ right.T` for all sites that read it; `dy @ left` and `dy.T @ u` together from one read of dy; `du.T @ rows`.
All are bound by that one read. Sums over rows or over blocks of columns are first written by their parts, in float32
and a fraction of what is read, and then added in a fixed order: the same inputs give the same bits.

Matrices are float16 or bfloat16, factors of any floating dtype. `plain` has the same functions for all other cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache, reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDEST = 128  # columns on the narrow side; beyond, the products are bound by arithmetic and cuBLAS is right
AT_ONCE = 8  # parts of a sum that are loaded together


class Blocks(NamedTuple):
    """How a pass is cut: rows and columns of a block, in how many parts a sum is, depth of the pipeline, warps."""

    rows: int
    columns: int
    parts: int
    stages: int
    warps: int


class _Walk(NamedTuple):
    """How wide matrices are cut: the blocks of columns of each from `starts` on, `steps` blocks of rows a program."""

    blocks: Blocks
    rank: int
    starts: tuple[int, ...]
    steps: int
    begins: tuple[int, ...]


def narrow_product(
    rows: Tensor, rights: Sequence[Tensor], scales: Sequence[float], blocks: Blocks | None = None
) -> Tensor:
    """`scale * rows @ right.T` of every site beside each other, `[rows, sum of ranks]`, for rows `[rows, in]`."""
    rows, rights, (count, width) = _by_row(rows), _alike(rights), rows.shape
    ends = (*accumulate(right.shape[0] for right in rights),)
    blocks = blocks or product_blocks(count, width, ends[-1], rights[0].element_size())
    rank, split, early = padded(ends[-1]), blocks.parts > 1, _starts_early(rows.device)
    u = rows.new_empty(count, ends[-1])
    parts = rows.new_empty(blocks.parts, count, rank, dtype=torch.float32) if split else u
    kernels = _kernels()
    kernels.product[ceil_div(count, blocks.rows), blocks.parts](
        rows, (*rights,), (*scales,), u, parts, count, width, rows.stride(0),
        ceil_div(ceil_div(width, blocks.columns), blocks.parts), ends, len(ends), rank, blocks.rows, blocks.columns,
        split, early, num_stages=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    if split:
        lines = _lines(rank)
        row_blocks = ceil_div(count, lines)
        kernels.column_sums[row_blocks,](
            parts, parts, u, (u,), count, row_blocks, 0, (width,), (0, blocks.parts), (0,), (ends[-1],), (1.0,),
            ends[-1], 1, rank, lines, lines, AT_ONCE, False, early, launch_pdl=early,
        )  # fmt: skip
    return u


def narrow_gradients(
    dys: Sequence[Tensor], u: Tensor, lefts: Sequence[Tensor], scales: Sequence[float], blocks: Blocks | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`scale * dy @ left` of every site beside each other, like u, and each site's `dy.T @ u`, like its left.

    The dys are `[rows, out]`, u is `[rows, sum of ranks]`, the lefts are `[out, rank]`.
    """
    factors, (count, total), u = _alike(lefts), u.shape, _by_row(u)
    ranks = (*(left.shape[1] for left in lefts),)
    widths = (*(left.shape[0] for left in lefts),)
    walk = _cut(count, widths, ranks, True, blocks)
    parts, column_parts = _walk([_by_row(dy) for dy in dys], u, factors, widths, ranks, walk)
    du = u.new_empty(count, total)
    dlefts = [torch.empty_like(factor) for factor in factors]
    lines, early = _lines(walk.rank), _starts_early(u.device)
    row_blocks, columns = ceil_div(count, lines), walk.starts[-1] * walk.blocks.columns
    _kernels().column_sums[row_blocks * len(widths) + columns // lines,](
        parts, column_parts, du, (*dlefts,), count, row_blocks, walk.blocks.parts, widths, walk.starts, walk.begins,
        ranks, (*scales,), total, len(widths), walk.rank, walk.blocks.columns, lines, AT_ONCE, True, early,
        launch_pdl=early,
    )  # fmt: skip
    return du, _like(dlefts, lefts)


def right_gradients(du: Tensor, rows: Tensor, rights: Sequence[Tensor], blocks: Blocks | None = None) -> list[Tensor]:
    """`du.T @ rows` of every site, `[rank, in]`, for du `[rows, sum of ranks]` and rows `[rows, in]`."""
    (count, width), dtype, total = rows.shape, _common_dtype(rights), du.shape[1]
    walk = _cut(count, (width,), (total,), False, blocks)
    parts, _ = _walk([_by_row(rows)], _by_row(du), None, (width,), (total,), walk)
    drights = [rows.new_empty(right.shape, dtype=dtype) for right in rights]
    lines, early = _lines(walk.rank), _starts_early(du.device)
    columns = walk.starts[-1] * walk.blocks.columns
    _kernels().row_sums[columns // lines,](
        parts, (*drights,), columns, width, walk.blocks.parts, (*accumulate(right.shape[0] for right in rights),),
        len(drights), walk.rank, lines, AT_ONCE, early, launch_pdl=early,
    )  # fmt: skip
    return _like(drights, rights)


def _walk(
    wides: Sequence[Tensor], u: Tensor, lefts: Sequence[Tensor] | None, widths: tuple[int, ...],
    ranks: tuple[int, ...], walk: _Walk,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The parts of `wide.T @ u`, `[parts, columns of all blocks, rank]`, and `wide @ left`, `[blocks, rows, rank]`."""
    count, blocks = u.shape[0], walk.blocks
    parts = u.new_empty(blocks.parts, walk.starts[-1] * blocks.columns, walk.rank, dtype=torch.float32)
    column_parts = parts if lefts is None else u.new_empty(walk.starts[-1], count, walk.rank, dtype=torch.float32)
    _kernels().gradients[walk.starts[-1], blocks.parts](
        (*wides,), u, (*(lefts or wides),), parts, column_parts, count, widths, (*(wide.stride(0) for wide in wides),),
        u.stride(0), walk.steps, walk.starts, walk.begins, ranks, len(widths), walk.rank, blocks.rows, blocks.columns,
        lefts is not None, _starts_early(u.device), num_stages=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    return parts, column_parts


@lru_cache(4096)
def _cut(rows: int, widths: tuple[int, ...], ranks: tuple[int, ...], both: bool, blocks: Blocks | None) -> _Walk:
    rank = padded(max(ranks))
    blocks = blocks or (gradient_blocks if both else sum_blocks)(rows, sum(widths), max(ranks))
    starts = (0, *accumulate(ceil_div(width, blocks.columns) for width in widths))
    steps = ceil_div(ceil_div(rows, blocks.rows), blocks.parts)
    return _Walk(blocks, rank, starts, steps, (0, *accumulate(ranks[:-1])))


def product_blocks(rows: int, width: int, ranks: int, bytes_of_right: int) -> Blocks:
    """How `narrow_product` cuts its work."""
    columns = 128 if ranks <= 64 else 64
    stages = min(4, 180_000 // (columns * (128 + padded(ranks) * bytes_of_right)))
    return Blocks(64, columns, max(1, min(8, 132 * 64 // rows)), stages, 4)


def gradient_blocks(rows: int, columns: int, rank: int) -> Blocks:
    """How `narrow_gradients` cuts its work."""
    wide = 256 if rank <= 32 else 128
    return Blocks(64, wide, max(1, min(64, 132 * wide // columns, rows // 64)), 4, 8 if rank <= 32 else 4)


def sum_blocks(rows: int, width: int, ranks: int) -> Blocks:
    """How `right_gradients` cuts its work."""
    return Blocks(64, 128, max(1, min(64, 132 * 128 // width, rows // 64)), 4, 4)


def padded(ranks: int) -> int:
    """The narrow side in a kernel: a power of two, and no less than a matrix instruction takes."""
    return max(16, 1 << (ranks - 1).bit_length())


def ceil_div(length: int, block: int) -> int:
    """How many blocks a length takes."""
    return -(-length // block)


def _lines(rank: int) -> int:
    """Rows that one program of the sums adds."""
    return 512 // rank


def _by_row(matrix: Tensor) -> Tensor:
    """With columns next to each other, as the kernels read."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _alike(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Contiguous, of one dtype: a kernel picks among them by their addresses."""
    dtype = _common_dtype(factors)
    return [factor.to(dtype).contiguous() for factor in factors]


def _common_dtype(factors: Sequence[Tensor]) -> torch.dtype:
    """The one that holds the numbers of all."""
    return reduce(torch.promote_types, (factor.dtype for factor in factors))


def _like(gradients: list[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """In the dtypes of the factors."""
    return [gradient.to(factor.dtype) for gradient, factor in zip(gradients, factors, strict=True)]


@cache
def _kernels() -> Any:
    """Imported at the first launch: torch for a CPU comes without Triton."""
    from surgery.compiler.kernels.low_rank import narrow_triton

    return narrow_triton


@cache
def _starts_early(device: torch.device) -> bool:
    """Whether the device can launch a kernel before the one that it waits for has ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
