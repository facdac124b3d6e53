"""The narrow sides of a low-rank linear in Triton: each reads its wide matrix `[rows, width]` once.

`rows @ right.T` for all sites that read it; `dy @ left` and `dy.T @ u` together from one read of dy; `du.T @ rows`.
All are bound by that one read. Sums over rows or over blocks of columns are first written by their parts, in float32
and a fraction of what is read, and then added in a fixed order: the same inputs give the same bits.

Matrices are float16 or bfloat16, factors of any floating dtype. `plain` has the same functions for all other cases.

The blocks are the best of some that were timed on an H200 (`python -m tests.benchmarks.kernels.narrow`; the table is in
`tests/benchmarks/NOTES.md`), and `choice` says where torch's products are quicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache, reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.compiler.kernels.forms import by_row, ceil_div, processors

WIDEST = 128  # columns on the narrow side; beyond, the products are bound by arithmetic and cuBLAS is right
AT_ONCE = 8  # parts of a sum that are loaded together
MOST_PARTS = 64
FILLING = 2  # steps that pass until the pipeline of a program is full


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
    if blocks is None:
        blocks = product_blocks(count, width, ends[-1], rights[0].element_size(), processors(rows.device))
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
    walk = _cut(count, widths, ranks, blocks or gradient_blocks(count, widths, ranks, processors(u.device)))
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
    walk = _cut(count, (width,), (total,), blocks or right_blocks(count, width, total, processors(rows.device)))
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
def _cut(rows: int, widths: tuple[int, ...], ranks: tuple[int, ...], blocks: Blocks) -> _Walk:
    starts = (0, *accumulate(ceil_div(width, blocks.columns) for width in widths))
    steps = ceil_div(ceil_div(rows, blocks.rows), blocks.parts)
    return _Walk(blocks, padded(max(ranks)), starts, steps, (0, *accumulate(ranks[:-1])))


@lru_cache(4096)
def product_blocks(rows: int, width: int, ranks: int, bytes_of_right: int, programs: int) -> Blocks:
    """How `narrow_product` cuts its work, where so many programs run at a time: few rows are made up for by parts."""
    columns = 128 if ranks <= 64 else 64
    stages = min(4, 180_000 // (columns * (128 + padded(ranks) * bytes_of_right)))
    parts = min(programs // ceil_div(rows, 64), ceil_div(width, 2 * columns), 8)
    return Blocks(64, columns, max(1, parts), stages, 4)


@lru_cache(4096)
def gradient_blocks(rows: int, widths: tuple[int, ...], ranks: tuple[int, ...], programs: int) -> Blocks:
    """How `narrow_gradients` cuts its work: wide blocks, because each one writes a part of du."""
    rank = padded(max(ranks))
    if rank > 32:
        columns, stages, warps = 128, 4, 4
    elif rank <= 16 and (max(widths) <= 512 or sum(widths) >= 4096):
        columns, stages, warps = 512, 3, 8
    else:  # half as many columns keep more processors busy
        columns, stages, warps = 256, 4, 8
    count = sum(ceil_div(width, columns) for width in widths)
    return Blocks(64, columns, _parts(rows, columns, count, rank, programs), stages, warps)


@lru_cache(4096)
def right_blocks(rows: int, width: int, ranks: int, programs: int) -> Blocks:
    """How `right_gradients` cuts its work."""
    return Blocks(64, 128, _parts(rows, 128, ceil_div(width, 128), padded(ranks), 2 * programs), 4, 4)


def _parts(rows: int, columns: int, count: int, rank: int, programs: int) -> int:
    """Into how many parts to cut the rows of `count` blocks of columns, where so many programs run at a time.

    The fewest steps of 64 rows from the first program to the last, and what the parts cost: each is written and read.
    """

    def steps(parts: int) -> float:
        written = 8 * rank * count * parts / (2 * 64 * programs)  # as steps, which read 64 rows of two bytes
        return ceil_div(count * parts, programs) * (ceil_div(rows, 64 * parts) + FILLING) + written

    return min(range(1, min(ceil_div(rows, 64), MOST_PARTS) + 1), key=steps)


def padded(ranks: int) -> int:
    """The narrow side in a kernel: a power of two, and no less than a matrix instruction takes."""
    return max(16, 1 << (ranks - 1).bit_length())


def _lines(rank: int) -> int:
    """Rows that one program of the sums adds."""
    return 512 // rank


def _by_row(matrix: Tensor) -> Tensor:
    """With columns next to each other, as the kernels read."""
    return matrix if by_row(matrix) else matrix.contiguous()


def _alike(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Contiguous, of one dtype: a kernel picks among them by their addresses."""
    dtype = _common_dtype(factors)
    return [factor.to(dtype).contiguous() for factor in factors]


def _common_dtype(factors: Sequence[Tensor]) -> torch.dtype:
    """The one that holds the numbers of all."""
    dtypes = {factor.dtype for factor in factors}
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)


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
