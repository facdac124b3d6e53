"""The narrow sides of a low-rank linear in Triton: each reads its wide matrix `[rows, width]` once.

`rows @ right.T` for all sites that read it; `dy @ left` and `dy.T @ u` together from one read of dy; `du.T @ rows`.
All are bound by that one read. Sums over rows or over blocks of columns are first written by their parts, in float32
and a fraction of what is read, and then added in a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDEST = 128  # columns on the narrow side; beyond, the products are bound by arithmetic and cuBLAS is right


class Blocks(NamedTuple):
    """How a pass is cut: rows and columns of a block, in how many parts a sum is, depth of the pipeline, warps."""

    rows: int
    columns: int
    parts: int
    stages: int
    warps: int
    bulk: bool = False  # loads of the wide matrix by a tensor descriptor


class _Sum(NamedTuple):
    """`target` `[count, ranks]`: `scale` times the sum of `parts[first:last]` `[parts, *, RANK]` at rows `offset:`."""

    parts: Tensor
    target: Tensor
    first: int
    last: int
    offset: int
    scale: float


EARLY = True


@cache
def _kernels() -> Any:
    """The module of the kernels; torch for a CPU comes without Triton."""
    from surgery.compiler.kernels.low_rank import narrow_triton

    return narrow_triton


def ceil_div(length: int, block: int) -> int:
    """How many blocks a length takes."""
    return -(-length // block)


def _early(matrix: Tensor) -> bool:
    """Whether the device starts a kernel before the one that it waits for has ended."""
    return EARLY and torch.cuda.get_device_capability(matrix.device)[0] >= 9


def _add(sums: Sequence[_Sum], padded: int) -> None:
    """Runs the sums in one launch."""
    rows = max(1, 512 // padded)
    starts = [0, *accumulate(ceil_div(one.target.shape[0], rows) for one in sums)]
    early = _early(sums[0].target)
    _kernels().sums[(starts[-1],)](
        tuple(one.parts for one in sums), tuple(one.target for one in sums), tuple(one.first for one in sums),
        tuple(one.last for one in sums), tuple(one.parts.shape[1] for one in sums), tuple(one.offset for one in sums),
        tuple(one.target.shape[0] for one in sums), tuple(one.target.shape[1] for one in sums),
        tuple(one.scale for one in sums), tuple(one.target.stride(0) for one in sums),
        tuple(one.target.stride(1) for one in sums),
        tuple(starts), FIRST=sum(one.target.dtype == sums[0].target.dtype for one in sums), SUMS=len(sums),
        ROWS=rows, RANK=padded, AT_ONCE=8, EARLY=early,
        num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def padded(ranks: int) -> int:
    """The narrow side in a kernel: a power of two, and no less than a matrix instruction takes."""
    return max(16, 1 << (ranks - 1).bit_length())


def narrow_product(
    rows: Tensor, rights: Sequence[Tensor], scales: Sequence[float], blocks: Blocks | None = None
) -> Tensor:
    """`scale * rows @ right.T` of every site beside each other, `[rows, sum of ranks]`, in rows' dtype.

    rows is `[rows, in]` in float16 or bfloat16; the rights `[rank, in]` may have any floating dtype.
    """
    rows, (count, width) = _plain(rows), rows.shape
    rights = _alike(rights)
    ends = [*accumulate(right.shape[0] for right in rights)]
    blocks = blocks or product_blocks(count, width, ends[-1], rights[0].element_size())
    rank = padded(ends[-1])
    u = rows.new_empty(count, ends[-1])
    split = blocks.parts > 1
    out = rows.new_empty(blocks.parts, count, rank, dtype=torch.float32) if split else u
    _kernels().product[(ceil_div(count, blocks.rows), blocks.parts)](
        _source(rows, blocks), tuple(rights), tuple(scales), out, count, width, rows.stride(0),
        ceil_div(ceil_div(width, blocks.columns), blocks.parts),
        ENDS=tuple(ends), SITES=len(rights), RANK=rank, BM=blocks.rows, BK=blocks.columns, BULK=blocks.bulk,
        SPLIT=split, EARLY=_early(rows), num_stages=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    if split:
        _add([_Sum(out, u, 0, blocks.parts, 0, 1.0)], rank)
    return u


def narrow_gradients(
    dys: Sequence[Tensor], u: Tensor, lefts: Sequence[Tensor], scales: Sequence[float], blocks: Blocks | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`scale * dy @ left` of every site beside each other, like u, and each site's `dy.T @ u`, like its left.

    The dys `[rows, out]` and u `[rows, sum of ranks]` have one dtype, float16 or bfloat16; a left `[out, rank]` may
    have any floating dtype.
    """
    dys, lefts_read, count = [_plain(dy) for dy in dys], _alike(lefts), u.shape[0]
    blocks = blocks or gradient_blocks(count, sum(dy.shape[1] for dy in dys), max(left.shape[1] for left in lefts))
    du = u.new_empty(u.shape)
    dlefts = [torch.empty_like(left, memory_format=torch.contiguous_format) for left in lefts_read]
    ends = [*accumulate(left.shape[1] for left in lefts)]
    rank = padded(max(left.shape[1] for left in lefts))
    starts, row_sums, column_sums = _walk(dys, u, lefts_read, ends, rank, blocks)
    sums = [
        _Sum(column_sums, du[:, end - left.shape[1] : end], first, last, 0, scale)
        for left, end, first, last, scale in zip(lefts, ends, starts, starts[1:], scales, strict=False)
    ]
    sums += [
        _Sum(row_sums, dleft, 0, blocks.parts, first * blocks.columns, 1.0)
        for dleft, first in zip(dlefts, starts, strict=False)
    ]
    _add(sums, rank)
    return du, [dleft.to(left.dtype) for dleft, left in zip(dlefts, lefts, strict=True)]


def right_gradients(du: Tensor, rows: Tensor, rights: Sequence[Tensor], blocks: Blocks | None = None) -> list[Tensor]:
    """`du.T @ rows` of every site, `[rank, in]` each, like its right.

    du is `[rows, sum of ranks]`, rows `[rows, in]`, of one dtype, float16 or bfloat16.
    """
    rows = _plain(rows)
    blocks = blocks or sum_blocks(rows.shape[0], rows.shape[1], du.shape[1])
    dtype = _common_dtype(rights)
    drights = [rows.new_empty(right.shape, dtype=dtype) for right in rights]
    rank = padded(du.shape[1])
    _, row_sums, _ = _walk([rows], _plain(du), None, [du.shape[1]], rank, blocks)
    sums, begin = [], 0
    for dright in drights:
        sums.append(_Sum(row_sums[:, :, begin:], dright.T, 0, blocks.parts, 0, 1.0))
        begin += dright.shape[0]
    _add(sums, rank)
    return [dright.to(right.dtype) for dright, right in zip(drights, rights, strict=True)]


def _walk(
    wides: Sequence[Tensor], u: Tensor, lefts: Sequence[Tensor] | None, ends: Sequence[int], rank: int, blocks: Blocks
) -> tuple[list[int], Tensor, Tensor]:
    """Runs `_gradients`: where each site's blocks of columns begin, and the parts of both kinds of sums."""
    count = u.shape[0]
    starts = [0, *accumulate(ceil_div(wide.shape[1], blocks.columns) for wide in wides)]
    columns = starts[-1] * blocks.columns
    row_sums = u.new_empty(blocks.parts, columns, rank, dtype=torch.float32)
    column_sums = u.new_empty(starts[-1], count, rank, dtype=torch.float32) if lefts else row_sums
    begins = [0, *ends[:-1]]
    _kernels().gradients[(starts[-1], blocks.parts)](
        tuple(_source(wide, blocks) for wide in wides), u, tuple(lefts or wides), row_sums, column_sums, count,
        tuple(wide.shape[1] for wide in wides), tuple(wide.stride(0) for wide in wides), u.stride(0),
        ceil_div(ceil_div(count, blocks.rows), blocks.parts), columns, tuple(starts), tuple(begins),
        tuple(end - begin for end, begin in zip(ends, begins, strict=True)), SITES=len(wides), RANK=rank,
        BM=blocks.rows, BN=blocks.columns, BULK=blocks.bulk, BOTH=lefts is not None,
        EARLY=_early(u), num_stages=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    return starts, row_sums, column_sums


def _plain(matrix: Tensor) -> Tensor:
    """With columns next to each other, as the kernels read."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _alike(factors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, of one dtype: a kernel picks among them by their addresses."""
    dtype = _common_dtype(factors)
    return [factor.to(dtype).contiguous() for factor in factors]


def _common_dtype(factors: Sequence[Tensor]) -> torch.dtype:
    """The one that holds the numbers of all."""
    return reduce(torch.promote_types, (factor.dtype for factor in factors))


def _source(matrix: Tensor, blocks: Blocks) -> Any:
    """The matrix as a kernel takes it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [blocks.rows, blocks.columns]) if blocks.bulk else matrix


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
